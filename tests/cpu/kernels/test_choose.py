"""The choice of kernels: every shape gets one that fits, and its tiles cover the work exactly."""

from dataclasses import replace

import pytest

from ownpath.kernels.nvfp4.choose import SMS, choose_linear, choose_moe
from ownpath.kernels.nvfp4.config import MAX_SHARED_BYTES, GemmConfig
from ownpath.kernels.nvfp4.sliced_config import SlicedConfig

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
    tile = SlicedConfig(8, 128, 2, 5, 3, 2)
    assert tile.fits(4096, 2048)
    assert tile.fits(7168, 3072)
    assert not tile.fits(4096 + 128, 2048), "a stage of gate and up has 256 columns"
    assert not tile.fits(4096, 2048 + 64)
    assert not tile.fits(128, 128), "down has stages for both CTAs"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_stages": 9}, "shared memory"),
        ({"cluster": 1}, "need a cluster"),
        ({"width": 96}, "slices have"),
        ({"tokens": 9}, "slices have"),
    ],
)
def test_slices_that_do_not_fit_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SlicedConfig(1, 64, 2, 7, 3, 1), **change)


def test_a_kernel_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="shared memory"):
        GemmConfig(2, 2, 1, (128,), 9)
    with pytest.raises(ValueError, match="along K"):
        GemmConfig(1, 2, 2, (8,), 2)
