"""K11 beside what test_mutations runs: in bfloat16, where there is nothing to check, and how small a fault it sees."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.mutations import decode
from support.mutations.mutation import Mutation
from support.mutations.runs import write_model

from ownpath.config import EngineConfig
from ownpath.conformance.decode import best_entries
from ownpath.finding import Finding, Verdict, failed
from ownpath.formats import CacheFormat
from ownpath.loading import default_model_dir
from ownpath.official import PLAIN, Step
from ownpath.verify import kernel_stage as stage
from ownpath.verify.kernels.decode import check_decode
from ownpath.verify.subject import Selection, Subject

SLOT = "layers.1.attn.decode"
ATTENTION = frozenset({Step.KV, Step.INDEXER, Step.Q_HEAD_NORM})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("decode") / "model")


@pytest.fixture(autouse=True)
def only_this_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "CHECKS", (("K11", check_decode),))


def checked(
    folder: Path,
    layer_idx: int,
    official: frozenset[Step] = PLAIN,
    cache_format: CacheFormat = CacheFormat.BF16,
    rows_per_request: int = 1,
) -> list[Finding]:
    engine = EngineConfig(
        dtype=torch.bfloat16, official=official, cache_format=cache_format, rows_per_request=rows_per_request
    )
    return list(stage.kernel_stage(Subject.of(folder, engine, Selection(frozenset({layer_idx})))))


def caught(folder: Path, mutation: Mutation) -> list[Finding]:
    with mutation.interference.applied():
        return failed(checked(folder, 1))


@pytest.mark.parametrize("layer_idx", [decode.SLIDING, decode.CSA, decode.HCA])
def test_a_right_layer_passes_in_bfloat16(layer_idx: int, folder: Path) -> None:
    [finding] = checked(folder, layer_idx)
    assert (finding.where, finding.verdict) == (f"layers.{layer_idx}", Verdict.PASS)
    assert finding.number is not None
    assert 0.1 < finding.number <= 1, "a rounding to bfloat16 comes near to what is allowed"


@pytest.mark.parametrize("official", [PLAIN, ATTENTION], ids=["plain", "official"])
@pytest.mark.parametrize("cache_format", list(CacheFormat))
@pytest.mark.parametrize("layer_idx", [decode.SLIDING, decode.CSA, decode.HCA])
def test_formats_and_numerics_are_checked_to_the_code(
    layer_idx: int, cache_format: CacheFormat, official: frozenset[Step]
) -> None:
    [finding] = checked(default_model_dir(), layer_idx, official, cache_format)
    assert (finding.where, finding.verdict) == (f"layers.{layer_idx}", Verdict.PASS), finding.message


@pytest.mark.parametrize("layer_idx", [decode.SLIDING, decode.CSA, decode.HCA])
def test_several_rows_of_a_request_are_checked(layer_idx: int) -> None:
    for cache_format in CacheFormat:
        official = ATTENTION if cache_format is CacheFormat.FP8 else PLAIN
        [finding] = checked(default_model_dir(), layer_idx, official, cache_format, rows_per_request=4)
        assert (finding.where, finding.verdict) == (f"layers.{layer_idx}", Verdict.PASS), finding.message


def from_the_ring_alone(run: Any, raw: Any, angles: Any, rows: Any, pools: Any) -> None:
    """Row after row, last ones first: an entry misses the rows before its own in the step."""
    for t in reversed(range(len(rows.slots_T))):
        part = slice(t, t + 1)
        of_row = (
            type(of_all)(*(None if one is None else one[part] for one in of_all)) for of_all in (raw, angles, rows)
        )
        run(*of_row, pools)


def later_keys_seen(run: Any, q: Any, cos: Any, sin: Any, keys: Any, rows: Any) -> Any:
    """Each row attends as the one behind it."""
    return run(q, cos, sin, keys, rows._replace(positions_T=rows.positions_T.roll(-1, 0)))


@pytest.mark.parametrize(
    ("part", "call", "slot"),
    [("write", from_the_ring_alone, "entries"), ("attend", later_keys_seen, "attend")],
    ids=["entries", "attend"],
)
def test_faults_between_rows_of_a_request_are_seen(part: str, call: Any, slot: str, folder: Path) -> None:
    mutation = decode.called("rows of a step", part, call, decode.HCA)
    with mutation.interference.applied():
        found = failed(checked(folder, decode.HCA, rows_per_request=4))
    assert {finding.where for finding in found} == {f"layers.{decode.HCA}.attn.decode.{slot}"}
    with decode.called("one row", "write", from_the_ring_alone, decode.HCA).interference.applied():
        assert not failed(checked(folder, decode.HCA)), "with one row of a request that is no fault"


def rounded_down(run: Callable[..., None], raw: Any, angles: Any, rows: Any, pools: Any) -> None:
    """Codes of the window's pages one step towards zero."""
    run(raw, angles, rows, pools)
    codes = pools.window[:, : 128 * 576].unflatten(1, (128, 576))[:, :, :448]
    codes[(codes & 0x7F) > 0] -= 1


