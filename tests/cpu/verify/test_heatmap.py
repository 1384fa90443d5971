"""The map: where each slot and tensor falls, what a cell says, and which colour it has."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from ownpath.finding import Finding, Verdict
from ownpath.verify.fold import fold_layers, unfold_layers
from ownpath.verify.heatmap import COLUMNS, LEVELS, Cell, heat_map, short_number
from ownpath.verify.layers.measure import Measurement
from ownpath.verify.layers.teacher_forcing import ORDER
from ownpath.verify.report import first_bad_layer
from ownpath.verify.run import StageResult, Verification, VerifyJob


def measured(share: float, layer_idx: int = 0, slot: str = "attn.q") -> Measurement:
    """share: of its budget."""
    return Measurement(layer_idx, slot, share * 0.5, 0.0, 0.9, 0.0, 1.0, 1.0, 0.0, 0.0, 0.5)


def failure(where: str, check: str = "L02") -> Finding:
    return Finding(check, where, Verdict.FAIL, "wrong")


def map_of(*found: Finding | Measurement) -> dict[str, dict[tuple[str, str], Cell]]:
    findings = tuple(item for item in found if isinstance(item, Finding))
    rows = tuple(item for item in found if isinstance(item, Measurement))
    return heat_map(Verification(VerifyJob(Path()), (StageResult("layers", findings, 1.0, "", rows),)))


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("hc_attn_base", ("attention", "hc")),
        ("attn_norm.weight", ("attention", "hc")),
        ("attn.wqa_wkv", ("attention", "q")),
        ("attn.wkv.weight", ("attention", "kv")),
        ("attn.compressor.ape", ("attention", "compr.")),
        ("attn.x_products", ("attention", "compr.")),
        ("attn.queries", ("attention", "q")),
        ("attn.indexer.compressor.wkv_wgate", ("attention", "index")),
        ("attn.attn_sink", ("attention", "core")),
        ("attn", ("attention", "core")),
        ("attn.wo_a.weight", ("attention", "out")),
        ("hc_ffn.x", ("ffn", "hc")),
        ("ffn.gate.bias", ("ffn", "router")),
        ("ffn.experts.7.w1.weight", ("ffn", "experts")),
        ("ffn.shared_experts.w2", ("ffn", "shared")),
        ("out", ("layer", "out")),
        ("something.else", ("layer", "out")),
    ],
)
def test_where_a_slot_or_tensor_falls(name: str, column: tuple[str, str]) -> None:
    assert list(map_of(failure(f"layers.3.{name}"))["layers.3"]) == [column]


def test_every_value_has_its_place_and_no_column_stays_empty() -> None:
    rows = map_of(*(measured(0.5, 4, slot) for slot in ORDER), measured(0.1, -1, "embed"), measured(0.1, 5, "head"))
    assert list(rows) == ["embed", "layers.4", "head"]
    assert set(rows["layers.4"]) == set(COLUMNS)
    assert sum(len(cell.values) for cell in rows["layers.4"].values()) == len(ORDER)


def test_rows_are_in_the_order_of_the_forward() -> None:
    found = [failure(where) for where in ("norm.weight", "mtp.0.attn", "layers.10", "layers.9.out", "embed.weight")]
    assert list(map_of(*found)) == ["embed", "layers.9", "layers.10", "mtp.0", "head"]
    assert map_of(failure("model-00001-of-00002.safetensors"), failure(""), failure("layers.x.attn")) == {}


@pytest.mark.parametrize(
    ("share", "level", "text"),
    [
        (0.0, 0, "0.00"),
        (0.1, 0, "0.10"),
        (0.11, 1, "0.11"),
        (0.5, 2, "0.50"),
        (1.0, 3, "1.0"),
        (1.001, 4, "1.1"),
        (3.0, 4, "3.0"),
        (10.0, 5, "10"),
        (10.1, 6, "10"),
        (730.0, 6, "730"),
        (52_000.0, 6, "5e4"),
        (math.inf, 6, "inf"),
        (math.nan, 6, "inf"),
    ],
)
def test_colour_and_number_of_an_error(share: float, level: int, text: str) -> None:
    cell = Cell([measured(0.0), measured(share)])
    assert (cell.level, cell.text, cell.is_bad) == (level, text, not share <= 1)


def test_a_failure_is_not_coloured_as_if_it_were_within_its_budget() -> None:
    within, beyond = measured(0.2), measured(4.0)
    assert (Cell([within], [failure("")]).text, Cell([within], [failure("")]).level) == ("L02", 5)
    assert (Cell([], [failure("", "LG03")]).text, Cell([], [failure("")]).level) == ("LG03", 5)
    assert (Cell([beyond], [failure("")]).text, Cell([beyond], [failure("")]).level) == ("4.0", 5)
    assert Cell([replace(within, nonfinite_share=0.5)]).level == len(LEVELS)
    assert all(len(short_number(10.0**power)) <= 5 for power in range(-320, 308))


def test_what_was_folded_is_on_every_layer() -> None:
    slots = [f"layers.{idx}.attn.wq_b" for idx in (0, 1, 2, 5)]
    ((where, _),) = fold_layers((slot, "wrong") for slot in slots)
    assert unfold_layers(where) == slots
    assert list(map_of(failure(where))) == ["layers.0", "layers.1", "layers.2", "layers.5"]
    assert first_bad_layer([failure("layers.4.out"), failure(where)]) == "layers.0"


@pytest.mark.parametrize(
    "name", ["layers.{0-999999999999}.x", "layers.{,}.x", "layers.{5-}.x", f"layers.{'9' * 5000}.x", "layers.٣.x"]
)
def test_a_name_from_a_file_that_looks_like_layers_is_a_name(name: str) -> None:
    assert unfold_layers(name) == [name]
    assert map_of(failure(name)) == {}
    assert first_bad_layer([failure(name)]) is None
