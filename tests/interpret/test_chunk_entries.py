"""Writes of a step with chunks before it attends, interpreted, against float64; its twin by the same judge."""

from collections.abc import Callable
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
from ownpath.kernels.chunk_entries.launch import CHUNK_ENTRIES
from ownpath.kernels.chunk_entries.types import EndingRows
from ownpath.kernels.entries.types import EntryAngles, KeyRounding
from ownpath.kernels.registry import KERNELS

CPU = torch.device("cpu")
NAMES = ("triton.chunk_entries", "ref.chunk_entries")
TINY = {case.label: case for case in CASES if case.tiny}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", TINY.values(), ids=lambda case: case.label)
def test_what_is_written(name: str, case: ChunkEntriesCase) -> None:
    """Every element, nothing else, and nothing read that is not the row's own: that is NaN. In rings of both
    lengths, where they are short enough to interpret."""
    for spare in (0, 8) if "narrow" in case.label else (8,):
        step = draw_chunks(case, CPU, spare=spare)
        written = step.copy()
        judge_near(KERNELS[name](*written.arguments), step)
        judge_entries(step, written)


@pytest.mark.parametrize("name", NAMES)
def test_ends_that_do_not_happen_write_nothing(name: str) -> None:
    step = draw_chunks(TINY["csa narrow"], CPU)
    written = step.copy()
    judge_near(KERNELS[name](*with_absent_ends(written).arguments), step)
    judge_entries(step, written)


@pytest.mark.parametrize("name", NAMES)
def test_pages(name: str) -> None:
    """Keys of the ring are read from pages, the step's own rounded as they will be there; entries are written to
    pages."""
    step = draw_chunks(TINY["csa"], CPU)
    paged = with_key_pages(step.copy())
    KERNELS[name](*step.arguments)
    judge_near(KERNELS[name](*paged.arguments), paged)
    judge_rounded(step.of_decode, paged.of_decode)


@pytest.mark.parametrize("label", ["csa narrow", "hca narrow"])
def test_decode_steps_write_the_same_bits(label: str) -> None:
    """Of entries, rounded as official numerics do: in steps of up to 9 rows, on the rings that those before left."""
    case = ChunkEntriesCase(label, TINY[label].layer, (1, 120), (13, 9))
    chunk = draw_chunks(case, CPU)
    weights = replace(chunk.of_decode.weights, keys=KeyRounding.FP8, index_keys=KeyRounding.FP4)
    chunk = replace(chunk, of_decode=replace(chunk.of_decode, weights=weights))
    steps = chunk.copy().of_decode
    rows_E, cos_EF, sin_EF = chunk.ends
    firsts = [torch.zeros(chunk.num_rows, angle.shape[1]) for angle in (cos_EF, sin_EF)]
    for whole, of_ends in zip(firsts, (cos_EF, sin_EF), strict=True):
        whole[rows_E] = of_ends
    steps = replace(steps, angles=EntryAngles(*steps.angles[:2], *firsts))
    for start, stop in ((0, 9), (9, 13), (13, 22)):
        KERNELS["triton.entries"](*steps.part(slice(start, stop)).arguments)
    KERNELS["triton.chunk_entries"](*chunk.arguments)
    for one, other in zip(chunk.of_decode.compressors, steps.compressors, strict=True):
        assert bool((~one.entries.isnan()).any())
        assert torch.equal(one.entries.view(torch.int16), other.entries.view(torch.int16))


def test_a_prepared_operand_serves_every_step() -> None:
    """Counters of shared entries are clear after each step; there is room for as many as one has."""
    operand = None
    for starts, counts in (((126,), (2,)), ((127, 127), (1, 1)), ((3,), (2,))):
        step = draw_chunks(ChunkEntriesCase("hca", TINY["hca narrow"].layer, starts, counts), CPU)
        operand = operand or CHUNK_ENTRIES.prepare(step.of_decode.weights)
        step = replace(step, of_decode=replace(step.of_decode, weights=operand.weights))
        written = step.copy()
        judge_near(CHUNK_ENTRIES.run(*written.arguments[:4], operand), step)
        judge_entries(step, written)
        assert not operand.scratch.arrivals.any()
    assert operand is not None
    assert len(operand.scratch.arrivals) == 2


def _places(**changes: object) -> Callable[[ChunkWritingStep], ChunkWritingStep]:
    return lambda step: replace(step, places=step.places._replace(**changes))


REFUSED: tuple[tuple[str, Callable[[ChunkWritingStep], ChunkWritingStep]], ...] = (
    ("rows_E", lambda step: replace(step, ends=EndingRows())),
    ("sin_EF", lambda step: replace(step, ends=step.ends._replace(sin_EF=None))),
    ("cos_EF", lambda step: replace(step, ends=step.ends._replace(cos_EF=step.ends.cos_EF[1:]))),
    ("requests_T", _places(requests_T=torch.zeros(3, dtype=torch.int32))),
    ("blocks_RB", _places(blocks_RB=torch.zeros(1, 1, dtype=torch.int32))),
    ("sources_W", _places(sources_W=torch.zeros(3))),
    ("main_state", lambda step: step.on(step.of_decode.pools._replace(main_state=None))),
    ("window", lambda step: step.on(step.of_decode.pools._replace(window=step.of_decode.pools.window[1:]))),
)


@pytest.mark.parametrize(("named", "change"), REFUSED, ids=[name for name, _ in REFUSED])
def test_what_does_not_fit_is_refused_by_name(
    named: str, change: Callable[[ChunkWritingStep], ChunkWritingStep]
) -> None:
    step = draw_chunks(TINY["csa narrow"], CPU)
    named = "main compressor" if named == "main_state" else named
    with pytest.raises(ValueError, match=named):
        CHUNK_ENTRIES(*change(step).arguments)
