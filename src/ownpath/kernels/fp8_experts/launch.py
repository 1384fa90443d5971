"""Prepares the launches of a call of the experts' FP8 kernels: arguments, tensor maps, grids, places in the scratch."""

from ctypes import c_float, c_int, c_void_p
from dataclasses import dataclass, field
from threading import Lock

import torch

from ownpath.kernels.contract import Routing
from ownpath.kernels.dsl.cache import load
from ownpath.kernels.dsl.driver import Argument, Boxes, Launch, Pointers, num_sms, pointer
from ownpath.kernels.empty import EmptyOutput
from ownpath.kernels.fp8_experts.choose import Fp8MoeChoice
from ownpath.kernels.fp8_experts.config import QUANTIZE_GROUPS, ExpertGemmConfig, QuantizeRowsConfig
from ownpath.kernels.fp8_experts.pack import PackedCodes
from ownpath.kernels.launch_cache import LaunchCache
from ownpath.kernels.nvfp4.choose import CLUSTER_CTAS
from ownpath.kernels.nvfp4.config import CombineConfig
from ownpath.kernels.nvfp4.launch import MoeCallKey, MoeSizes, align, align_config, box, combine
from ownpath.kernels.nvfp4.moe import PART_BYTES


@dataclass(frozen=True)
class Fp8MoeOperand:
    """Packed experts. launches: by ``MoeCallKey``."""

    w13: PackedCodes
    w2: PackedCodes
    num_experts: int
    swiglu_limit: float
    launches: "LaunchCache[MoeCallKey, Fp8MoeLaunches]" = field(default_factory=LaunchCache, compare=False)
    lock: Lock = field(default_factory=Lock, compare=False)

    @property
    def hidden(self) -> int:
        return self.w13.num_cols

    @property
    def inter(self) -> int:
        return self.w2.num_cols


