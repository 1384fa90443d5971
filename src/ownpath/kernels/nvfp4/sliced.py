"""Launches experts in slices: ``sliced_sm90`` and ``sliced_sum_sm90``, behind an aligner for more than 64 pairs.

A call's scratch is the schedule, where there is an aligner, then float32 [pairs, slices, D]: what each slice of the
experts' width adds to a pair's output.
"""

from ctypes import c_float, c_int
from dataclasses import dataclass, replace

import torch

from ownpath.kernels.contract import Routing
from ownpath.kernels.dsl.cache import load
from ownpath.kernels.dsl.driver import Argument, Launch, Pointers, pointer
from ownpath.kernels.empty import EmptyOutput
from ownpath.kernels.nvfp4.launch import MoeCallKey, MoeSizes, PackedWeight, align, align_config
from ownpath.kernels.nvfp4.sliced_config import SUM_COLUMNS, WARP, SlicedConfig, SlicedSumConfig

LEAST_WIDTH = 64
PART_BYTES = 256
"""Alignment of the sums behind the schedule."""
PAIRS_OF_SLICES = (1, WARP + 1, 2 * WARP + 1)
"""Numbers of pairs that take different kernels."""


@dataclass(frozen=True)
class PackedExperts:
    """The packed experts of a call."""

    w13: PackedWeight
    w2: PackedWeight
    num_experts: int
    swiglu_limit: float


def sliced_configs(
    tile: SlicedConfig, pairs: int, wide_ids: bool, mapped: bool, num_shared: int
) -> tuple[SlicedConfig, SlicedSumConfig]:
    """Returns the two kernels of a call with this many pairs."""
    if pairs > 2 * WARP:
        return replace(tile, halves=0, num_shared=num_shared), SlicedSumConfig(True, num_shared=num_shared)
    products = replace(tile, halves=-(-pairs // WARP), wide_ids=wide_ids, mapped=mapped, num_shared=num_shared)
    return products, SlicedSumConfig(False, wide_ids, mapped, num_shared)


def sliced_bytes(pairs: int, hidden: int, inter: int) -> int:
    """Returns the most scratch that a call with up to this many pairs takes."""
    return _schedule_bytes(pairs, pairs) + 4 * pairs * hidden * -(-inter // LEAST_WIDTH)


class SlicedLaunches:
    """The prepared launches for one size of call. out, scratch: what a call allocates that is given none."""

    sorts = False

    def __init__(self, tile: SlicedConfig, key: MoeCallKey, weights: PackedExperts) -> None:
        num_tokens, top_k, num_shared, map_length, wide_ids, x_pitch = key
        up, down, num_experts = weights.w13, weights.w2, weights.num_experts
        hidden, inter, device_index = up.num_cols, down.num_cols, up.device_index
        num_ids = map_length if map_length >= 0 else num_experts - num_shared
        sizes = MoeSizes(num_tokens, top_k, top_k + num_shared, num_ids, num_experts, hidden)
        products, total = sliced_configs(tile, sizes.pairs, wide_ids, map_length >= 0, num_shared)
        num_slices, tiles = inter // tile.width, _most_tiles(sizes, tile)
        self._sums_at = _schedule_bytes(sizes.pairs, tiles) if products.scheduled else 0
        self.num_bytes = self._sums_at + 4 * sizes.pairs * num_slices * hidden
        self.out = EmptyOutput((num_tokens, hidden), torch.bfloat16, device_index)
        self.scratch = EmptyOutput((self.num_bytes,), torch.uint8, device_index)
        self._pointers = Pointers(7)
        x, ids, expert_map, schedule, sums, routed, out = self._pointers.arguments
        counts = tuple(map(c_int, (num_tokens, top_k, num_ids, num_experts)))
        packed = [pointer(part) for side in (up, down) for part in (side.codes, side.scales, side.global_scale)]
        tail = (c_int(x_pitch), c_int(hidden), c_int(inter), c_float(weights.swiglu_limit))
        args: tuple[Argument, ...] = (x, ids, expert_map, schedule, *packed, sums, *counts, *tail)
        self._launches: list[Launch] = []
        if products.scheduled:
            aligning = align_config(wide_ids, map_length >= 0, num_shared, sizes.pairs)
            tiling = (tile.tokens, 4 + 4 * tiles)
            self._launches.append(align(aligning, sizes, tiling, (ids, expert_map, schedule), device_index))
        self._launches.append(Launch(load(products, device_index), (tiles * num_slices * products.cluster, 1, 1), args))
        args = (sums, ids, expert_map, schedule, routed, out, *counts, c_int(num_slices), c_int(hidden))
        grid = (num_tokens * hidden // SUM_COLUMNS, 1, 1)
        self._launches.append(Launch(load(total, device_index), grid, args))

    def start(self, x: int, routing: Routing, scratch: int, out: int, stream: int) -> None:
        """Launches all kernels. x, scratch, out: addresses."""
        ids, expert_map = routing.ids.data_ptr(), routing.expert_map
        mapped = ids if expert_map is None else expert_map.data_ptr()
        self._pointers.set(x, ids, mapped, scratch, scratch + self._sums_at, routing.weights.data_ptr(), out)
        for launch in self._launches:
            launch.start(stream)


def _most_tiles(sizes: MoeSizes, tile: SlicedConfig) -> int:
    """Returns the most tiles of a call: one for each expert, and those of experts with more rows than a tile has."""
    experts = min(sizes.num_experts, sizes.pairs)
    return experts + (sizes.pairs - experts) // tile.tokens


def _schedule_bytes(pairs: int, tiles: int) -> int:
    return -(-4 * (4 + 4 * tiles + 2 * pairs + 4) // PART_BYTES) * PART_BYTES
