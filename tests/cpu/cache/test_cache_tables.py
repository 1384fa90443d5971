"""A step's tables and the pool behind them: each row at the place that the layout's arithmetic says, and read back."""

import gc
from dataclasses import replace

import pytest
import torch
from support.checkpoints import SMALL

from ownpath.cache.layout import BLOCK_TOKENS, EntryKind, entry_row, ring_row
from ownpath.cache.pools import CachePool, CacheSpec, SequenceCache
from ownpath.cache.slots import CacheFull
from ownpath.cache.tables import StepTables
from ownpath.config import ModelConfig
from ownpath.model.batch import ForwardBatch

WINDOW = SMALL["sliding_window"]


def make_pool(
    device: torch.device,
    max_tokens: int = 700,
    max_sequences: int = 3,
    num_drafts: int = 0,
    rows_per_request: int = 1,
) -> CachePool:
    config = ModelConfig.from_dict(SMALL)
    spec = CacheSpec(config, max_tokens, torch.float32, device, num_drafts, max_sequences)
    return CachePool(replace(spec, rows_per_request=rows_per_request))


def scattered(pool: CachePool) -> tuple[SequenceCache, SequenceCache]:
    """Two sequences, one of them on blocks and a slot that another one had."""
    first, second, third = (pool.new_sequence() for _ in range(3))
    first.release()
    second.release()
    return third, pool.new_sequence()


