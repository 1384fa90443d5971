"""Attention over chunks in Triton and Gluon, interpreted: values, what a row's bits depend on, refusals."""

from typing import Any

import pytest
import torch

from ownpath.conformance.chunks import ChunkInputs, judge_chunk, make_chunk_inputs
from ownpath.kernels.chunks.cases import CASES, ChunkCase
from ownpath.kernels.chunks.launch import ATTEND_CHUNK, ATTEND_CHUNK_HOPPER
from ownpath.kernels.chunks.ref import ATTEND_CHUNK as TWIN

CPU = torch.device("cpu")
TINY = {case.label: case for case in CASES if case.tiny}
CSA, HCA = TINY["embedded CSA bf16"], TINY["embedded HCA fp8"]


def run_poisoned(kernel: Any, inputs: ChunkInputs) -> torch.Tensor:
    """A call whose output was full of NaN."""
    out = torch.full_like(inputs.q_TNH, torch.nan)
    return kernel.run(*inputs.arguments[:5], kernel.prepare(inputs.weights), out=out)


@pytest.mark.parametrize("case", TINY.values(), ids=lambda case: case.label)
@pytest.mark.parametrize("kernel", [ATTEND_CHUNK, ATTEND_CHUNK_HOPPER, TWIN], ids=["triton", "hopper", "twin"])
def test_values(kernel: Any, case: ChunkCase) -> None:
    inputs = make_chunk_inputs(case, CPU)
    judge_chunk(run_poisoned(kernel, inputs), inputs)
