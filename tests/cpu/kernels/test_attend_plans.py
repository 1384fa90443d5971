"""The plans by which CTAs of Hopper's decode attention share a row's keys."""

import itertools

import pytest

from ownpath.kernels.attend.choose_sm90 import WHOLE, choose_plan
from ownpath.kernels.attend.config_sm90 import MAX_SPLITS, TILE_HEADS

NUM_SMS = 132
TILES = (2, 3, 4, 6, 10, 18, 66, 4098)
"""Of rows that see the window, and up to a million tokens more."""


@pytest.mark.parametrize("num_heads", [4, 64, 128])
def test_every_plan_fits_the_gpu_and_its_keys(num_heads: int) -> None:
    for num_rows, tiles, is_fp8 in itertools.product(range(1, 257), TILES, (False, True)):
        plan = choose_plan(num_rows, num_heads, tiles, NUM_SMS, is_fp8=is_fp8)
        assert 1 <= plan.splits <= min(tiles, MAX_SPLITS)
        if plan.splits > 1:
            assert plan.splits * num_rows * -(-num_heads // TILE_HEADS) <= NUM_SMS
        if plan.merges:
            assert plan.splits in (2, 3)


@pytest.mark.parametrize(("num_rows", "num_heads"), [(16, 64), (8, 128)])
@pytest.mark.parametrize("tiles", [10, 18])
def test_sixteen_programs_use_the_whole_gpu(num_rows: int, num_heads: int, tiles: int) -> None:
    """Measured: 22.5 us for 28.7 with 128 heads, 8 rows and FP8 pages, where four CTAs shared a row before."""
    for is_fp8 in (False, True):
        assert choose_plan(num_rows, num_heads, tiles, NUM_SMS, is_fp8=is_fp8) == (8, False)


def test_pages_are_split_for_longer() -> None:
    """Measured at 32 rows of 64 heads: FP8 24.6 us for 26.4 in clusters of three, BF16 20.8 for 20.0."""
    assert choose_plan(32, 64, 10, NUM_SMS, is_fp8=True) == (4, False)
    assert choose_plan(32, 64, 10, NUM_SMS, is_fp8=False) == (3, True)
    assert choose_plan(33, 64, 10, NUM_SMS, is_fp8=True).merges


@pytest.mark.parametrize("is_fp8", [False, True])
def test_two_tiles_are_one_ctas(is_fp8: bool) -> None:
    assert all(choose_plan(rows, 64, 2, NUM_SMS, is_fp8=is_fp8) == WHOLE for rows in range(1, 257))
