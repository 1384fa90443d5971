"""Launches of the FP8 kernels on tensors: choice of shape, arguments in their order, grids. No checks: see runners."""

from collections.abc import Sequence
from ctypes import c_int
from dataclasses import dataclass
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
from ownpath.kernels.fp8_packing import ACT_BLOCK_BYTES, PackedFp8, pack_fp8
from ownpath.plan.catalogue import FP8_PREFILL_FROM

TOKEN_TILES = (8, 16, 32, 64)
WGMMA_FROM = 32
"""Tokens of a tile from which ``wgmma`` beats ``mma``, whose cost grows with them."""
MAX_WIDTH = 8 * MAX_K_BLOCKS * 128
CLUSTERS = {1: 132, 2: 66, 4: 30, 8: 15}
"""Clusters of 1, 2, 4 and 8 CTAs that an H200 runs at once with one CTA per SM, as its driver tells."""
WAVE_BLOCKS = 12
"""What a wave of CTAs costs beside its weights, in blocks of 8 KiB per CTA: about 3 us."""
W8A8_SHAPES = ((2, 2), (3, 1), (2, 1))
ROWS_PER_WORKSPACE_BLOCK = 64


@lru_cache(maxsize=16)
def num_sms(device_index: int) -> int:
    """Multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def workspace_bytes(num_tokens: int, num_k_blocks: int) -> int:
    """What W8A8 needs for the quantised activations of ``num_tokens`` rows."""
    return -(-num_tokens // ROWS_PER_WORKSPACE_BLOCK) * num_k_blocks * ACT_BLOCK_BYTES


def workspace_rows(workspace: Tensor, num_k_blocks: int) -> int:
    """Rows whose quantised activations fit a workspace: a multiple of 64."""
    return workspace.numel() // (num_k_blocks * ACT_BLOCK_BYTES) * ROWS_PER_WORKSPACE_BLOCK


@lru_cache(maxsize=4096)
def w8a16_config(
    num_tokens: int, weight_key: tuple[int, int, bool, bool], sms: int, is_batch_invariant: bool = False
) -> W8A16Config:
    """Kernel shape for a token count and a weight (row blocks, K blocks, folded, ragged).

    is_batch_invariant: always the same instructions in the same order for a row, whatever the number of rows.
    """
    sizes = TOKEN_TILES[:3] if is_batch_invariant else TOKEN_TILES
    num_n = next((size for size in sizes if num_tokens <= size), sizes[-1])
    return w8a16_shape(num_n, weight_key, sms, wgmma=num_n >= WGMMA_FROM and not is_batch_invariant)


def w8a16_shape(num_n: int, weight_key: tuple[int, int, bool, bool], sms: int, wgmma: bool) -> W8A16Config:
    """Rows per CTA and CTAs per cluster along K that keep the busiest SM's share of the weight smallest.

    Ties go to more rows per CTA (tokens are fetched less often), then to fewer CTAs per cluster (less to add up).
    """
    num_row_blocks, num_k_blocks, folded, ragged = weight_key
    best = (1 << 62, 0, 0)
    for num_m64 in (4, 2):
        for cluster_k, clusters in CLUSTERS.items():
            per_cta = -(-num_k_blocks // cluster_k)
            if per_cta > MAX_K_BLOCKS or cluster_k > num_k_blocks:
                continue
            groups = -(-num_row_blocks // num_m64)
            waves = -(-groups // max(1, clusters * sms // 132))
            best = min(best, (waves * (per_cta * num_m64 + WAVE_BLOCKS), -num_m64, cluster_k))
    num_m64, cluster_k = -best[1], best[2]
    stages = w8a16_stages(num_m64, num_n, MAX_SMEM)
    return W8A16Config(num_m64, num_n, stages, cluster_k, folded, ragged, wgmma=wgmma)


@lru_cache(maxsize=4096)
def w8a8_config(num_tokens: int, num_row_blocks: int, ragged: bool, sms: int) -> W8A8Config:
    """Kernel shape whose tiles waste the least of the device: fewest tensor-core steps of the busiest SM."""
    candidates = [w8a8_shape(*shape, ragged) for shape in W8A8_SHAPES]
    return min(
        candidates,
        key=lambda config: -(-config.num_tiles(num_tokens, num_row_blocks) // sms) * config.m64_per_tile,
    )


def w8a8_shape(warpgroups: int, num_m64: int, ragged: bool) -> W8A8Config:
    """A tile of 64 * warpgroups * num_m64 tokens, as many stages as fit. Sharing by pairs of CTAs gained nothing."""
    return W8A8Config(warpgroups, num_m64, w8a8_stages(warpgroups * num_m64), 1, ragged)


def weight_key(weight: PackedFp8) -> tuple[int, int, bool, bool]:
    """What of a weight decides its kernels: row blocks, K blocks, folded, ragged."""
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


def fp8_w8a16_invariant(x: Tensor, weight: PackedFp8, out: Tensor) -> None:
    """As ``fp8_w8a16``; a row's bits do not depend on the other rows, nor on their number."""
    w8a16_launch(w8a16_config(len(x), weight_key(weight), num_sms(x.device.index), True), x, weight, out)


