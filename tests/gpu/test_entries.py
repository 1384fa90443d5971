"""The cache writes of a decode step on the device: values, repetition, graphs, invariance, and the angles of a step."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from ownpath.conformance.entries import WritingStep, draw_step, judge_rounded, judge_step, with_pages
from ownpath.formats import KeyFormat
from ownpath.kernels.angles.launch import STEP_ANGLES
from ownpath.kernels.angles.ref import step_angles
from ownpath.kernels.angles.types import Frequencies
from ownpath.kernels.cases import KernelCase
from ownpath.kernels.entries.cases import CASES
from ownpath.kernels.entries.types import KeyRounding
from ownpath.kernels.registry import KERNELS
from ownpath.numerics import INDEX_FORMS

pytestmark = pytest.mark.gpu

KERNEL = "triton.entries"
BENCH = [case for case in CASES if case.bench]
RUNS = [(case, num_rows) for case in CASES for num_rows in (*case.tokens, 2)]


def label(value: Any) -> str:
    return value.label if isinstance(value, KernelCase) else str(value)


def bits(step: WritingStep) -> list[torch.Tensor]:
    return [one.view(torch.int16 if one.itemsize == 2 else torch.int32) for one in step.pools if one is not None]


def equal(a: WritingStep, b: WritingStep) -> bool:
    return all(torch.equal(x, y) for x, y in zip(bits(a), bits(b), strict=True))


@pytest.mark.parametrize(("case", "num_rows"), RUNS, ids=label)
def test_values_and_repetition(case: KernelCase, num_rows: int, cuda: torch.device) -> None:
    """Right, nothing else written, the same bits again, and no allocation in the call."""
    step, kernel = draw_step(case, num_rows, cuda, seed=num_rows), KERNELS[KERNEL]
    operand = kernel.prepare(step.weights)
    first = step.copy()
    kernel.run(*first.arguments[:4], operand)
    judge_step(step, first)
    for _ in range(5):
        again = step.copy()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        kernel.run(*again.arguments[:4], operand)
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
        assert equal(first, again)
    assert not operand.arrivals.any()


@pytest.mark.parametrize("case", BENCH, ids=label)
@pytest.mark.parametrize("num_rows", [1, 9, 130])
def test_one_graph_serves_every_position(case: KernelCase, num_rows: int, cuda: torch.device) -> None:
    """Captured where some windows end, replayed where others do, on other slots and blocks."""
    kernel, step = KERNELS[KERNEL], draw_step(case, num_rows, cuda)
    operand = kernel.prepare(step.weights)
    kernel.run(*step.copy().arguments[:4], operand)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel.run(*step.arguments[:4], operand)
    for seed in range(1, 5):
        other = replace(draw_step(case, num_rows, cuda, seed=seed), weights=step.weights)
        for part, fresh in zip(step.arguments[:4], other.arguments[:4], strict=True):
            for held, new in zip(part, fresh, strict=True):
                if held is not None and new is not None:
                    held.copy_(new)
        graph.replay()
        judge_step(other, step)


@pytest.mark.parametrize("case", BENCH, ids=label)
def test_a_row_does_not_depend_on_its_neighbours(case: KernelCase, cuda: torch.device) -> None:
    """Rows of a long step, whose entries fewer programs share, have the bits of a short one."""
    kernel, step = KERNELS[KERNEL], draw_step(case, 130, cuda)
    whole, short = step.copy(), step.first(3)
    before = short.copy()
    kernel(*whole.arguments)
    kernel(*short.arguments)
    for old, few, many in zip(bits(before), bits(short), bits(whole), strict=True):
        written = (old != few).any(1)
        assert torch.equal(few[written], many[written])


@pytest.mark.parametrize("case", BENCH, ids=label)
def test_roundings_to_fewer_bits(case: KernelCase, cuda: torch.device) -> None:
    step = draw_step(case, 33, cuda)
    fewer = replace(step.weights, keys=KeyRounding.FP8, index_keys=KeyRounding.FP4)
    plain, rounded = step.copy(), step.copy()
    KERNELS[KERNEL](*plain.arguments)
    KERNELS[KERNEL](*rounded.arguments[:4], fewer)
    judge_rounded(plain, replace(rounded, weights=fewer))


@pytest.mark.parametrize("case", BENCH, ids=label)
@pytest.mark.parametrize("index_keys", [KeyRounding.NONE, KeyRounding.FP4])
@pytest.mark.parametrize("index_format", INDEX_FORMS)
def test_pages(case: KernelCase, index_keys: KeyRounding, index_format: KeyFormat, cuda: torch.device) -> None:
    step = draw_step(case, 33, cuda)
    paged = replace(with_pages(step, index_format), weights=replace(step.weights, index_keys=index_keys))
    KERNELS[KERNEL](*step.arguments)
    KERNELS[KERNEL](*paged.arguments)
    judge_rounded(step, paged)


def test_angles_have_the_bits_of_torch(cuda: torch.device) -> None:
    frequencies = Frequencies(*(base ** (-torch.arange(32, device=cuda) / 32) for base in (1e4, 1.6e5)))
    short, long = torch.arange(3000, device=cuda), torch.randint(0, 1 << 20, (3000,), device=cuda)
    positions_T = torch.cat((short, long)).int()
    found = STEP_ANGLES.run(positions_T, STEP_ANGLES.prepare(frequencies))
    assert torch.equal(found, step_angles(positions_T, frequencies))