@dataclass(frozen=True)
class Scratch:
    """Offsets of the scratch's parts, for P pairs. pitch: floats from one K block's scales to the next's."""

    tokens: int
    token_scales: int
    hidden: int
    rounded: int
    rounded_scales: int
    rows: int
    num_bytes: int

    @classmethod
    def of(cls, pairs: int, tiles: int, widths: tuple[int, int], wide: bool) -> "Scratch":
        hidden, inter = widths
        sizes = (
            4 * (4 + 4 * tiles + 2 * pairs + 4),
            pairs * hidden,
            pairs * (hidden // 32),
            2 * pairs * inter,
            pairs * inter,
            pairs * (inter // 32),
            (4 if wide else 2) * pairs * hidden,
        )
        ends, end = [], 0
        for size in sizes:
            end = -(-(end + size) // PART_BYTES) * PART_BYTES
            ends.append(end)
        return cls(*ends)


class QuantizeRowsLaunch:
    """Prepared launch that quantises rows. rows: number, width, pitch; pairs: places of a row, and of all rows.

    pointers: x, schedule, out, scales.
    """

    def __init__(
        self,
        config: QuantizeRowsConfig,
        rows: tuple[int, int, int],
        pairs: tuple[int, int],
        pointers: tuple[c_void_p, ...],
        device_index: int,
    ) -> None:
        count, width, pitch = rows
        slots, ld_scales = pairs
        args: tuple[Argument, ...] = (*pointers, *map(c_int, (count, slots, width, pitch, ld_scales)))
        grid = -(-count * (width // 128) // QUANTIZE_GROUPS)
        self.launch = Launch(load(config, device_index), (grid, 1, 1), args)


class ProductLaunch:
    """Prepared launch of one product. sizes: pairs and at most so many tiles of tokens; address: of the tokens.

    pointers: the tokens' scales, out, schedule.
    """

    def __init__(
        self,
        config: ExpertGemmConfig,
        operand: Fp8MoeOperand,
        sizes: tuple[int, int],
        address: int,
        pointers: tuple[c_void_p, c_void_p, c_void_p],
    ) -> None:
        pairs, tiles = sizes
        weight = operand.w13 if config.swiglu else operand.w2
        # Two E4M3 are a BF16 to the copy engine.
        self.x = Boxes(address, (pairs, weight.num_cols // 2), weight.num_cols // 2, box(config))
        m_tiles = weight.num_rows // (64 * config.m64_per_tile)
        most = tiles * m_tiles // config.cluster
        resident = min(config.per_sm * num_sms(weight.device_index), config.per_sm * CLUSTER_CTAS[config.cluster])
        grid = min(resident // config.cluster, most) * config.cluster
        act_scales, out, schedule = pointers
        args: tuple[Argument, ...] = (
            self.x.argument,
            act_scales,
            pointer(weight.codes),
            pointer(weight.scales),
            pointer(weight.row_scales),
            out,
            schedule,
            *map(c_int, (m_tiles, weight.num_cols // 128, pairs, operand.inter if config.swiglu else operand.hidden)),
            c_float(operand.swiglu_limit),
        )
        self.launch = Launch(load(config, weight.device_index), (grid, 1, 1), args)


class Fp8MoeLaunches:
    """The prepared launches for one size of call. out, scratch: what a call allocates that is given none."""

    def __init__(self, choice: Fp8MoeChoice, key: MoeCallKey, operand: Fp8MoeOperand) -> None:
        num_tokens, num_choices, num_shared, map_length, wide_ids, x_pitch = key
        num_ids = map_length if map_length >= 0 else operand.num_experts - num_shared
        widths = operand.hidden, operand.inter
        sizes = MoeSizes(
            num_tokens, num_choices, num_choices + num_shared, num_ids, operand.num_experts, operand.hidden
        )
        pairs, device_index = sizes.pairs, operand.w13.device_index
        tiles = min(operand.num_experts, pairs) + pairs // choice.tile_rows + 1
        self.places = Scratch.of(pairs, tiles, widths, choice.down.wide)
        self.out = EmptyOutput((num_tokens, operand.hidden), torch.bfloat16, device_index)
        self.scratch = EmptyOutput((self.places.num_bytes,), torch.uint8, device_index)
        self._pointers = Pointers(12)
        x, ids, expert_map, schedule, tokens, token_scales, hidden, rounded, rounded_scales, rows, weights, out = (
            self._pointers.arguments
        )
        self._align = align(
            align_config(wide_ids, map_length >= 0, num_shared, pairs),
            sizes, (choice.tile_rows, 4 + 4 * tiles), (ids, expert_map, schedule), device_index,
        )  # fmt: skip
        self._quantize = QuantizeRowsLaunch(
            QuantizeRowsConfig(True), (num_tokens, operand.hidden, x_pitch), (sizes.slots, pairs),
            (x, schedule, tokens, token_scales), device_index,
        )  # fmt: skip
        self._quantize_hidden = QuantizeRowsLaunch(
            QuantizeRowsConfig(False), (pairs, operand.inter, operand.inter), (1, pairs),
            (hidden, schedule, rounded, rounded_scales), device_index,
        )  # fmt: skip
        self._combine = combine(
            CombineConfig(num_shared, choice.down.wide), sizes, (rows, schedule, weights, out), device_index
        )
        self._operand, self._sizes = operand, (pairs, tiles)
        self._shapes = (
            (choice.gate_up, (token_scales, hidden, schedule)),
            (choice.down, (rounded_scales, rows, schedule)),
        )
        self._products: tuple[ProductLaunch, ProductLaunch] | None = None

    def _new_products(self, *addresses: int) -> tuple[ProductLaunch, ProductLaunch]:
        """Prepares both products with their inputs at these addresses."""
        gate_up, down = (
            ProductLaunch(config, self._operand, self._sizes, address, pointers)
            for (config, pointers), address in zip(self._shapes, addresses, strict=True)
        )
        return gate_up, down

    def start(self, x: int, routing: Routing, scratch: int, out: int, stream: int) -> None:
        """Launches all kernels. x, scratch, out: addresses."""
        ids, expert_map = routing.ids.data_ptr(), routing.expert_map
        mapped = ids if expert_map is None else expert_map.data_ptr()
        at = self.places
        parts = (at.tokens, at.token_scales, at.hidden, at.rounded, at.rounded_scales, at.rows)
        self._pointers.set(
            x, ids, mapped, scratch, *(scratch + part for part in parts), routing.weights.data_ptr(), out
        )
        if self._products is None:
            self._products = self._new_products(scratch + at.tokens, scratch + at.rounded)
        gate_up, down = self._products
        gate_up.x.point_at(scratch + at.tokens)
        down.x.point_at(scratch + at.rounded)
        steps = (self._align, self._quantize.launch, gate_up.launch, self._quantize_hidden.launch, down.launch)
        for step in (*steps, self._combine):
            step.start(stream)