@pytest.mark.parametrize(("rows_per_request", "spare"), [(1, 0), (2, 8), (9, 8)])
def test_rows_go_where_the_layout_says(rows_per_request: int, spare: int, device: torch.device) -> None:
    pool = make_pool(device, rows_per_request=rows_per_request)
    caches = scattered(pool)
    for num_rows in ((300, 1), (1, 40), (129, 1), (3, 500), (1, 1)):
        starts = [cache.num_tokens for cache in caches]
        tables = StepTables.of(caches, num_rows)
        assert tables.starts == tuple(starts)
        assert tables.row_ends == (num_rows[0], sum(num_rows))
        assert tables.slots_R.tolist() == [cache.slot for cache in caches]
        assert tables.blocks_RB.tolist() == [list(cache.blocks) for cache in caches]
        expected = [
            (cache, position, start + count)
            for cache, start, count in zip(caches, starts, num_rows, strict=True)
            for position in range(start, start + count)
        ]
        assert tables.positions_T.tolist() == [position for _, position, _ in expected]
        states = tables.writes.state_T
        rings = (WINDOW, tables.writes.window_T), (8, states[4]), (128, states[128])
        for size, found in ((size + spare, found) for size, found in rings):
            rows = [ring_row(c.slot, p, size) if p >= end - size else 0 for c, p, end in expected]
            assert found.tolist() == rows
        for ratio, found in tables.writes.entry_T.items():
            size = BLOCK_TOKENS // ratio
            rows = [entry_row(c.blocks, p // ratio, size) if (p + 1) % ratio == 0 else 0 for c, p, _ in expected]
            assert found.tolist() == rows
        tables.extend()
        assert [cache.num_tokens for cache in caches] == [a + b for a, b in zip(starts, num_rows, strict=True)]
        assert pool.slots.faults() == []


@pytest.mark.parametrize("rows_per_request", [1, 3])
def test_a_decode_steps_rows(rows_per_request: int, device: torch.device) -> None:
    """Each row has its request's slot and blocks, up to the last that the step writes to."""
    pool = make_pool(device, rows_per_request=rows_per_request)
    first, second = scattered(pool)
    StepTables.of([first, second], (254, 3)).extend()
    counts = 3, 1
    decode = StepTables.of([first, second], counts).decode
    assert StepTables.of([first, second], (4, 1)).decode is None
    if rows_per_request == 1:
        assert decode is None
        counts, decode = (1, 1), StepTables.of([first, second], (1, 1)).decode
    assert decode is not None
    rows = [
        (cache, cache.num_tokens + row)
        for cache, count in zip((first, second), counts, strict=True)
        for row in range(count)
    ]
    assert decode.positions_T.tolist() == [position for _, position in rows]
    assert decode.slots_T.tolist() == [cache.slot for cache, _ in rows]
    width = 2 if rows_per_request == 3 else 1
    assert decode.blocks_TB.tolist() == [list(cache.blocks[:width]) for cache, _ in rows]
    assert {one.dtype for one in (decode.positions_T, decode.slots_T, decode.blocks_TB)} == {torch.int32}


def test_a_row_is_written_to_one_place_of_its_own(device: torch.device) -> None:
    """Of all rows of a step, at most nobody's row is written more than once."""
    pool = make_pool(device)
    writes = StepTables.of([pool.new_sequence() for _ in range(3)], (300, 513, 1)).writes
    for rows_T in (writes.window_T, *writes.state_T.values(), *writes.entry_T.values()):
        numbers, counts = rows_T.unique(return_counts=True)
        assert set(numbers[counts > 1].tolist()) <= {0}


def test_a_sequence_twice_in_a_step_is_refused(device: torch.device) -> None:
    pool = make_pool(device)
    cache = pool.new_sequence()
    with pytest.raises(AssertionError, match="twice"):
        StepTables.of([cache, cache], (1, 1))
    with pytest.raises(AssertionError, match="different pools"):
        StepTables.of([cache, make_pool(device).new_sequence()], (1, 1))


def test_memory_of_sequences_does_not_meet(device: torch.device) -> None:
    """Each one's views, filled with its number, hold it still when all others are filled; nobody's rows stay."""
    pool = make_pool(device, num_drafts=1)
    for tensor in pool.tensors.values():
        tensor.fill_(-1)
    caches = [pool.new_sequence() for _ in range(3)]
    for number, cache in enumerate(caches):
        for memory in cache.views():
            memory.fill_(number)
    for number, cache in enumerate(caches):
        assert all((memory == number).all() for memory in cache.views())
    for member, tensor in pool.tensors.items():
        assert (tensor[: member.num_rows] == -1).all()
        assert (tensor[member.num_rows :] != -1).all()


def test_a_sequence_has_room_for_what_it_took(device: torch.device) -> None:
    """It grows block by block up to the longest sequence; tables of a step have one width whatever each row has."""
    pool = make_pool(device, max_tokens=700, max_sequences=2)
    first, second = pool.new_sequence(1), pool.new_sequence(257)
    assert [(len(one.blocks), one.max_tokens) for one in (first, second)] == [(1, 256), (2, 512)]
    with pytest.raises(ValueError, match="0 \\+ 257 tokens do not fit a cache of 256"):
        ForwardBatch.of([([1] * 257, first)], device)
    first.grow(700)
    assert (len(first.blocks), first.max_tokens) == (3, 700)
    tables = StepTables.of([second, first], (257, 600))
    assert tables.blocks_RB.tolist() == [[*second.blocks, 0], list(first.blocks)]
    small = CachePool(replace(pool.spec, cache_blocks=3))
    assert small.slots.num_blocks == 3
    whole = sum(tensor.numel() * tensor.element_size() for tensor in small.tensors.values())
    of_nobody = sum(member.num_rows * member.row_bytes(4, 4) for member in small.layout.members)
    assert small.spec.pool_bytes == whole - of_nobody
    one = small.new_sequence(513)
    assert len(one.blocks) == 3
    with pytest.raises(CacheFull, match="1 blocks are wanted, 0 of 3 are free"):
        small.new_sequence(1)
    assert {len(tensor) for member, tensor in small.tensors.items() if member.ratio == 4 and member.group.is_paged} == {
        4 * BLOCK_TOKENS // 4
    }


def test_entries_are_read_back_in_order(device: torch.device) -> None:
    """From blocks that do not follow each other, as many as windows are complete."""
    pool = make_pool(device)
    _, cache = scattered(pool)
    tables = StepTables.of([cache], [611])
    csa = SMALL["compress_ratios"].index(4)
    for part in EntryKind:
        layer = pool.layers[csa]
        entries = (layer.compressor if part is EntryKind.MAIN else layer.indexer).entries  # type: ignore[union-attr]
        entries[tables.writes.entry_T[4]] = torch.arange(611.0, device=device)[:, None].expand(-1, entries.shape[1])
    tables.extend()
    for part in EntryKind:
        found = cache.entries(csa, part)
        assert found is not None
        assert found[:, 0].tolist() == [4 * window + 3 for window in range(152)]
    assert cache.entries(SMALL["compress_ratios"].index(0)) is None


def test_a_dropped_handle_gives_its_place_back(device: torch.device) -> None:
    pool = make_pool(device, max_sequences=1)
    cache = pool.new_sequence()
    with pytest.raises(CacheFull):
        pool.new_sequence()
    slot = cache.slot
    del cache
    gc.collect()
    again = pool.new_sequence()
    assert again.slot == slot
    again.release()
    again.release()
    assert pool.slots.faults() == []
    assert not pool.slots.owned


def test_bytes_of_a_sequence_are_those_that_it_can_fill(device: torch.device) -> None:
    """Not those of whole blocks: the number that ``ownpath inspect`` reports."""
    pool = make_pool(device, max_tokens=300)
    cache = pool.new_sequence()
    per_entry = sum((300 // member.ratio) * member.width * 4 for member in pool.layout.members if member.group.is_paged)
    slots = sum(m.num_rows * m.width * 4 for m in pool.layout.members if not m.group.is_paged)
    assert cache.num_bytes() == per_entry + slots
