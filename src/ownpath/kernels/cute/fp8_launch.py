"""Launches of the FP8 kernels on tensors: the choice of shape, arguments in their order, grids. No checks: see runners."""

from collections.abc import Iterator
from ctypes import c_int
from functools import lru_cache

import torch
from torch import Tensor

from ownpath.kernels.cache import load
from ownpath.kernels.cute.fp8_config import (
    MAX_K_BLOCKS,
    MAX_SMEM,
    QUANTIZE_ROWS,
    Fp8Config,
    QuantizeConfig,
    W8A8Config,
    W8A16Config,
    w8a8_stages,
    w8a16_stages,
)
from ownpath.kernels.driver import pointer
from ownpath.kernels.fp8_packing import ACT_BLOCK_BYTES, PackedFp8

TOKEN_TILES = (8, 16, 32, 64)
ROWS_PER_WORKSPACE_BLOCK = 64


@lru_cache(maxsize=16)
def num_sms(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def workspace_bytes(num_tokens: int, num_k_blocks: int) -> int:
    """What W8A8 needs for the quantised activations of ``num_tokens`` rows."""
    return -(-num_tokens // ROWS_PER_WORKSPACE_BLOCK) * num_k_blocks * ACT_BLOCK_BYTES


def workspace_rows(workspace: Tensor, num_k_blocks: int) -> int:
    """Rows whose quantised activations fit a workspace: a multiple of 64."""
    return workspace.numel() // (num_k_blocks * ACT_BLOCK_BYTES) * ROWS_PER_WORKSPACE_BLOCK


def split_rows_and_k(num_row_blocks: int, num_k_blocks: int, sms: int) -> tuple[int, int]:
    """64-row blocks per CTA and CTAs per cluster along K: what keeps the busiest SM's share smallest.

    Ties go to fewer CTAs per cluster (less to add up), then to more rows per CTA (tokens are fetched less often).
    """
    best = (1 << 62, 0, 0)
    for num_m64 in (4, 2):
        for cluster_k in (1, 2, 4, 8):
            per_cta = -(-num_k_blocks // cluster_k)
            if per_cta > MAX_K_BLOCKS or cluster_k > num_k_blocks:
                continue
            waves = -(--(-num_row_blocks // num_m64) * cluster_k // sms)
            best = min(best, (waves * per_cta * num_m64, cluster_k, -num_m64))
    return -best[2], best[1]


@lru_cache(maxsize=4096)
def w8a16_config(num_tokens: int, weight_key: tuple[int, int, bool, bool], sms: int) -> W8A16Config:
    """Kernel shape for a token count and a weight (row blocks, K blocks, folded, ragged)."""
    num_row_blocks, num_k_blocks, folded, ragged = weight_key
    num_n = next((size for size in TOKEN_TILES if num_tokens <= size), TOKEN_TILES[-1])
    num_m64, cluster_k = split_rows_and_k(num_row_blocks, num_k_blocks, sms)
    return W8A16Config(num_m64, num_n, w8a16_stages(num_m64, num_n, MAX_SMEM), cluster_k, folded, ragged)


@lru_cache(maxsize=4096)
def w8a8_config(num_tokens: int, num_row_blocks: int, ragged: bool, sms: int) -> W8A8Config:
    """Kernel shape whose tiles waste the least of the device: fewest tensor-core steps of the busiest SM."""
    best: tuple[float, W8A8Config] | None = None
    for warpgroups, num_m64 in ((2, 2), (3, 1), (2, 1)):
        config = W8A8Config(warpgroups, num_m64, w8a8_stages(warpgroups * num_m64), 2, ragged)
        waves = -(-config.num_tiles(num_tokens, num_row_blocks) // (sms // config.cluster_n))
        cost = waves * config.m64_per_tile
        if best is None or cost < best[0]:
            best = cost, config
    assert best is not None
    return best[1]


def weight_key(weight: PackedFp8) -> tuple[int, int, bool, bool]:
    return weight.num_row_blocks, weight.num_k_blocks, weight.folded, weight.ragged


def w8a16_launch(config: W8A16Config, x: Tensor, weight: PackedFp8, out: Tensor) -> None:
    """out = x (E4M3 x scale).T with the kernel of ``config``. x bfloat16 [M, K] with 16-byte rows, out [M, N]."""
    sizes = (*x.shape, x.stride(0), out.stride(0), weight.num_row_blocks, weight.num_k_blocks)
    operands = (x, weight.blocks, weight.scales, weight.rows, out)
    args = (*map(pointer, operands), *map(c_int, sizes))
    grid = config.grid(len(x), weight.num_row_blocks)
    load(config, x.device.index).launch(grid, args, torch.cuda.current_stream(x.device).cuda_stream)


def quantize_launch(config: QuantizeConfig, x: Tensor, workspace: Tensor, num_k_blocks: int) -> None:
    """Quantised blocks of x into ``workspace``."""
    args = (pointer(x), pointer(workspace), *map(c_int, (*x.shape, x.stride(0), num_k_blocks)))
    grid = -(-len(x) // QUANTIZE_ROWS) * num_k_blocks
    load(config, x.device.index).launch(grid, args, torch.cuda.current_stream(x.device).cuda_stream)


def w8a8_launch(config: W8A8Config, workspace: Tensor, weight: PackedFp8, out: Tensor) -> None:
    """out = quantised x (E4M3 x scale).T from the blocks in ``workspace``."""
    sizes = (len(out), out.stride(0), weight.num_row_blocks, weight.num_k_blocks)
    operands = (workspace, weight.blocks, weight.scales, weight.rows, out)
    args = (*map(pointer, operands), *map(c_int, sizes))
    grid = config.grid(len(out), weight.num_row_blocks, num_sms(out.device.index))
    load(config, out.device.index).launch(grid, args, torch.cuda.current_stream(out.device).cuda_stream)


def fp8_w8a16(x: Tensor, weight: PackedFp8, out: Tensor) -> None:
    """out = x (E4M3 x block scale).T, weights decoded exactly. Any number of rows."""
    w8a16_launch(w8a16_config(len(x), weight_key(weight), num_sms(x.device.index)), x, weight, out)


def fp8_w8a8(x: Tensor, weight: PackedFp8, out: Tensor, workspace: Tensor) -> None:
    """out = (x in E4M3 with a scale per 1 x 128) (E4M3 x block scale).T, in as many passes as the workspace asks."""
    sms = num_sms(x.device.index)
    step = workspace_rows(workspace, weight.num_k_blocks)
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        quantize_launch(QuantizeConfig(weight.power_of_two), x[rows], workspace, weight.num_k_blocks)
        config = w8a8_config(len(x[rows]), weight.num_row_blocks, weight.ragged, sms)
        w8a8_launch(config, workspace, weight, out[rows])


def configs(weight: PackedFp8, sms: int) -> Iterator[Fp8Config]:
    """Every kernel that a weight may ask for, to be compiled and loaded before the first call."""
    key = weight_key(weight)
    for num_tokens in TOKEN_TILES:
        yield w8a16_config(num_tokens, key, sms)
    yield QuantizeConfig(weight.power_of_two)
    for warpgroups, num_m64 in ((2, 2), (3, 1), (2, 1)):
        yield W8A8Config(warpgroups, num_m64, w8a8_stages(warpgroups * num_m64), 2, weight.ragged)
