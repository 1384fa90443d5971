"""``ownpath verify --engine vllm`` on two ranks: every value of each, and the rank that is wrong by its number.

Three weights are wrong on rank 1 alone, so that everything else shows what is right.
"""

from typing import Any

import pytest
from conftest import NO_CLAMP, write_plain
from test_proof import Report, verify

from ownpath.loading import default_model_dir

pytestmark = pytest.mark.vllm
# The text's sixth token is in the second half of the vocabulary.
TWO = ("--tensor-parallel-size", "2", "--distributed-executor-backend", "mp", "--rows", "1,6")
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
    return [finding for finding in found if finding["id"] == "VE03" and finding["where"].startswith("rank ")]


FAULTS = {"layers.2.attn.wo_b", "layers.1.ffn.experts", "layers.3.ffn.shared_experts.w13"}
"""The values that site/vllm_faults makes a quarter too large on rank 1."""


@pytest.fixture(scope="module", params=["TP", "EP", "TP, stock"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """With our runners the embedded model; stock its BF16 copy, without the clamp that vLLM's experts there lack."""
    work, options = tmp_path_factory.mktemp("ranks"), BY_EXPERT if request.param == "EP" else TWO
    if request.param != "TP, stock":
        return verify(default_model_dir(), work, *options, OWNPATH_TEST_FAULTS="rank1")
    folder = write_plain(work / "plain", swiglu_limit=NO_CLAMP)
    return verify(folder, work, *options, OWNPATH_TEST_FAULTS="rank1", OWNPATH_VLLM="none")


def test_every_value_of_both_ranks_is_compared(found: Report) -> None:
    """Halves of heads, groups and experts against the reference's, parts of sums against its parts, and the sums."""
    assert values_of(found, 0) == values_of(found, 1)
    for layer in range(NUM_LAYERS):
        of_layer = {slot for at, slot in values_of(found, 1) if at == layer}
        cut = {"attn.wq_b", "attn.q", "attn.core", "attn.wo_a", "ffn.shared_experts.w13", "ffn.shared_experts.swiglu"}
        sums = {"attn.wo_b", "attn.wo_b.sum", "ffn.experts", "ffn.shared_experts.w2", "ffn.sum"}
        assert cut | sums | {"hc_attn.h", "hc_ffn.x", "hc_ffn.h", "attn.wqa_wkv", "ffn.gate", "out"} <= of_layer
    assert {"embed", "hc_head", "head"} <= {slot for _, slot in values_of(found, 1)}
    kinds = {"prefill of 1 row", "prefill of 6 rows", "decode of 1 row", "decode of 6 rows", "mixed of 6 rows"}
    assert steps_of(found, 0) == steps_of(found, 1) == {f"{kind}, eager" for kind in kinds}


def test_both_ranks_are_walked(found: Report) -> None:
    assert [rank["where"] for rank in walked(found)] == ["rank 0", "rank 1"]
    ours = {rank["number"] for rank in walked(found)}
    assert ours == ({0} if all("UnquantizedFusedMoE" in rank["message"] for rank in walked(found)) else {30})


def test_a_fault_of_rank_1_alone_is_named_with_its_rank(found: Report) -> None:
    """The sums to which wrong parts are added are right sums of them."""
    assert found.code == 1
    assert found.failing.keys() == FAULTS
    assert all(finding["message"].startswith("on rank 1 of 2: off in ") for finding in found.failing.values())
    place = {(int(where.split(".")[1]), where.split(".", 2)[2]) for where in FAULTS}
    right = [
        m for m in found.whole["measurements"]
        if (m["layer_idx"], m["slot"]) not in place or m["run"].endswith("rank 0")
    ]  # fmt: skip
    assert max(m["excess"] for m in right) < 1
