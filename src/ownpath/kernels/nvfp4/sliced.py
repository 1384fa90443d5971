"""Launches experts in slices: ``sliced_sm90`` and ``sliced_sum_sm90``, for few (token, slot) pairs.

A call's scratch is float32 [pairs, slices, D]: what each slice of the experts' width adds to a pair's output.
"""

from ctypes import c_float, c_int
from dataclasses import dataclass, replace

import torch

from ownpath.kernels.contract import Routing
from ownpath.kernels.dsl.cache import load
from ownpath.kernels.dsl.driver import Argument, Launch, Pointers, pointer
from ownpath.kernels.empty import EmptyOutput
from ownpath.kernels.nvfp4.launch import MoeCallKey, MoeSizes, PackedWeight
from ownpath.kernels.nvfp4.sliced_config import SUM_COLUMNS, WARP, SlicedConfig, SlicedSumConfig

LEAST_WIDTH = 64


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
    halves = 1 if pairs <= WARP else 2
    products = replace(tile, halves=halves, wide_ids=wide_ids, mapped=mapped, num_shared=num_shared)
    return products, SlicedSumConfig(wide_ids, mapped, num_shared)


def sliced_bytes(pairs: int, hidden: int, inter: int) -> int:
    """Returns the most scratch that a call with up to this many pairs takes."""
    return 4 * pairs * hidden * -(-inter // LEAST_WIDTH)


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
        num_slices = inter // tile.width
        self.num_bytes = 4 * sizes.pairs * num_slices * hidden
        self.out = EmptyOutput((num_tokens, hidden), torch.bfloat16, device_index)
        self.scratch = EmptyOutput((self.num_bytes,), torch.uint8, device_index)
        self._pointers = Pointers(6)
        x, ids, expert_map, sums, routed, out = self._pointers.arguments
        counts = tuple(map(c_int, (num_tokens, top_k, num_ids, num_experts)))
        packed = [pointer(part) for side in (up, down) for part in (side.codes, side.scales, side.global_scale)]
        tail = (c_int(x_pitch), c_int(hidden), c_int(inter), c_float(weights.swiglu_limit))
        args: tuple[Argument, ...] = (x, ids, expert_map, *packed, sums, *counts, *tail)
        grid = sizes.pairs * num_slices * products.cluster
        self._products = Launch(load(products, device_index), (grid, 1, 1), args)
        args = (sums, ids, expert_map, routed, out, *counts, c_int(num_slices), c_int(hidden))
        self._sum = Launch(load(total, device_index), (num_tokens * hidden // SUM_COLUMNS, 1, 1), args)

    def start(self, x: int, routing: Routing, scratch: int, out: int, stream: int) -> None:
        """Launches both kernels. x, scratch, out: addresses."""
        ids, expert_map = routing.ids.data_ptr(), routing.expert_map
        mapped = ids if expert_map is None else expert_map.data_ptr()
        self._pointers.set(x, ids, mapped, scratch, routing.weights.data_ptr(), out)
        self._products.start(stream)
        self._sum.start(stream)