def test_a_code_beside_the_nearest_is_seen() -> None:
    mutation = decode.on_pages("codes", "write", rounded_down)
    with mutation.interference.applied():
        findings = failed(checked(default_model_dir(), decode.CSA, cache_format=CacheFormat.FP8))
    assert {finding.where for finding in findings} == {f"{SLOT}.entries"}


def test_layers_without_such_kernels_are_skipped(tmp_path: Path) -> None:
    [finding] = checked(write_model(tmp_path / "model", sliding_window=64), decode.CSA)
    assert finding.verdict is Verdict.SKIPPED
    assert "no kernels of decode steps are planned" in finding.message


def test_attention_of_the_mutations_is_right_but_for_its_keys(folder: Path) -> None:
    subject = Subject.of(folder, EngineConfig(), Selection(frozenset({decode.HCA})))
    with decode.called("nothing", "attend", decode.attending(), decode.HCA).interference.applied():
        assert not failed(stage.kernel_stage(subject))


def larger(run: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
    return 1.02 * run(*args)


@pytest.mark.parametrize(("part", "slot"), [("score", "scores"), ("attend", "attend")])
def test_two_percent_are_seen_in_bfloat16(part: str, slot: str, folder: Path) -> None:
    [finding] = caught(folder, decode.called("the result", part, larger))
    assert finding.where == f"{SLOT}.{slot}"
    assert "the row at position " in finding.message


def test_a_row_written_beside_the_steps_is_named(folder: Path) -> None:
    """The ring's row of the token before the newest one is written once more, with what another row has."""

    def call(run: Any, raw: Any, angles: Any, rows: Any, pools: Any) -> None:
        run(raw, angles, rows, pools)
        if len(rows.slots_T) > 2:  # the row at position 4, not the step of one row
            pools.window[128 * int(rows.slots_T[2]) + 3] = pools.window[128 * int(rows.slots_T[2]) + 4]

    [finding] = caught(folder, decode.called("a key", "write", call))
    assert finding.where == f"{SLOT}.entries"
    assert finding.message == "window: row 387 changed, which no row of the step writes"


def test_a_kernel_that_raises_is_named_and_the_others_are_judged(folder: Path) -> None:
    def raises(run: Any, *args: Any) -> None:
        raise RuntimeError("no kernel image is available")

    found = {finding.where: finding.message for finding in caught(folder, decode.called("a key", "score", raises))}
    assert found == {f"{SLOT}.scores": "RuntimeError: no kernel image is available"}


def test_best_entries() -> None:
    nan = float("nan")
    assert best_entries([1.0, nan, 3.0, 1.0, -2.0, 1.0], 3) == [0, 2, 3]
    assert best_entries([nan, -1.0, nan], 2) == [0, 1], "NaN is below all, the lower of two first"
    assert best_entries([0.0, -0.0, 0.0], 1) == [0]
    assert best_entries([], 4) == []
