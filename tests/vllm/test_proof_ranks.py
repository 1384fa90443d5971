"""``ownpath verify --engine vllm`` on two ranks: every value of each, and the rank that is wrong by its number."""

from pathlib import Path
from typing import Any

import pytest
from test_proof import Report, verify

from ownpath.loading import default_model_dir

pytestmark = pytest.mark.vllm
TWO = ("--tensor-parallel-size", "2", "--distributed-executor-backend", "mp", "--rows", "1,5")
BY_EXPERT = (*TWO, "--enable-expert-parallel")
NUM_LAYERS = 4


def steps_of(report: Report, rank: int) -> set[str]:
    ending = f", rank {rank}"
    return {m["run"].removesuffix(ending) for m in report.whole["measurements"] if m["run"].endswith(ending)}


def values_of(report: Report, rank: int) -> set[tuple[int, str]]:
    ending = f", rank {rank}"
    return {(m["layer_idx"], m["slot"]) for m in report.whole["measurements"] if m["run"].endswith(ending)}


def walked(report: Report) -> list[dict[str, Any]]:
    found = (finding for stage in report.whole["stages"] for finding in stage["findings"])
    return [finding for finding in found if finding["check_id"] == "VE03" and finding["where"].startswith("rank ")]


def test_every_value_of_both_ranks_is_right(tmp_path: Path) -> None:
    """TP by width: halves of heads, groups and experts' width against the reference's, and the sums over ranks."""
    found = verify(default_model_dir(), tmp_path, *TWO)
    assert (found.code, found.failing) == (0, {}), found.text[-3000:]
    assert values_of(found, 0) == values_of(found, 1)
    for layer in range(NUM_LAYERS):
        of_layer = {slot for at, slot in values_of(found, 1) if at == layer}
        cut = {"attn.wq_b", "attn.q", "attn.core", "attn.wo_a", "ffn.shared_experts.w13", "ffn.shared_experts.swiglu"}
        sums = {"attn.wo_b", "attn.wo_b.sum", "ffn.experts", "ffn.shared_experts.w2", "ffn.sum"}
        assert cut | sums | {"hc_attn.h", "hc_ffn.x", "hc_ffn.h", "attn.wqa_wkv", "ffn.gate", "out"} <= of_layer
    assert {"embed", "hc_head", "head"} <= {slot for _, slot in values_of(found, 1)}
    kinds = {"prefill of 1 row", "prefill of 5 rows", "decode of 1 row", "decode of 5 rows", "mixed of 5 rows"}
    assert steps_of(found, 0) == steps_of(found, 1) == {f"{kind}, eager" for kind in kinds}
    assert [rank["where"] for rank in walked(found)] == ["rank 0", "rank 1"]
    assert all(rank["number"] == 30 for rank in walked(found)), "our kernels run as planned on each"


@pytest.mark.parametrize("options", [TWO, BY_EXPERT], ids=["TP", "EP"])
def test_a_fault_of_rank_1_alone_is_named_with_its_rank(options: tuple[str, ...], tmp_path: Path) -> None:
    """Weights a quarter too large on one rank; what its sums are added to is everybody's, and nobody else's fault."""
    found = verify(default_model_dir(), tmp_path, *options, OWNPATH_TEST_FAULTS="rank1")
    places = {
        "layers.2.attn.wo_b",
        "layers.1.ffn.experts",
        "layers.3.ffn.shared_experts.w13",
    }  # site/vllm_faults.ON_RANK_1
    assert found.failing.keys() == places
    assert all(finding["message"].startswith("on rank 1 of 2: off in ") for finding in found.failing.values())
    assert found.code == 1