def fp8_w8a8(x: Tensor, weight: PackedFp8, out: Tensor, workspace: Tensor) -> None:
    """out = (x in E4M3 with a scale per 1 x 128) (E4M3 x block scale).T, in as many passes as the workspace asks."""
    sms = num_sms(x.device.index)
    step = workspace_rows(workspace, weight.num_k_blocks)
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        quantize_launch(QuantizeConfig(weight.power_of_two), x[rows], workspace, weight.num_k_blocks)
        config = w8a8_config(len(x[rows]), weight.num_row_blocks, weight.ragged, sms)
        w8a8_launch(config, workspace, weight, out[rows])


@dataclass(frozen=True)
class Fp8Kernel:
    """W8A16 for fewer rows than ``prefill_from``, W8A8 from there; ``None``: W8A16 always."""

    prefill_from: int | None
    is_batch_invariant: bool = False

    def pack(self, weights: Sequence[Tensor], scales: Sequence[Tensor]) -> PackedFp8:
        """The operand in the kernels' layout. Errors: ValueError for a K that 8 does not divide, or more than 64K."""
        width = weights[0].shape[1]
        if width % 8 or width > MAX_WIDTH:
            raise ValueError(f"weight has {width} columns; the Hopper kernels take multiples of 8 up to {MAX_WIDTH}")
        return pack_fp8(weights, scales)

    def workspace_bytes(self, weight: PackedFp8, num_tokens: int) -> int:
        """What calls of up to ``num_tokens`` rows use at once; 0 where every call is W8A16."""
        return 0 if self.prefill_from is None else workspace_bytes(num_tokens, weight.num_k_blocks)

    def configs(self, weight: PackedFp8) -> list[Fp8Config]:
        """Every kernel that a call may launch, to be compiled and loaded before the first one."""
        key, sms = weight_key(weight), num_sms(weight.blocks.device.index)
        found: list[Fp8Config] = [w8a16_config(size, key, sms, self.is_batch_invariant) for size in TOKEN_TILES]
        if self.prefill_from is not None:
            found.append(QuantizeConfig(weight.power_of_two))
            found += [w8a8_shape(*shape, weight.ragged) for shape in W8A8_SHAPES]
        return list({config.name: config for config in found}.values())

    def __call__(self, x: Tensor, weight: PackedFp8, out: Tensor, workspace: Tensor) -> None:
        if self.prefill_from is not None and len(x) >= self.prefill_from:
            fp8_w8a8(x, weight, out, workspace)
        elif self.is_batch_invariant:
            fp8_w8a16_invariant(x, weight, out)
        else:
            fp8_w8a16(x, weight, out)


fp8_linear = Fp8Kernel(FP8_PREFILL_FROM)
fp8_linear_invariant = Fp8Kernel(None, is_batch_invariant=True)
