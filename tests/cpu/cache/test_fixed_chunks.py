"""Tables of chunks in fixed places: a step's own, and padding behind them, whatever was there before."""

import pytest
import torch
from support.checkpoints import SMALL

from ownpath.cache.chunks import ChunkTables
from ownpath.cache.fixed_chunks import PADDED, ChunkShape, FixedChunks
from ownpath.cache.layout import NOBODY
from ownpath.cache.pools import CachePool, CacheSpec
from ownpath.cache.tables import StepTables
from ownpath.cache.transfer import StepStaging
from ownpath.config import ModelConfig

CPU = torch.device("cpu")
SHAPE = ChunkShape(num_rows=320, num_requests=3, num_blocks=4)


@pytest.fixture
def pool() -> CachePool:
    return CachePool(CacheSpec(ModelConfig.from_dict(SMALL), 1000, torch.float32, CPU, max_sequences=3))


def test_steps_of_many_kinds(pool: CachePool) -> None:
    fixed, caches = FixedChunks(pool, SHAPE), [pool.new_sequence() for _ in range(3)]
    staging = StepStaging(fixed.num_words, CPU)
    for counts in ((320, 0, 0), (2, 300, 1), (0, 3, 0), (130, 1, 189)):
        present = [(cache, count) for cache, count in zip(caches, counts, strict=True) if count]
        tables = StepTables.of([cache for cache, _ in present], [count for _, count in present])
        assert SHAPE.holds(tables)
        fixed.send(tables, torch.arange(7, 7 + sum(counts)), staging)
        own, found = ChunkTables.of(tables), fixed.tables
        padding = (
            (fixed.token_ids_T, torch.arange(7, 7 + sum(counts)), PADDED),
            (found.positions_T, own.positions_T, 0),
            (found.places_T, own.places_T, 0),
            (found.requests_T, own.requests_T, SHAPE.num_requests),
            (found.sources_W, own.sources_W, 0),
            (found.slots_R, own.slots_R, NOBODY),
            *((ends, own.ends[ratio], PADDED) for ratio, ends in found.ends.items()),
        )
        for array, expected, padded in padding:
            assert array.tolist() == [*expected.tolist(), *[padded] * (len(array) - len(expected))]
        blocks_RB = torch.zeros(SHAPE.num_requests + 1, SHAPE.num_blocks, dtype=torch.int32)
        blocks_RB[: len(present), : own.blocks_RB.shape[1]] = own.blocks_RB
        assert torch.equal(found.blocks_RB, blocks_RB)
        tables.extend()


def test_a_step_that_does_not_fit(pool: CachePool) -> None:
    caches = [pool.new_sequence() for _ in range(3)]
    for parts, shape in (([321], SHAPE), ([1, 1, 1], SHAPE._replace(num_requests=2)), ([257], (320, 3, 1))):
        assert not ChunkShape(*shape).holds(StepTables.of(caches[: len(parts)], parts))
