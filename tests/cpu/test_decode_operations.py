"""The operations of a decode step's runners, checked as ``test_operations`` checks the others."""

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.indexer_cases import make_keys, make_query, make_rows

from ownpath.conformance.attend import make_attend_inputs
from ownpath.conformance.chunk_entries import ChunkWritingStep, draw_chunks
from ownpath.conformance.chunks import make_chunk_inputs
from ownpath.conformance.entries import WritingStep, draw_step
from ownpath.kernels.angles.types import Frequencies
from ownpath.kernels.attend.cases import CASES as ATTEND_CASES
from ownpath.kernels.chunk_entries.cases import CASES as CHUNK_ENTRIES_CASES
from ownpath.kernels.chunks.cases import CASES as CHUNK_CASES
from ownpath.kernels.entries.cases import CASES as ENTRIES_CASES
from ownpath.runners import (
    CacheEntries,
    ChunkAttention,
    ChunkEntries,
    ChunkRings,
    DecodeAttention,
    IndexScores,
    RotaryAngles,
    Select,
)
from ownpath.runners.decode_ops import DECODE_OPERATIONS

CPU = torch.device("cpu")
NAMES = [schema.partition("(")[0] for schema, _, _ in DECODE_OPERATIONS]
WRITING = [case for case in ENTRIES_CASES if case.tiny and "narrow" in case.label]
ATTENDING = [case for case in ATTEND_CASES if case.tiny and case.num_heads == 4 and not case.fp8]
CHUNKS = [case for case in CHUNK_CASES if case.tiny and case.num_heads == 4 and not case.fp8]

WRITING_CHUNKS = [case for case in CHUNK_ENTRIES_CASES if case.tiny and case.label in ("swa narrow", "csa narrow")]

Call = tuple[str, Any, tuple[Any, ...]]
"""Operation, runner, arguments of the runner."""


def flat(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns the arguments of the operation: the fields of named tuples one by one."""
    parts = [tuple(one) if isinstance(one, tuple) else (one,) for one in arguments]
    return tuple(part for group in parts for part in group)


def indexing() -> Iterator[Call]:
    g = torch.Generator().manual_seed(3)
    rows = make_rows([700, 3, 0, 1023], 4, 12, g)
    query, keys = make_query(4, 4, torch.bfloat16, g), make_keys(rows, 12, g)
    yield "index_scores", IndexScores(), (query, keys, rows)
    flags_T = torch.full((4,), 7, dtype=torch.int32)
    yield "select", Select(128), (torch.randn(4, 256, generator=g), rows, flags_T)


def turning() -> Iterator[Call]:
    frequencies = Frequencies(torch.rand(24), torch.rand(24))
    yield "step_angles", RotaryAngles(frequencies), (torch.tensor([0, 700, 3], dtype=torch.int32),)


def attending() -> Iterator[Call]:
    for case in ATTENDING:
        inputs = make_attend_inputs(case, 3, CPU)
        yield "decode_attention", DecodeAttention(inputs.weights), inputs.arguments[:5]


def attending_chunks() -> Iterator[Call]:
    for case in CHUNKS:
        chunk = make_chunk_inputs(case, CPU)
        yield "chunk_attention", ChunkAttention(chunk.weights), chunk.arguments[:5]


def writing_chunks() -> Iterator[Call]:
    for case in WRITING_CHUNKS:
        step = draw_chunks(case, CPU)
        yield "chunk_entries", ChunkEntries(step.of_decode.weights), step.arguments[:4]


def keeping() -> Iterator[tuple[ChunkRings, ChunkWritingStep]]:
    for case in WRITING_CHUNKS:
        step = draw_chunks(case, CPU)
        yield ChunkRings(step.of_decode.weights), step


def writing() -> Iterator[tuple[CacheEntries, WritingStep]]:
    for case in WRITING:
        step = draw_step(case, 5, CPU)
        yield CacheEntries(step.weights), step


def compiled(run: Any) -> Any:
    torch.compiler.reset()
    return torch.compile(lambda *args: run(*args), backend="aot_eager", fullgraph=True)


def tensors_of(found: Any) -> list[torch.Tensor]:
    """Returns the tensors of a result, those of named tuples inside it too."""
    if isinstance(found, torch.Tensor):
        return [found]
    return [tensor for one in found if one is not None for tensor in tensors_of(one)]


def opcheck(name: str, arguments: tuple[Any, ...]) -> None:
    with torch.inference_mode(False):
        outcomes = torch.library.opcheck(getattr(torch.ops.ownpath, name).default, arguments)
    assert set(outcomes.values()) == {"SUCCESS"}


CALLS = [*turning(), *indexing(), *attending(), *attending_chunks(), *writing_chunks()]


def test_every_operation_has_a_case() -> None:
    assert {name for name, _, _ in CALLS} | {"cache_entries", "chunk_rings"} == set(NAMES)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call[0])
def test_a_result_is_the_runners(call: Call) -> None:
    """By opcheck's rules; and a compiled call in one graph gives the same bits."""
    name, runner, arguments = call
    opcheck(name, (*flat(arguments), runner.handle))
    pairs = zip(tensors_of(compiled(runner)(*arguments)), tensors_of(runner(*arguments)), strict=True)
    assert all(torch.equal(found.nan_to_num(), expected.nan_to_num()) for found, expected in pairs)


@pytest.mark.parametrize(("runner", "step"), list(writing()), ids=[case.label for case in WRITING])
def test_writes_are_the_runners(runner: CacheEntries, step: WritingStep) -> None:
    """The pools are named in the schema as what the operation writes."""
    opcheck("cache_entries", (*flat((step.raw, step.angles, step.rows, step.copy().pools)), runner.handle))
    ours, theirs = step.copy(), step.copy()
    runner(step.raw, step.angles, step.rows, ours.pools)
    compiled(runner)(step.raw, step.angles, step.rows, theirs.pools)
    for found, expected in zip(theirs.pools, ours.pools, strict=True):
        if found is not None and expected is not None:
            assert torch.equal(found.nan_to_num(), expected.nan_to_num())
    assert not torch.equal(ours.pools.window.nan_to_num(), step.pools.window.nan_to_num())


@pytest.mark.parametrize(("runner", "step"), list(keeping()), ids=[case.label for case in WRITING_CHUNKS])
def test_what_is_kept_is_the_runners(runner: ChunkRings, step: ChunkWritingStep) -> None:
    """The rings are named in the schema as what the operation writes."""
    raw, pools = step.of_decode.raw, step.copy().of_decode.pools
    opcheck("chunk_rings", (*flat((raw, step.places, pools)), runner.handle))
    ours, theirs = (step.copy().of_decode.pools for _ in range(2))
    runner(raw, step.places, ours)
    compiled(runner)(raw, step.places, theirs)
    for found, expected in zip(theirs, ours, strict=True):
        if found is not None and expected is not None:
            assert torch.equal(found.nan_to_num(), expected.nan_to_num())
    assert not torch.equal(ours.window.nan_to_num(), step.of_decode.pools.window.nan_to_num())


def test_a_runner_that_is_gone_is_an_error() -> None:
    name, runner, arguments = next(indexing())
    handle = runner.handle
    del runner
    gc.collect()
    with pytest.raises(ValueError, match=f"ownpath has no runner {handle}: it was dropped"):
        getattr(torch.ops.ownpath, name)(*flat(arguments), handle)
