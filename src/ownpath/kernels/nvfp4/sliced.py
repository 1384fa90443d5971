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
from ownpath.kernels.nvfp4.launch import MoeCallKey, PackedWeight
from ownpath.kernels.nvfp4.sliced_config import CLUSTER, SUM_COLUMNS, WIDTH, SlicedConfig, SlicedSumConfig


@dataclass(frozen=True)
class PackedExperts:
    """The packed experts of a call."""

    w13: PackedWeight
    w2: PackedWeight
    num_experts: int
    swiglu_limit: float


def sliced_configs(
    tile: SlicedConfig, wide_ids: bool, mapped: bool, num_shared: int
) -> tuple[SlicedConfig, SlicedSumConfig]:
    """Returns the two kernels of a call whose ids have this form."""
    products = replace(tile, wide_ids=wide_ids, mapped=mapped, num_shared=num_shared)
    return products, SlicedSumConfig(wide_ids, mapped, num_shared)


def sliced_bytes(pairs: int, hidden: int, inter: int) -> int:
    """Returns the scratch of a call with this many pairs."""
    return 4 * pairs * hidden * (inter // WIDTH)


class SlicedLaunches:
    """The prepared launches for one size of call. out, scratch: what a call allocates that is given none."""

    sorts = False

    def __init__(self, tile: SlicedConfig, key: MoeCallKey, weights: PackedExperts) -> None:
        num_tokens, top_k, num_shared, map_length, wide_ids, x_pitch = key
        up, down, num_experts = weights.w13, weights.w2, weights.num_experts
        hidden, inter, device_index = up.num_cols, down.num_cols, up.device_index
        num_ids = map_length if map_length >= 0 else num_experts - num_shared
        pairs = num_tokens * (top_k + num_shared)
        products, total = sliced_configs(tile, wide_ids, map_length >= 0, num_shared)
        self.num_bytes = sliced_bytes(pairs, hidden, inter)
        self.out = EmptyOutput((num_tokens, hidden), torch.bfloat16, device_index)
        self.scratch = EmptyOutput((self.num_bytes,), torch.uint8, device_index)
        self._pointers = Pointers(6)
        x, ids, expert_map, sums, routed, out = self._pointers.arguments
        packed = [pointer(part) for side in (up, down) for part in (side.codes, side.scales, side.global_scale)]
        counts = map(c_int, (num_tokens, top_k, num_ids, num_experts, x_pitch, hidden, inter))
        args: tuple[Argument, ...] = (x, ids, expert_map, *packed, sums, *counts, c_float(weights.swiglu_limit))
        # A tile has at least one pair.
        grid = (pairs * (inter // WIDTH) * CLUSTER, 1, 1)
        self._products = Launch(load(products, device_index), grid, args)
        counts = map(c_int, (num_tokens, top_k, num_ids, hidden, inter))
        args = (sums, ids, expert_map, routed, out, *counts)
        self._sum = Launch(load(total, device_index), (num_tokens * hidden // SUM_COLUMNS, 1, 1), args)

    def start(self, x: int, routing: Routing, scratch: int, out: int, stream: int) -> None:
        """Launches both kernels. x, scratch, out: addresses."""
        ids, expert_map = routing.ids.data_ptr(), routing.expert_map
        mapped = ids if expert_map is None else expert_map.data_ptr()
        self._pointers.set(x, ids, mapped, scratch, routing.weights.data_ptr(), out)
        self._products.start(stream)
        self._sum.start(stream)
