"""Prepares launches of the NVFP4 kernels: arguments, tensor maps, grids. ``linear`` and ``moe`` check their inputs.

A launch is prepared from sizes and fixed addresses; addresses that change between calls are arguments of ``Pointers``.
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
    device_index: int = -1

    def __post_init__(self) -> None:
        object.__setattr__(self, "device_index", self.codes.get_device())


class GemmLaunch:
    """The launch of a product with a packed weight. x: boxes over bfloat16 [num_rows, K]; set them before the start.

    results: addresses of out (bfloat16 or float32 [rows, N], or [rows, N / 2] after SwiGLU) and of the schedule.
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
    """Sizes of a product's tiles and grid. rows_per_tile: tokens of a dense tile; out_pitch: elements between rows of
    the output; grid: CTAs; limit: SwiGLU's clamp."""

    grid: int
    out_pitch: int
    rows_per_tile: int = 0
    limit: float = 0.0


def box(config: GemmConfig) -> tuple[int, int]:
    """Returns rows and columns of one TMA copy of tokens."""
    return config.box_rows, CHUNK_K


MoeCallKey = tuple[int, int, int, int, bool, int]
"""Tokens, top k, shared experts, length of the expert map or -1, whether ids are int64, pitch of x."""


@dataclass(frozen=True)
class MoeSizes:
    """Sizes of a call of routed experts. slots: experts per token, shared included; num_ids: number of expert ids."""

    num_tokens: int
    num_choices: int
    slots: int
    num_ids: int
    num_experts: int
    hidden: int

    @property
    def pairs(self) -> int:
        return self.num_tokens * self.slots


ALIGN_CTAS = 8
PAIRS_PER_ALIGN_WARP = 64
PAIRS_PER_ALIGN_CTA = 4096
"""With more pairs, a cluster sorts them: one CTA takes 12 us for 6144."""


def align_config(wide_ids: bool, mapped: bool, num_shared: int, pairs: int) -> AlignConfig:
    """Returns the kernel for one warp, one CTA or a cluster, by the number of (token, slot) pairs."""
    ctas = ALIGN_CTAS if pairs > PAIRS_PER_ALIGN_CTA else 1
    halves = -(-pairs // 32) if pairs <= PAIRS_PER_ALIGN_WARP else 0
    return AlignConfig(wide_ids, mapped, num_shared, ctas, few=halves)


def align(
    config: AlignConfig, sizes: MoeSizes, tiles: tuple[int, int], pointers: PointerArgs, device_index: int
) -> Launch:
    """Prepares ``Align``, which fills a call's schedule. tiles: rows per tile, and the offset of the index behind them.

    pointers: ids, expert_map, schedule.
    """
    counts = (sizes.num_tokens, sizes.num_choices, sizes.num_ids, sizes.num_experts, *tiles)
    args: tuple[Argument, ...] = (*pointers, *map(c_int, counts))
    return Launch(load(config, device_index), (config.num_ctas, 1, 1), args)


def permute(sizes: MoeSizes, pointers: PointerArgs, device_index: int) -> Launch:
    """Prepares ``Permute``: each row of x [T, D] to its rows in the experts' order, out [T * slots, D].

    pointers: x, schedule, out.
    """
    counts = (sizes.num_tokens, sizes.slots, sizes.hidden)
    grid = -(-sizes.num_tokens * (sizes.hidden // 8) // COPY_THREADS)
    args: tuple[Argument, ...] = (*pointers, *map(c_int, counts))
    return Launch(load(PermuteConfig(), device_index), (grid, 1, 1), args)


def combine(config: CombineConfig, sizes: MoeSizes, pointers: PointerArgs, device_index: int) -> Launch:
    """Prepares ``Combine``: the experts' rows of each token summed into out [T, D].

    pointers: rows, schedule, weights, out.
    """
    counts = (sizes.num_tokens, sizes.num_choices, sizes.hidden)
    grid = -(-sizes.num_tokens * (sizes.hidden // 8) // COPY_THREADS)
    args: tuple[Argument, ...] = (*pointers, *map(c_int, counts))
    return Launch(load(config, device_index), (grid, 1, 1), args)
