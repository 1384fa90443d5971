"""The choice of a tile for a call of the products with few rows of x."""

from itertools import pairwise

import pytest

from ownpath.kernels.plain.few_choose import MAX_CHUNKS, STEP, TILES, FewTile, choose_tile


def test_a_tile_holds_the_calls_that_it_serves() -> None:
    for most_tokens, _, tile in TILES:
        assert most_tokens <= tile.tokens
        if not isinstance(tile, FewTile):
            continue
        assert tile.live <= tile.rows
        assert tile.rows in ((16, 32) if tile.is_weight_first else (8, 16))
        assert tile.tokens in ((8, 16, 32, 64) if tile.is_weight_first else (16, 32, 64))


def test_the_table_is_in_order_and_starting_meets_every_tile() -> None:
    """Starting runs every power of two of rows: between two of them no tile may begin that compiles later."""
    keys = [(most_tokens, most_rows) for most_tokens, most_rows, _ in TILES]
    assert all(before < after for before, after in pairwise(keys))
    assert all(most_tokens & (most_tokens - 1) == 0 for most_tokens, _ in keys)


@pytest.mark.parametrize("width", [8, 32, 256, 264, 4096, 7168, 16384])
def test_the_steps_of_all_warps_cover_the_columns(width: int) -> None:
    for _, _, tile in TILES:
        warps, constants = tile.warps_for(width), tile.constants(width)
        assert warps & (warps - 1) == 0
        covered = constants["CHUNKS"] * (warps * STEP if isinstance(tile, FewTile) else constants["CHUNK"])
        assert covered >= width
        assert constants["UNEVEN"] == (covered != width)


def test_what_the_table_does_not_hold_is_the_librarys() -> None:
    most_tokens, most_rows, tile = max(TILES, key=lambda entry: entry[:2])
    assert isinstance(tile, FewTile)
    assert choose_tile(most_tokens, most_rows, 4096) is not None
    assert choose_tile(most_tokens + 1, most_rows, 4096) is None
    assert choose_tile(most_tokens, most_rows + 1, 4096) is None
    assert choose_tile(1, max(rows for _, rows, _ in TILES) + 1, 4096) is None
    assert choose_tile(most_tokens, most_rows, (MAX_CHUNKS + 1) * STEP * tile.warps) is None
    assert choose_tile(1, 129280, 4096) is None
