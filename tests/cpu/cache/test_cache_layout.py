"""The caches' layout as arithmetic: sizes of the published models, and that no two things share a row."""

from dataclasses import replace

import pytest
from support.checkpoints import SMALL

from ownpath.cache.layout import (
    BLOCK_TOKENS,
    ENTRIES,
    MOST_ROWS_PER_REQUEST,
    STATE,
    WINDOW,
    CacheLayout,
    CacheTensor,
    EntryKind,
    entry_row,
    num_blocks,
    ring_row,
)
from ownpath.config import CSA_RATIO, HCA_RATIO, SLIDING, ModelConfig
from ownpath.formats import CacheFormat

FLASH = (SLIDING, SLIDING, *[CSA_RATIO, HCA_RATIO] * 20, CSA_RATIO)
"""V4-Flash: 2 sliding layers, 21 CSA, 20 HCA."""
PRO = (HCA_RATIO, *[CSA_RATIO, HCA_RATIO] * 30)


def layout(ratios: tuple[int, ...], cache_format: CacheFormat = CacheFormat.BF16) -> CacheLayout:
    sizes = {"head_dim": 512, "index_head_dim": 128, "sliding_window": 128}
    return CacheLayout.of(ModelConfig.from_dict(SMALL | sizes), ratios, cache_format)


@pytest.mark.parametrize(("ratios", "per_token"), [(FLASH, 6880), (PRO, 9848)], ids=["flash", "pro"])
def test_bytes_per_token_of_the_published_models(ratios: tuple[int, ...], per_token: int) -> None:
    """BF16 entries of 1024 B and index keys of 256 B; nothing else grows with the sequence."""
    sizes = [layout(ratios).num_bytes(num_tokens, itemsize=2, state_itemsize=4) for num_tokens in (0, 4096, 8192)]
    assert sizes[1] - sizes[0] == sizes[2] - sizes[1] == 4096 * per_token


def test_bytes_of_a_slot() -> None:
    """43 windows of 128 keys in BF16; float32 states of 21 CSA layers (8 rows of 2048 and of 512), 20 HCA (128)."""
    expected = 43 * 128 * 1024 + 4 * (21 * 8 * (2048 + 512) + 20 * 128 * 1024)
    assert layout(FLASH).num_bytes(0, itemsize=2, state_itemsize=4) == expected


@pytest.mark.parametrize(("cache_format", "index_bytes"), [(CacheFormat.FP8, 132), (CacheFormat.FP4_INDEX, 68)])
@pytest.mark.parametrize(("ratios", "num_csa", "num_hca"), [(FLASH, 21, 20), (PRO, 30, 31)], ids=["flash", "pro"])
def test_pages_of_the_published_models(
    ratios: tuple[int, ...], num_csa: int, num_hca: int, cache_format: CacheFormat, index_bytes: int
) -> None:
    """A block of 256 tokens: 64 entries and index keys of each CSA layer, 2 entries of each HCA layer."""
    per_block = num_csa * 64 * (584 + index_bytes) + num_hca * 2 * 584
    found = layout(ratios, cache_format)
    assert found.unit_bytes(2, 4, is_paged=True) == per_block
    assert found.num_bytes(4096, 2, 4) - found.num_bytes(0, 2, 4) == 16 * per_block
    plain = layout(ratios)
    assert (0.55 if index_bytes == 132 else 0.5) < per_block / plain.unit_bytes(2, 4, is_paged=True) < 0.57
    slots = plain.unit_bytes(2, 4, is_paged=False) - found.unit_bytes(2, 4, is_paged=False)
    assert slots == len(ratios) * 128 * (1024 - 584), "states are float32 in either format"


def test_members_of_each_kind_of_layer() -> None:
    window = CacheTensor(WINDOW, 0, EntryKind.MAIN, 128, 512)
    main = (CacheTensor(STATE, 0, EntryKind.MAIN, 8, 2048, 4), CacheTensor(ENTRIES, 0, EntryKind.MAIN, 64, 512, 4))
    index = (CacheTensor(STATE, 0, EntryKind.INDEX, 8, 512, 4), CacheTensor(ENTRIES, 0, EntryKind.INDEX, 64, 128, 4))
    hca = (CacheTensor(STATE, 0, EntryKind.MAIN, 128, 1024, 128), CacheTensor(ENTRIES, 0, EntryKind.MAIN, 2, 512, 128))
    assert layout((SLIDING,)).members == (window,)
    assert layout((CSA_RATIO,)).members == (window, *main, *index)
    assert layout((HCA_RATIO,)).members == (window, *hca)
    assert layout(FLASH).ratios == (4, 128)


@pytest.mark.parametrize(("num_tokens", "expected"), [(0, 0), (1, 1), (256, 1), (257, 2), (1_000_000, 3907)])
def test_blocks_of_a_sequence(num_tokens: int, expected: int) -> None:
    assert num_blocks(num_tokens) == expected


def test_the_example() -> None:
    assert entry_row((5, 9), 70, 64) == 582
    assert ring_row(2, 300, 128) == 300


@pytest.mark.parametrize("num_rows", [8, 128])
def test_a_ring_has_a_row_for_each_slot_and_position(num_rows: int) -> None:
    """Any ``num_rows`` positions in a row, of all slots: rows of their own, without a gap."""
    for start in (0, 1, 127, 1000):
        rows = [ring_row(slot, start + idx, num_rows) for slot in range(3) for idx in range(num_rows)]
        assert sorted(rows) == list(range(3 * num_rows))


@pytest.mark.parametrize("rows_per_request", [2, 4, MOST_ROWS_PER_REQUEST])
def test_rings_are_longer_where_a_request_has_several_rows(rows_per_request: int) -> None:
    """By one length for any number of rows; entries grow with tokens alone, and one row needs what it needed."""
    sizes = ModelConfig.from_dict(SMALL | {"sliding_window": 128})
    several = CacheLayout.of(sizes, FLASH, rows_per_request=rows_per_request)
    assert CacheLayout.of(sizes, FLASH, rows_per_request=1) == CacheLayout.of(sizes, FLASH)
    for member, one in zip(several.members, CacheLayout.of(sizes, FLASH).members, strict=True):
        spare = 0 if member.group.is_paged else 8
        assert member == replace(one, num_rows=one.num_rows + spare)
        assert spare >= rows_per_request - 1 or member.group.is_paged


@pytest.mark.parametrize("num_rows", [16, 136])
def test_a_step_replaces_nothing_that_its_rows_read(num_rows: int) -> None:
    """Nine rows from any position on: what they write is read neither by them, nor by rows that take their places."""
    seen = num_rows - 8
    for start in range(300, 300 + num_rows):
        written = {ring_row(1, start + row, num_rows) for row in range(MOST_ROWS_PER_REQUEST)}
        older = {ring_row(1, position, num_rows) for position in range(start + 1 - seen, start)}
        assert len(written) == MOST_ROWS_PER_REQUEST
        assert not written & older


@pytest.mark.parametrize("ratio", [CSA_RATIO, HCA_RATIO])
def test_entries_have_rows_of_their_own(ratio: int) -> None:
    per_block = BLOCK_TOKENS // ratio
    blocks = [(1, 4, 2), (6, 3)]
    rows = [entry_row(own, entry, per_block) for own in blocks for entry in range(len(own) * per_block)]
    assert sorted(rows) == list(range(per_block, 5 * per_block)) + list(range(6 * per_block, 7 * per_block))


def test_a_block_holds_whole_entries() -> None:
    assert all(BLOCK_TOKENS % ratio == 0 for ratio in (CSA_RATIO, HCA_RATIO))
