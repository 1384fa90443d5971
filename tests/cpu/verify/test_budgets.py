"""Budgets: the file is what the tool writes, a small case measured again lies within it, and what is made of it."""

import json
import math
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from ownpath.config import ModelConfig
from ownpath.plan.opspec import model_ops
from ownpath.verify.budgets import PATH, LogitBudget, UnknownKind, budget, kind_of, logit_budget, mode_of

sys.path.insert(0, str(Path(__file__).parents[3] / "tools"))

import measure_budgets
from support.checkpoints import SMALL

FILE = json.loads(PATH.read_text(encoding="utf-8"))
LOGITS = ("kl_mean", "kl_p99", "kl_max", "top1_changed", "nll")


def test_the_file_is_as_the_tool_writes_it() -> None:
    assert PATH.read_text(encoding="utf-8") == measure_budgets.as_text(FILE)


def test_one_case_measured_again_lies_within_the_files_range(tmp_path: Path) -> None:
    """The case of the file's list whose layout has every arithmetic: 130 tokens of a random checkpoint, seed 1."""
    case = measure_budgets.random_case(tmp_path, "modelopt-experts-only", 1, 130, "cpu")
    assert case.name in FILE["cases"]
    blocks: measure_budgets.Noise = defaultdict(lambda: defaultdict(list))
    logits: measure_budgets.Noise = defaultdict(lambda: defaultdict(list))
    with torch.inference_mode():
        measure_budgets.measure(case, blocks, logits)
    assert set(blocks) == set(FILE["blocks"]) == set(measure_budgets.MODES)
    for part, found in (("blocks", blocks), ("logits", logits)):
        for mode, kinds in found.items():
            for kind, values in kinds.items():
                # Another torch sums in another order: in float32 all the noise there is, hence the factor.
                assert max(values) <= 2 * FILE[part][mode][kind]["largest"], (mode, kind)
    assert set(logits) == set(FILE["logits"])


def test_rounding_to_bfloat16_is_seen_where_it_happens() -> None:
    """One rounding moves values by 2^-9 on average or so; a slot after many has more. float32 likewise, 2^16 below."""
    for mode, unit in (("float32", 2.0**-24), ("bfloat16", 2.0**-8)):
        for kind, spread in FILE["blocks"][mode].items():
            assert 0 <= spread["median"] <= spread["largest"] < 64 * unit, (mode, kind)
            assert (spread["largest"] > unit / 8) == (kind != "hc_attn.x"), (mode, kind)


def test_every_product_has_a_budget_in_every_arithmetic() -> None:
    kinds = {kind_of(op.slot) for op in model_ops(ModelConfig.from_dict(SMALL))} | {"attn.core", "out", "hc_ffn.h"}
    for kind in kinds:
        plain = budget(kind, torch.bfloat16)
        assert 0 < budget(kind, torch.float64) < budget(kind, torch.float32) < plain < 0.2
        for more in ({"is_w4a4": True}, {"is_w8a8": True}, {"is_official": True}):
            assert budget(kind, torch.bfloat16, **more) > 0
            assert budget(kind, torch.bfloat16, **more) == budget(kind, torch.float32, **more)


def test_a_budget_is_four_times_the_largest_noise_and_one_rounding_where_there_is_none() -> None:
    largest = FILE["blocks"]["bfloat16"]["ffn.experts"]["largest"]
    assert budget("ffn.experts", torch.bfloat16) == 4 * largest
    assert FILE["blocks"]["bfloat16"]["hc_attn.x"]["largest"] == 0
    assert budget("hc_attn.x", torch.bfloat16) == 2.0**-8
    assert budget("hc_attn.x", torch.float32) == 2.0**-24


def test_logit_budgets() -> None:
    narrow, wide = logit_budget(torch.bfloat16), logit_budget(torch.float32)
    assert narrow == LogitBudget(**{name: 4 * FILE["logits"]["bfloat16"][name]["largest"] for name in LOGITS})
    assert all(getattr(wide, name) < getattr(narrow, name) for name in LOGITS)
    assert FILE["logits"]["float32"]["top1_changed"]["largest"] == 0
    assert wide.top1_changed == 1e-3
    assert wide.kl_mean == 2.0**-24
    assert logit_budget(torch.float64) == wide


@pytest.mark.parametrize(
    ("slot", "kind"),
    [
        ("layers.3.attn.wq_b", "attn.wq_b"),
        ("layers.41.hc_ffn.h", "hc_ffn.h"),
        ("mtp.0.ffn.experts", "ffn.experts"),
        ("layers.0.out", "out"),
        ("head", "head"),
    ],
)
def test_kinds_are_slots_without_their_layer(slot: str, kind: str) -> None:
    assert kind_of(slot) == kind


def test_what_was_not_measured_has_no_budget() -> None:
    with pytest.raises(UnknownKind, match=r"attn\.wq_c in bfloat16"):
        budget("attn.wq_c", torch.bfloat16)
    with pytest.raises(UnknownKind, match="out in float16"):
        budget("out", torch.float16)
    assert mode_of(torch.bfloat16, is_w8a8=True) == "bfloat16+w8a8"


def test_digits_are_rounded_upwards() -> None:
    assert measure_budgets.upwards(0.0) == 0
    assert measure_budgets.upwards(0.12345) == 0.124
    for value in (1e-7, 3.14159e-3, 0.999, 12.34):
        assert value <= measure_budgets.upwards(value) <= value * (1 + 0.0101)


def test_distance_leaves_out_what_is_not_finite() -> None:
    exact = torch.tensor([[3.0, -math.inf], [4.0, 0.0]])
    found = torch.tensor([[3.0, -math.inf], [4.5, 0.0]])
    assert measure_budgets.distance(found, exact) == pytest.approx(0.1)
    assert measure_budgets.distance(torch.zeros(2), torch.zeros(2)) == 0
