"""The rows that a step with chunks leaves in the rings, on the device: values, pages, prepared launches."""

from dataclasses import replace

import pytest
import torch

from ownpath.conformance.chunk_entries import ChunkWritingStep, draw_chunks, judge_rings, with_key_pages
from ownpath.kernels.chunk_entries.cases import CASES, ChunkEntriesCase
from ownpath.kernels.registry import KERNELS

pytestmark = pytest.mark.gpu

KERNEL = "triton.chunk_rings"
WIDE = [case for case in CASES if case.layer.sizes[0] == 512]


def run(step: ChunkWritingStep, operand: object) -> None:
    KERNELS[KERNEL].run(step.of_decode.raw, step.places, step.of_decode.pools, operand)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_values_and_prepared_launches(case: ChunkEntriesCase, cuda: torch.device) -> None:
    for spare in (0, 8):
        step = draw_chunks(case, cuda, spare=spare)
        operand = KERNELS[KERNEL].prepare(step.of_decode.weights)
        for _ in range(2):
            written = step.copy()
            run(written, operand)
            judge_rings(step, written)
        assert len(operand.launches) == 1


@pytest.mark.parametrize("case", WIDE, ids=lambda case: case.label)
def test_pages(case: ChunkEntriesCase, cuda: torch.device) -> None:
    step = with_key_pages(draw_chunks(case, cuda))
    written = step.copy()
    run(written, KERNELS[KERNEL].prepare(step.of_decode.weights))
    judge_rings(step, written)


def test_a_later_call_follows_its_inputs(cuda: torch.device) -> None:
    case = next(case for case in CASES if case.label == "csa mixed")
    step, other = draw_chunks(case, cuda), draw_chunks(case, cuda, seed=5)
    operand = KERNELS[KERNEL].prepare(step.of_decode.weights)
    other = replace(other, of_decode=replace(other.of_decode, weights=step.of_decode.weights))
    for given in (step, other):
        written = given.copy()
        run(written, operand)
        judge_rings(given, written)
    assert len(operand.launches) == 1
