"""The choice of kernels: every shape gets one that fits, and its tiles cover the work exactly."""

import pytest

from ownpath.kernels.nvfp4.choose import SMS, choose_linear, choose_moe, moe_choice
from ownpath.kernels.nvfp4.config import MAX_SHARED_BYTES, GemmConfig

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


def test_a_kernel_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="shared memory"):
        GemmConfig(2, 2, 1, (128,), 9)
    with pytest.raises(ValueError, match="along K"):
        GemmConfig(1, 2, 2, (8,), 2)


@pytest.mark.parametrize(("hidden", "inter", "is_drawn"), [(4096, 2048, True), (512, 512, True), (4096, 256, False)])
def test_tiles_are_drawn_where_three_are_longer_than_the_ring(hidden: int, inter: int, is_drawn: bool) -> None:
    """A tile of down has a stage for each 128 columns; of 256 columns, a ring of ten stages holds five."""
    knobs = {"num_m64": 1, "warpgroups_m": 1, "n0": 8, "stages": 10, "depth": 2, "group": 4, "gather": 1, "per_sm": 3}
    fused = moe_choice({**knobs, "fused": 2}, hidden, inter, wide=True).fused
    assert fused is not None
    assert fused.num_stages == 10
    assert fused.dynamic == is_drawn
    apart = moe_choice(knobs, hidden, inter, wide=True)
    assert apart.fused is None


@pytest.mark.parametrize("knobs", [{"gather": 0}, {"num_m64": 2, "warpgroups_m": 4}], ids=["sorted", "two tiles"])
def test_products_of_different_tiles_stay_apart(knobs: dict[str, int]) -> None:
    """A hidden size of 640 has no tiles of eight blocks, so that down takes smaller ones than gate_up."""
    given = {"num_m64": 1, "warpgroups_m": 2, "n0": 8, "stages": 4, "depth": 2, "group": 4, "gather": 1, "per_sm": 1}
    assert moe_choice(given | knobs | {"fused": 1}, 640, 512, wide=True).fused is None
