"""The choice of kernels: every shape gets one that fits, and its tiles cover the work exactly."""

from types import SimpleNamespace
from typing import Any

import pytest

from ownpath.kernels.nvfp4.choose import SMS, WIDE_PAIRS, choose_linear, choose_moe
from ownpath.kernels.nvfp4.config import MAX_SHARED_BYTES, GemmConfig
from ownpath.kernels.nvfp4.moe import nvfp4_moe
from ownpath.kernels.nvfp4.moe_sliced_config import MAX_SLICED_PAIRS, SlicedConfig, fits_slices

SHAPES = ((1536, 4096), (32768, 1024), (4096, 8192), (4096, 4096), (4096, 2048), (64, 128), (192, 384), (640, 256))


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 8, 9, 16, 33, 64, 65, 128, 129, 255, 512, 513, 1024, 4096, 6144, 8192])
@pytest.mark.parametrize("shape", SHAPES)
def test_dense_tiles_cover_the_work(num_tokens: int, shape: tuple[int, int], invariant: bool) -> None:
    choice = choose_linear(num_tokens, *shape, invariant)
    config = choice.gemm
    assert shape[0] % (64 * config.m64_per_tile) == 0
    assert shape[1] % (128 * config.warpgroups_k * config.cluster_k) == 0
    assert choice.rows_per_tile % 8 == 0
    assert choice.rows_per_tile <= config.n_sizes[-1]
    assert config.smem_bytes <= MAX_SHARED_BYTES
    assert config.num_stages >= 2
    tiles = shape[0] // (64 * config.m64_per_tile) * -(-num_tokens // choice.rows_per_tile)
    if config.reduces:
        assert choice.grid == tiles * config.cluster_k
        assert not invariant
    else:
        assert choice.grid == min(tiles, SMS)


@pytest.mark.parametrize("pairs", [1, 6, 48, 384, 1536, 6144, 24576, 49152])
@pytest.mark.parametrize("dims", [(256, 4096, 2048), (384, 7168, 3072), (8, 256, 256), (3, 128, 384), (1, 640, 128)])
def test_experts_tiles_divide_the_rows(pairs: int, dims: tuple[int, int, int]) -> None:
    num_experts, hidden, inter = dims
    choice = choose_moe(pairs, num_experts, hidden, inter, invariant=False)
    assert 2 * inter % (64 * choice.gate_up.m64_per_tile) == 0
    assert hidden % (64 * choice.down.m64_per_tile) == 0
    assert choice.gate_up.n_sizes == choice.down.n_sizes
    assert choice.gate_up.swiglu
    assert not choice.down.swiglu
    for config in (choice.gate_up, choice.down):
        assert config.smem_bytes <= MAX_SHARED_BYTES
        assert config.num_stages >= 2


def test_nothing_that_changes_bits_follows_the_batch_when_invariant() -> None:
    """K is summed by one warpgroup in ascending order in all of them, and outputs stay float32 until summed."""
    for pairs in (1, 48, 6144, 49152):
        choice = choose_moe(pairs, 256, 4096, 2048, invariant=True)
        assert choice.down.wide
        assert not choice.down.reduces
        assert not choice.gate_up.reduces


def test_slices_are_whole_stages() -> None:
    assert fits_slices(4096, 2048)
    assert fits_slices(7168, 3072)
    assert not fits_slices(4096 + 256, 2048), "down has stages for both CTAs"
    assert not fits_slices(4096, 2048 + 32)


def test_slices_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="shared memory"):
        SlicedConfig(1, 6, 4)
    with pytest.raises(ValueError, match="1 to 8 tokens"):
        SlicedConfig(9, 2, 1)


def test_slices_are_for_few_pairs_and_not_for_invariant_plans() -> None:
    """Their sums have another order than those of the products of more pairs."""
    assert choose_moe(6, 256, 4096, 2048, invariant=False).sliced
    assert not choose_moe(6, 256, 4096, 2048, invariant=True).sliced
    assert not choose_moe(6, 256, 4096 + 128, 2048, invariant=False).sliced
    for pairs in (MAX_SLICED_PAIRS + 1, 48, 384):
        assert not choose_moe(pairs, 4096, 4096, 2048, invariant=False).sliced


def test_a_kernel_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="shared memory"):
        GemmConfig(2, 2, 1, (128,), 9)
    with pytest.raises(ValueError, match="along K"):
        GemmConfig(1, 2, 2, (8,), 2)


@pytest.mark.parametrize("num_tokens", [1, 8, 64, 512, 8192])
def test_pairs_of_experts_elsewhere_do_not_count(num_tokens: int) -> None:
    """A rank of two with half the experts and all tokens, half of whose pairs are its own, runs what it would for
    half the tokens; the form of the outputs follows all pairs, so that every rank has the same."""
    held: Any = SimpleNamespace(num_experts=128, hidden=4096, inter=2048)
    here = nvfp4_moe.choose(num_tokens * 6, held)
    over_ranks = nvfp4_moe.choose(2 * num_tokens * 6, held, num_ids=256)
    assert over_ranks.gate_up == here.gate_up
    assert over_ranks.sliced == here.sliced
    assert over_ranks.is_wide == (2 * num_tokens * 6 <= WIDE_PAIRS)
