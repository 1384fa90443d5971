"""Two ranks of a layer: each value against the reference's part, by plain products of the columns that a rank has."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from cpu.integrations.test_proof_compare import (
    LAYER,
    Kept,
    behind,
    proof,
    propagated,
    right_values,
    steps_of,
)

from ownpath.finding import Verdict
from ownpath.integrations.vllm.proof.compare import RankSteps, compare_layer
from ownpath.integrations.vllm.proof.findings import judge_values, judge_walk
from ownpath.integrations.vllm.proof.reference import ORDER
from ownpath.integrations.vllm.proof.seen import EngineRun
from ownpath.integrations.vllm.proof.shares import LayerShare
from ownpath.oracle.formulas import swiglu

RANKS, WIDTH, NUM_EXPERTS = 2, 256, 8
HEADS = ("attn.q", "attn.core", "attn.o")
COLUMNS = ("attn.wq_b", "attn.wo_a", "attn.wo_b.in", "ffn.shared_experts.swiglu", "ffn.shared_experts.w2.in")
FAULT = 1.25


@cache
def matrix(module: str) -> torch.Tensor:
    name = f"layers.{LAYER}.{module}"
    return proof().stored.matrix(name, proof().encodings[name]).float()


def half(x: torch.Tensor, rank: int) -> torch.Tensor:
    return x.chunk(RANKS, 1)[rank]


def product(x: torch.Tensor, module: str, rank: int) -> torch.Tensor:
    """The product of a rank's columns of both, which it adds to a sum."""
    return (half(x, rank).float() @ half(matrix(module), rank).T).bfloat16()


def experts(v: Kept, rank: int, by_expert: bool) -> torch.Tensor:
    """The rank's part of the routed experts: of its experts, or of its half of every expert's width."""
    x, out = v["ffn.experts.in"].float(), torch.zeros(len(v["ffn.experts.in"]), WIDTH)
    for expert in range(NUM_EXPERTS):
        if by_expert and expert // (NUM_EXPERTS // RANKS) != rank:
            continue
        w1, w3, w2 = (matrix(f"ffn.experts.{expert}.{name}") for name in ("w1", "w3", "w2"))
        hidden = swiglu(x @ w1.T, x @ w3.T, proof().config.swiglu_limit).bfloat16().float()
        y = hidden @ w2.T if by_expert else half(hidden, rank) @ half(w2, rank).T
        weight_T = (v["ffn.router.weights"] * (v["ffn.router.ids"] == expert)).sum(1)
        out += weight_T[:, None] * y
    return out.bfloat16()


def ranks_of(by_expert: bool, *faults: str) -> list[Kept]:
    """Each rank's values; what the second gives at ``faults`` is a quarter too large, and everybody goes on with it."""

    def parts(name: str, right: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [part * (FAULT if name in faults and rank else 1) for rank, part in enumerate(right)]

    v = right_values()
    wo_b = parts("attn.wo_b", [product(v["attn.wo_b.in"], "attn.wo_b", rank) for rank in range(RANKS)])
    v = propagated(v | dict.fromkeys(("attn.wo_b", "attn.out"), sum(wo_b)), behind("attn.wo_b"))
    routed = parts("ffn.experts", [experts(v, rank, by_expert) for rank in range(RANKS)])
    shared = [product(v["ffn.shared_experts.w2.in"], "ffn.shared_experts.w2", rank) for rank in range(RANKS)]
    v = propagated(v | dict.fromkeys(("ffn.sum", "ffn.out"), sum(routed) + sum(shared)), ("out",))
    found = []
    for rank in range(RANKS):
        own = {name: half(v[name], rank) for name in (*HEADS, *COLUMNS)}
        gate, up = v["ffn.shared_experts.w13"].chunk(2, 1)
        own["ffn.shared_experts.w13"] = torch.cat((half(gate, rank), half(up, rank)), 1)
        own |= {"attn.wo_b.part": wo_b[rank], "ffn.experts": routed[rank], "ffn.shared_experts.w2": shared[rank]}
        found.append(v | own)
    return found


def compared(by_expert: bool, values: Sequence[Kept], folder: Path) -> dict[str, str]:
    """Returns the failing places with their messages, after a look at how many values were compared."""
    ranks = []
    for rank, own in enumerate(values):
        (folder / str(rank)).mkdir()
        held = frozenset(range(rank * 4, rank * 4 + 4)) if by_expert else None
        share = LayerShare(rank, RANKS, held, (0, 1) if by_expert else (rank, RANKS))
        steps = [replace(step, rank=rank) for step in steps_of(own, folder / str(rank))]
        ranks.append(RankSteps(steps, {}, share))
    found = compare_layer(proof(), LAYER, ranks)
    assert {(one.step.rank, one.measured.slot) for one in found} == {(rank, name) for rank in (0, 1) for name in ORDER}
    failing = [one for one in judge_values("layers.1", found, RANKS) if one.verdict is Verdict.FAIL]
    return {finding.where: finding.message for finding in failing}


def test_right_ranks_are_within_their_budgets(tmp_path: Path) -> None:
    assert compared(False, ranks_of(by_expert=False), tmp_path) == {}


def test_the_rank_that_is_wrong_is_named_and_no_sum(tmp_path: Path) -> None:
    found = compared(True, ranks_of(True, "attn.wo_b", "ffn.experts"), tmp_path)
    assert list(found) == ["layers.1.attn.wo_b", "layers.1.ffn.experts"]
    assert all(message.startswith("on rank 1 of 2: off in ") for message in found.values())


def test_a_sum_that_leaves_out_a_rank_is_named(tmp_path: Path) -> None:
    values = ranks_of(by_expert=False)
    lost = values[0]["attn.wo_b.part"]
    names = ("attn.wo_b", "attn.out")
    v = propagated(right_values() | dict.fromkeys(names, lost), ("hc_ffn.x",))
    values = [own | {"attn.wo_b": lost, "attn.out": lost, "hc_ffn.x": v["hc_ffn.x"]} for own in values]
    assert "layers.1.attn.wo_b.sum" in compared(False, values, tmp_path)


def test_an_expert_that_no_rank_has_is_named() -> None:
    def rank(number: int, held: list[int]) -> dict[str, object]:
        facts = {"class": "RoutedExperts", "method": "M", "chose": [], "experts": held, "width": [0, 1]}
        return {"rank": number, "modules": {"model.layers.1.ffn.experts.routed_experts": facts}, "absent": []}

    def failing(second: list[int]) -> list[str]:
        run = EngineRun((), (), (rank(0, [0, 1, 2, 3]), rank(1, second)), {}, None, "")
        return [found.message for found in judge_walk(run) if found.verdict is Verdict.FAIL]

    assert failing([4, 5, 6, 7]) == []
    (message,) = failing([3, 5, 6, 7])
    assert "experts 3 and 4 are not on the ranks once each" in message


def test_a_vocabulary_is_cut_in_blocks() -> None:
    """2560 rows are 1280 on each of two; 100 rows are padded to 128, of which the second rank has 36 real ones."""
    assert [LayerShare(rank, 2).vocabulary(2560) for rank in (0, 1)] == [slice(0, 1280), slice(1280, 2560)]
    assert [LayerShare(rank, 2).vocabulary(100) for rank in (0, 1)] == [slice(0, 64), slice(64, 100)]
