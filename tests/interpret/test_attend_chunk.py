"""Attention over chunks in Triton and Gluon, interpreted: values, what a row's bits depend on, refusals."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from ownpath.conformance.chunks import ChunkInputs, judge_chunk, make_chunk_inputs
from ownpath.kernels.chunks import launch
from ownpath.kernels.chunks.cases import CASES, ChunkCase
from ownpath.kernels.chunks.launch import ATTEND_CHUNK, ATTEND_CHUNK_HOPPER, HOPPER_HEADS
from ownpath.kernels.chunks.ref import ATTEND_CHUNK as TWIN

CPU = torch.device("cpu")
TINY = {case.label: case for case in CASES if case.tiny}
KERNELS = {"triton": ATTEND_CHUNK, "hopper": ATTEND_CHUNK_HOPPER, "twin": TWIN}
CALLS = [
    (name, case)
    for case in TINY.values()
    for name in KERNELS
    if name != "hopper" or case.num_heads >= HOPPER_HEADS  # fewer heads have Triton's form
]


def run_poisoned(kernel: Any, inputs: ChunkInputs) -> torch.Tensor:
    """A call whose output was full of NaN."""
    out = torch.full_like(inputs.q_TNH, torch.nan)
    return kernel.run(*inputs.arguments[:5], kernel.prepare(inputs.weights), out=out)


@pytest.mark.parametrize(("name", "case"), CALLS, ids=lambda value: getattr(value, "label", value))
def test_values(name: str, case: ChunkCase) -> None:
    inputs = make_chunk_inputs(case, CPU)
    judge_chunk(run_poisoned(KERNELS[name], inputs), inputs)


def test_a_maximum_where_nothing_bounds_the_scores() -> None:
    inputs = make_chunk_inputs(TINY["flash CSA bf16"], CPU)
    assert inputs.weights.is_bounded
    inputs = replace(inputs, weights=replace(inputs.weights, largest_norm=math.inf))
    assert not inputs.weights.is_bounded
    judge_chunk(run_poisoned(ATTEND_CHUNK_HOPPER, inputs), inputs)


@pytest.mark.parametrize(("ratio", "fp8"), [(0, False), (4, False), (4, True), (128, False)])
def test_a_program_takes_rows_in_turn(ratio: int, fp8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One program for rows of two requests: buffers and barriers go on from row to row."""
    monkeypatch.setattr(launch, "NUM_SMS", 1)
    case = ChunkCase("rows in turn", 64, ratio, 130 if ratio == 0 else 300, 8, rows=(2, 1), fp8=fp8)
    inputs = make_chunk_inputs(case, CPU)
    judge_chunk(run_poisoned(ATTEND_CHUNK_HOPPER, inputs), inputs)
