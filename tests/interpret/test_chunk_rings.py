"""The rows that a step with chunks leaves in the rings, interpreted, bit for bit; its twin by the same judge."""

from collections.abc import Callable

import pytest
import torch

from ownpath.conformance.chunk_entries import ChunkWritingStep, draw_chunks, judge_rings, with_key_pages
from ownpath.kernels.chunk_entries.cases import CASES, ChunkEntriesCase
from ownpath.kernels.chunk_entries.rings import CHUNK_RINGS
from ownpath.kernels.registry import KERNELS

CPU = torch.device("cpu")
NAMES = ("triton.chunk_rings", "ref.chunk_rings")
TINY = {case.label: case for case in CASES if case.tiny}


def rings_of(step: ChunkWritingStep) -> tuple[object, ...]:
    return step.of_decode.raw, step.places, step.of_decode.pools, step.of_decode.weights


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", TINY.values(), ids=lambda case: case.label)
def test_the_last_rows_are_kept(name: str, case: ChunkEntriesCase) -> None:
    for spare in (0, 8):
        step = draw_chunks(case, CPU, spare=spare)
        written = step.copy()
        KERNELS[name](*rings_of(written))
        judge_rings(step, written)


@pytest.mark.parametrize("name", NAMES)
def test_more_rows_than_a_ring_has(name: str) -> None:
    """Of two requests: the first has a row more than its ring, so that its first row is not kept."""
    step = draw_chunks(ChunkEntriesCase("hca", TINY["hca narrow"].layer, (5, 130), (137, 3)), CPU)
    written = step.copy()
    KERNELS[name](*rings_of(written))
    judge_rings(step, written)


@pytest.mark.parametrize("name", NAMES)
def test_pages(name: str) -> None:
    step = with_key_pages(draw_chunks(TINY["csa"], CPU))
    written = step.copy()
    KERNELS[name](*rings_of(written))
    judge_rings(step, written)


REFUSED: tuple[tuple[str, Callable[[ChunkWritingStep], ChunkWritingStep]], ...] = (
    ("window", lambda step: step.on(step.of_decode.pools._replace(window=step.of_decode.pools.window[1:]))),
    ("main compressor", lambda step: step.on(step.of_decode.pools._replace(main_state=None))),
)


@pytest.mark.parametrize(("named", "change"), REFUSED, ids=[name for name, _ in REFUSED])
def test_what_does_not_fit_is_refused_by_name(
    named: str, change: Callable[[ChunkWritingStep], ChunkWritingStep]
) -> None:
    with pytest.raises(ValueError, match=named):
        CHUNK_RINGS(*rings_of(change(draw_chunks(TINY["csa narrow"], CPU))))
