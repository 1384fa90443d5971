"""Attention of chunks on the device: values, repetition, graphs, what a row's bits depend on."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from ownpath.bench.attend_chunk import judged_rows
from ownpath.conformance.attend import assert_attention
from ownpath.conformance.chunks import ChunkInputs, exact_chunk, judge_chunk, make_chunk_inputs
from ownpath.kernels.chunks.cases import CASES, ChunkCase
from ownpath.kernels.registry import KERNELS

pytestmark = pytest.mark.gpu

NAMES = ("gluon.attend_chunk", "triton.attend_chunk")
SMALL = [case for case in CASES if not case.bench]
LARGE = [case for case in CASES if case.bench and sum(case.rows) <= 1024]
MIXED = [case for case in CASES if "mixed" in case.label]


def label(value: Any) -> str:
    return value.label if isinstance(value, ChunkCase) else str(value)


def unbounded(inputs: ChunkInputs) -> ChunkInputs:
    """The same, where nothing is known of the keys' norms."""
    return replace(inputs, weights=replace(inputs.weights, largest_norm=math.inf))


def run(name: str, inputs: ChunkInputs) -> torch.Tensor:
    """A call whose output was full of NaN."""
    out = torch.full(inputs.q_TNH.shape, torch.nan, dtype=torch.bfloat16, device=inputs.q_TNH.device)
    found: torch.Tensor = KERNELS[name].run(*inputs.arguments[:5], KERNELS[name].prepare(inputs.weights), out=out)
    return found


@pytest.mark.parametrize("case", SMALL, ids=label)
def test_values(case: ChunkCase, cuda: torch.device) -> None:
    """Of every row, with the norm of official numerics, and with a running maximum."""
    inputs = make_chunk_inputs(case, cuda)
    assert inputs.weights.is_bounded
    stepwise = replace(inputs, weights=replace(inputs.weights, is_stepwise=True))
    for given in (inputs, stepwise, unbounded(inputs), unbounded(stepwise)):
        exact = exact_chunk(given)
        for name in NAMES:
            assert_attention(run(name, given), exact, name)


@pytest.mark.parametrize("case", LARGE, ids=label)
def test_values_of_whole_chunks(case: ChunkCase, cuda: torch.device) -> None:
    """Of the first rows and the last; the others are those of the other kernel, but for two roundings."""
    inputs = make_chunk_inputs(case, cuda)
    found = {name: run(name, inputs) for name in NAMES}
    for name, result in found.items():
        assert result.isfinite().all(), name
        for of in judged_rows(inputs):
            judge_chunk(result[of], inputs.part(of))
    one, other = (result.float() for result in found.values())
    assert float((one - other).norm() / other.norm()) < 5e-3


@pytest.mark.parametrize("ratio", [0, 4, 128])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("num_heads", [4, 64])
def test_every_length(num_heads: int, ratio: int, fp8: bool, cuda: torch.device) -> None:
    """A text of 700 tokens, so every residue modulo 4, 64, 128 and 256."""
    case = ChunkCase("lengths", num_heads, ratio, 700, 128 if ratio == 4 else 0, rows=(700,), fp8=fp8)
    inputs = make_chunk_inputs(case, cuda)
    exact = exact_chunk(inputs)
    for name in NAMES:
        for given in (inputs, unbounded(inputs)):
            assert_attention(run(name, given), exact, name)


@pytest.mark.parametrize("norm", [32.0, math.inf], ids=["bounded", "maximum"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", MIXED, ids=label)
def test_a_row_does_not_depend_on_its_neighbours(name: str, case: ChunkCase, norm: float, cuda: torch.device) -> None:
    """Nor on their number, nor on the width of the tables; and the same call again gives the same bits."""
    inputs = make_chunk_inputs(case, cuda)
    inputs = replace(inputs, weights=replace(inputs.weights, largest_norm=norm))
    whole = run(name, inputs)
    for of in (slice(1), slice(5, 70), slice(200, None)):
        assert torch.equal(run(name, inputs.part(of)), whole[of])
    wider = torch.cat((inputs.rows.blocks_RB, torch.full_like(inputs.rows.blocks_RB, 2**30)), dim=1)
    assert torch.equal(run(name, replace(inputs, rows=inputs.rows._replace(blocks_RB=wider))), whole)
    for _ in range(3):
        assert torch.equal(run(name, inputs), whole)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", MIXED, ids=label)
def test_a_later_call_is_the_first_one(name: str, case: ChunkCase, cuda: torch.device) -> None:
    """Prepared launches follow their inputs, allocate nothing where the output is given, and run in a graph."""
    kernel, inputs = KERNELS[name], make_chunk_inputs(case, cuda)
    operand, out = kernel.prepare(inputs.weights), torch.empty_like(inputs.q_TNH)
    kernel.run(*inputs.arguments[:5], operand, out=out)
    other = make_chunk_inputs(case, cuda, seed=1)
    other = replace(other, weights=inputs.weights)
    wanted = run(name, other)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    found = kernel.run(*other.arguments[:5], operand, out=out)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert torch.equal(found, wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel.run(*other.arguments[:5], operand, out=out)
    out.fill_(torch.nan)
    graph.replay()
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("ratio", [4, 128])
def test_scores_at_the_bound(ratio: int, fp8: bool, cuda: torch.device) -> None:
    """Keys as long as the bound allows, all near one query or far from it: scores near both of its ends."""
    case = ChunkCase("bound", 64, ratio, 9000, 512 if ratio == 4 else 0, rows=(70,), fp8=fp8)
    inputs = make_chunk_inputs(case, cuda)
    g = torch.Generator(cuda).manual_seed(3)
    ray = torch.randn(512, generator=g, device=cuda).bfloat16()
    signs = torch.where(torch.arange(64, device=cuda) % 2 == 0, 1.0, -1.0).bfloat16()
    q_TNH = (signs[:, None] * ray).expand_as(inputs.q_TNH).contiguous()
    near_WH = (inputs.keys.near_WH + 2.5 * ray).contiguous()
    longest = 66.0
    assert float(near_WH.nan_to_num().float().norm(dim=1).max()) < longest
    weights = replace(inputs.weights, largest_norm=longest)
    given = replace(inputs, q_TNH=q_TNH, keys=inputs.keys._replace(near_WH=near_WH), weights=weights)
    assert weights.is_bounded
    exact = exact_chunk(given)
    for one in (given, unbounded(given)):
        assert_attention(run(NAMES[0], one), exact, NAMES[0])
