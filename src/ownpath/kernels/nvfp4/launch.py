"""Launches of the compiled NVFP4 kernels: arguments in their order, tensor maps, grids. ``linear`` and ``moe`` check.

A launch is made from sizes and addresses that stay; addresses that change from call to call are slots of ``Pointers``.
"""

from ctypes import c_float, c_int, c_void_p
from dataclasses import dataclass

import torch

from ownpath.kernels.dsl.cache import load
from ownpath.kernels.dsl.driver import Argument, Boxes, Launch, pointer
from ownpath.kernels.nvfp4.config import (
    BLOCK_K,
    CHUNK_K,
    COPY_THREADS,
    AlignConfig,
    CombineConfig,
    GemmConfig,
    PermuteConfig,
)

PointerArgs = tuple[c_void_p, ...]
"""Arguments whose addresses change from call to call."""


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

    @property
    def device_index(self) -> int:
        return self.codes.get_device()


class GemmLaunch:
    """One product with a packed weight. x: boxes over bfloat16 [num_rows, K]; move them before it is started.

    results: where the addresses of out (bfloat16 or float32 [rows, N], or [rows, N / 2] after SwiGLU) and schedule are.
    """

    def __init__(
        self, config: GemmConfig, weight: PackedWeight, x: Boxes, tiles: "Tiling", results: tuple[c_void_p, c_void_p]
    ) -> None:
        self.x = x
        args: tuple[Argument, ...] = (
            x.argument,
            pointer(weight.codes),
            pointer(weight.scales),
            pointer(weight.global_scale),
            *results,
            c_int(x.num_rows),
            c_int(weight.num_rows // (64 * config.m64_per_tile)),
            c_int(weight.num_cols // BLOCK_K),
            c_int(tiles.rows_per_tile),
            c_int(tiles.out_pitch),
            c_float(tiles.limit),
        )
        self.launch = Launch(load(config, weight.device_index), (tiles.grid, 1, 1), args)


@dataclass(frozen=True)
class Tiling:
    """How a product is cut. rows_per_tile: tokens of a dense tile; out_pitch: elements between rows of the output;
    grid: CTAs; limit: SwiGLU's clamp."""

    grid: int
    out_pitch: int
    rows_per_tile: int = 0
    limit: float = 0.0


def box(config: GemmConfig) -> tuple[int, int]:
    """Rows and columns of the tokens that a product copies at once."""
    return config.box_rows, CHUNK_K


@dataclass(frozen=True)
class MoeSizes:
    """Sizes of one call of routed experts. slots: of a token, shared experts too; num_ids: length of the id space."""

    num_tokens: int
    num_choices: int
    slots: int
    num_ids: int
    num_experts: int
    hidden: int

    @property
    def pairs(self) -> int:
        return self.num_tokens * self.slots


def align(
    config: AlignConfig, sizes: MoeSizes, tiles: tuple[int, int], pointers: PointerArgs, device_index: int
) -> Launch:
    """Fills the schedule of one call. tiles: rows of one, and where the index begins behind them.

    pointers: ids, expert_map, schedule.
    """
    counts = (sizes.num_tokens, sizes.num_choices, sizes.num_ids, sizes.num_experts, *tiles)
    args: tuple[Argument, ...] = (*pointers, *map(c_int, counts))
    return Launch(load(config, device_index), (config.num_ctas, 1, 1), args)


def permute(sizes: MoeSizes, pointers: PointerArgs, device_index: int) -> Launch:
    """Copies each row of x [T, D] to its places in the experts' order, out [T * slots, D].

    pointers: x, schedule, out.
    """
    counts = (sizes.num_tokens, sizes.slots, sizes.hidden)
    grid = -(-sizes.num_tokens * (sizes.hidden // 8) // COPY_THREADS)
    args: tuple[Argument, ...] = (*pointers, *map(c_int, counts))
    return Launch(load(PermuteConfig(), device_index), (grid, 1, 1), args)


def combine(config: CombineConfig, sizes: MoeSizes, pointers: PointerArgs, device_index: int) -> Launch:
    """Sums the experts' rows per token into out [T, D]. pointers: rows, schedule, weights, out."""
    counts = (sizes.num_tokens, sizes.num_choices, sizes.hidden)
    grid = -(-sizes.num_tokens * (sizes.hidden // 8) // COPY_THREADS)
    args: tuple[Argument, ...] = (*pointers, *map(c_int, counts))
    return Launch(load(config, device_index), (grid, 1, 1), args)
