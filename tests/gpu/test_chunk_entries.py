"""Writes of a step with chunks before it attends, on the device: values, pages, repetition, prepared launches."""

from dataclasses import replace

import pytest
import torch

from ownpath.conformance.chunk_entries import (
    ChunkWritingStep,
    draw_chunks,
    judge_entries,
    judge_near,
    with_absent_ends,
    with_key_pages,
)
from ownpath.conformance.entries import judge_rounded
from ownpath.kernels.chunk_entries.cases import CASES, ChunkEntriesCase
from ownpath.kernels.entries.types import EntryAngles, KeyRounding
from ownpath.kernels.registry import KERNELS

pytestmark = pytest.mark.gpu

KERNEL = "triton.chunk_entries"
WIDE = [case for case in CASES if case.layer.sizes[0] == 512]


def bits(step: ChunkWritingStep) -> list[torch.Tensor]:
    return [one.view(torch.uint8) for one in step.of_decode.pools if one is not None]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_values_and_repetition(case: ChunkEntriesCase, cuda: torch.device) -> None:
    """Right, nothing else written, and the same bits again by the prepared launch."""
    for spare in (0, 8):
        step, kernel = draw_chunks(case, cuda, spare=spare), KERNELS[KERNEL]
        operand = kernel.prepare(step.of_decode.weights)
        first = step.copy()
        judge_near(kernel.run(*first.arguments[:4], operand), step)
        judge_entries(step, first)
        for _ in range(3):
            again = with_absent_ends(step.copy())
            judge_near(kernel.run(*again.arguments[:4], operand), step)
            assert all(torch.equal(x, y) for x, y in zip(bits(first), bits(again), strict=True))
        assert not operand.scratch.arrivals.any()


@pytest.mark.parametrize("case", WIDE, ids=lambda case: case.label)
def test_pages(case: ChunkEntriesCase, cuda: torch.device) -> None:
    step = draw_chunks(case, cuda)
    paged = with_key_pages(step.copy())
    KERNELS[KERNEL](*step.arguments)
    judge_near(KERNELS[KERNEL](*paged.arguments), paged)
    judge_rounded(step.of_decode, paged.of_decode)


@pytest.mark.parametrize("kind", ["csa", "hca"])
def test_decode_steps_write_the_same_bits(kind: str, cuda: torch.device) -> None:
    """Of entries, rounded as official numerics do: in steps of up to 9 rows, on the rings that those before left."""
    layer = next(case.layer for case in CASES if case.label == f"{kind} 1024")
    chunk = draw_chunks(ChunkEntriesCase(kind, layer, (1, 120, 250), (135, 9, 8)), cuda)
    weights = replace(chunk.of_decode.weights, keys=KeyRounding.FP8, index_keys=KeyRounding.FP4)
    chunk = replace(chunk, of_decode=replace(chunk.of_decode, weights=weights))
    steps = chunk.copy().of_decode
    rows_E, cos_EF, sin_EF = chunk.ends
    assert rows_E is not None
    firsts = [torch.zeros(chunk.num_rows, 32, device=cuda) for _ in range(2)]
    for whole, of_ends in zip(firsts, (cos_EF, sin_EF), strict=True):
        whole[rows_E.long()] = of_ends
    steps = replace(steps, angles=EntryAngles(*steps.angles[:2], *firsts))
    for start in (*range(0, 135, 9), 135, 144):
        stop = min(start + 9, chunk.num_rows)
        KERNELS["triton.entries"](*steps.part(slice(start, stop)).arguments)
    KERNELS[KERNEL](*chunk.arguments)
    for one, other in zip(chunk.of_decode.compressors, steps.compressors, strict=True):
        assert torch.equal(one.entries.view(torch.int16), other.entries.view(torch.int16))


def test_a_later_call_follows_its_inputs(cuda: torch.device) -> None:
    case = next(case for case in CASES if case.label == "hca mixed")
    step, other = draw_chunks(case, cuda), draw_chunks(case, cuda, seed=5)
    operand = KERNELS[KERNEL].prepare(step.of_decode.weights)
    other = replace(other, of_decode=replace(other.of_decode, weights=step.of_decode.weights))
    for given in (step, other):
        written = given.copy()
        judge_near(KERNELS[KERNEL].run(*written.arguments[:4], operand), given)
        judge_entries(given, written)
    assert len(operand.launches) == 1
