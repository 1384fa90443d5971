"""The prepared launches of a call whose two products run as one kernel; see ``fused_sm90``.

Up to 64 (token, slot) pairs that kernel is the call. With more, ``Align`` runs before it and ``Combine`` behind.
"""

from ctypes import c_float, c_int
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ownpath.kernels.contract import Config, Routing
from ownpath.kernels.dsl.cache import load
from ownpath.kernels.dsl.driver import Argument, Boxes, Launch, Pointers, num_sms, pointer
from ownpath.kernels.empty import EmptyOutput
from ownpath.kernels.nvfp4.config import FEW_PAIRS, AlignConfig, CombineConfig, FusedConfig
from ownpath.kernels.nvfp4.launch import MoeSizes, align, box, combine

if TYPE_CHECKING:
    from ownpath.kernels.nvfp4.moe import MoeOperand

PART_BYTES = 256


def most_tiles(pairs: int, num_experts: int, tile_rows: int) -> int:
    """Returns the largest number of tiles of at most ``tile_rows`` rows that ``pairs`` rows of experts need."""
    used = min(pairs, num_experts)
    return used + (pairs - used) // tile_rows


def call_config(config: FusedConfig, aligning: AlignConfig, pairs: int) -> FusedConfig:
    """Returns the kernel for a call: up to 64 pairs, one that sorts them itself."""
    if pairs > FEW_PAIRS:
        return config
    return replace(
        config,
        max_pairs=32 if pairs <= 32 else FEW_PAIRS,
        wide_ids=aligning.wide_ids,
        mapped=aligning.mapped,
        num_shared=aligning.num_shared,
    )


def call_configs(config: FusedConfig, aligning: AlignConfig, pairs: int) -> list[Config]:
    """Returns all kernels that a call launches."""
    one = call_config(config, aligning, pairs)
    return [one] if one.max_pairs else [aligning, one, CombineConfig(aligning.num_shared, True)]


class FusedLaunches:
    """The launches of one size of call, and the offsets of the scratch's parts; as ``_MoeLaunches``."""

    sorts = False

    def __init__(
        self, config: FusedConfig, aligning: AlignConfig, sizes: MoeSizes, operand: "MoeOperand", pitch: int
    ) -> None:
        pairs, device_index = sizes.pairs, operand.w13.device_index
        self._config = call_config(config, aligning, pairs)
        tile_rows = config.n_sizes[-1]
        tiles = most_tiles(pairs, operand.num_experts, tile_rows)
        self._hidden_at = _align(4 * (4 + 4 * tiles + 2 * pairs + 4))
        self._rows_at = self._hidden_at + _align(2 * pairs * operand.inter)
        self.num_bytes = self._rows_at + 4 * pairs * operand.hidden
        self.out = EmptyOutput((sizes.num_tokens, operand.hidden), torch.bfloat16, device_index)
        self.scratch = EmptyOutput((self.num_bytes,), torch.uint8, device_index)
        self._pointers = Pointers(7)
        ids, expert_map, schedule, hidden, rows, weights, out = self._pointers.arguments
        self._x_shape = ((sizes.num_tokens, operand.hidden), pitch)
        self._hidden_shape = ((pairs, operand.inter), operand.inter)
        self._sizes, self._operand = sizes, operand
        self._arguments = (hidden, rows, schedule, ids, expert_map, weights, out)
        self._grid = self._num_ctas(tiles)
        self._counters = operand.counters.data_ptr() if self._config.max_pairs else 0
        self._before: list[Launch] = []
        self._behind: list[Launch] = []
        if not self._config.max_pairs:
            tiling = (tile_rows, 4 + 4 * tiles)
            self._before = [align(aligning, sizes, tiling, (ids, expert_map, schedule), device_index)]
            combining = CombineConfig(aligning.num_shared, True)
            self._behind = [combine(combining, sizes, (rows, schedule, weights, out), device_index)]
        self._product: tuple[Boxes, Boxes, Launch] | None = None

    def _num_ctas(self, tiles: int) -> int:
        operand, config = self._operand, self._config
        most = tiles * max(operand.w13.num_rows, operand.hidden) // (64 * config.gate_up.m64_per_tile)
        return min(config.per_sm * num_sms(operand.w13.device_index), most)

    def _new_product(self, x: int, hidden: int) -> tuple[Boxes, Boxes, Launch]:
        """Prepares the products with their inputs at these addresses."""
        operand, sizes = self._operand, self._sizes
        row = box(self._config.gate_up)
        maps = Boxes(x, *self._x_shape, row), Boxes(hidden, *self._hidden_shape, row)
        weights = [
            pointer(part) for side in (operand.w13, operand.w2) for part in (side.codes, side.scales, side.global_scale)
        ]
        counts = (
            sizes.num_tokens, operand.hidden, operand.inter, sizes.num_choices, sizes.num_ids, operand.num_experts
        )  # fmt: skip
        args: tuple[Argument, ...] = (
            maps[0].argument,
            maps[1].argument,
            *weights,
            *self._arguments,
            pointer(operand.counters[-1:]),
            *map(c_int, counts),
            c_float(operand.swiglu_limit),
        )
        return *maps, Launch(load(self._config, operand.w13.device_index), (self._grid, 1, 1), args)

    def start(self, x: int, routing: Routing, scratch: int, out: int, stream: int) -> None:
        """Launches all kernels. x, scratch, out: addresses."""
        ids, expert_map = routing.ids.data_ptr(), routing.expert_map
        hidden, rows = scratch + self._hidden_at, scratch + self._rows_at
        mapped = ids if expert_map is None else expert_map.data_ptr()
        schedule = self._counters or scratch
        self._pointers.set(ids, mapped, schedule, hidden, rows, routing.weights.data_ptr(), out)
        if self._product is None:
            self._product = self._new_product(x, hidden)
        x_boxes, hidden_boxes, product = self._product
        x_boxes.point_at(x)
        hidden_boxes.point_at(hidden)
        for one in self._before:
            one.start(stream)
        product.start(stream)
        for one in self._behind:
            one.start(stream)


def _align(num_bytes: int) -> int:
    return -(-num_bytes // PART_BYTES) * PART_BYTES
