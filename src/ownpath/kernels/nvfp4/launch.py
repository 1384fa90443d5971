"""Launches of the compiled kernels on tensors: arguments in their order, tensor maps, grids. No checks: see runners."""

from ctypes import c_float, c_int
from dataclasses import dataclass
from functools import lru_cache

import torch

from ownpath.kernels.dsl.cache import load
from ownpath.kernels.dsl.driver import pointer, tensor_map
from ownpath.kernels.nvfp4.config import (
    BLOCK_K,
    CHUNK_K,
    COPY_THREADS,
    AlignConfig,
    CombineConfig,
    GemmConfig,
    PermuteConfig,
)


@dataclass(frozen=True)
class PackedWeight:
    """NVFP4 matrices in the layout of ``kernels.nvfp4.layout``.

    Shapes: codes uint8 [E * N * K / 2], scales uint8 [E * N * K / 16]; global_scale float32 [N] for one dense matrix,
        [E, 2] for experts: of rows g and g + 8 of each packed slab, that is gate and up, or twice the same.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    global_scale: torch.Tensor
    num_rows: int
    num_cols: int


@lru_cache(maxsize=16)
def num_sms(device_index: int) -> int:
    """Multiprocessors of a device."""
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def current_stream(tensor: torch.Tensor) -> int:
    """Handle of the stream that torch uses on the tensor's device."""
    return torch.cuda.current_stream(tensor.device).cuda_stream


def gemm(
    config: GemmConfig,
    x: torch.Tensor,
    weight: PackedWeight,
    out: torch.Tensor,
    schedule: torch.Tensor,
    rows_per_tile: int,
    grid: int,
    limit: float = 0.0,
) -> None:
    """One product. x bfloat16 [rows, K] with 16-byte rows; out bfloat16 [rows, N] (or [rows, N / 2] after SwiGLU)."""
    kernel = load(config, x.device.index)
    args = (
        tensor_map(x, config.box_rows, CHUNK_K),
        pointer(weight.codes),
        pointer(weight.scales),
        pointer(weight.global_scale),
        pointer(out),
        pointer(schedule),
        c_int(x.shape[0]),
        c_int(weight.num_rows // (64 * config.m64_per_tile)),
        c_int(weight.num_cols // BLOCK_K),
        c_int(rows_per_tile),
        c_int(out.stride(0)),
        c_float(limit),
    )
    kernel.launch(grid, args, current_stream(x))


def align(
    config: AlignConfig,
    ids: torch.Tensor,
    expert_map: torch.Tensor,
    schedule: torch.Tensor,
    num_experts: int,
    tile_rows: int,
    index_offset: int,
) -> None:
    """Fills the schedule of one call. expert_map: any tensor when the configuration has no map."""
    num_ids = len(expert_map) if config.mapped else num_experts - config.num_shared
    sizes = (*ids.shape, num_ids, num_experts, tile_rows, index_offset)
    args = (pointer(ids), pointer(expert_map), pointer(schedule), *map(c_int, sizes))
    load(config, ids.device.index).launch(config.num_ctas, args, current_stream(ids))


def permute(x: torch.Tensor, schedule: torch.Tensor, out: torch.Tensor) -> None:
    """Copies each row of x [T, D] to its places in the experts' order, out [T * slots, D]."""
    num_tokens, width = x.shape
    grid = -(-num_tokens * (width // 8) // COPY_THREADS)
    sizes = (num_tokens, len(out) // num_tokens, width)
    args = (pointer(x), pointer(schedule), pointer(out), *map(c_int, sizes))
    load(PermuteConfig(), x.device.index).launch(grid, args, current_stream(x))


def combine(
    config: CombineConfig, rows: torch.Tensor, schedule: torch.Tensor, weights: torch.Tensor, out: torch.Tensor
) -> None:
    """Sums the experts' rows per token into out [T, D]."""
    num_tokens, width = out.shape
    grid = -(-num_tokens * (width // 8) // COPY_THREADS)
    sizes = (num_tokens, weights.shape[1], width)
    args = (pointer(rows), pointer(schedule), pointer(weights), pointer(out), *map(c_int, sizes))
    load(config, rows.device.index).launch(grid, args, current_stream(rows))
