"""``cute.nvfp4_moe``: routed experts in at most five launches, each started while its predecessor drains.

    align -> (permute, for long prompts) -> gate_up with SwiGLU -> down -> combine

See ``moe_sm90`` for the schedule they share and ``gemm_sm90`` for the products. A token's bits depend neither on the
other tokens nor on their number, with one exception: up to 4096 (token, slot) pairs the experts' outputs are summed
before they are rounded to BF16; the invariant kernel always does so.

A call's scratch is one buffer: schedule, then (for long prompts) the rows in the experts' order, bfloat16
[P, D], then the hidden rows, bfloat16 [P, F], then the experts' outputs, float32 or bfloat16 [P, D].
"""

from collections.abc import Callable
from ctypes import c_void_p
from dataclasses import dataclass, field
from threading import Lock

import torch

from ownpath.formats import NVFP4
from ownpath.kernels.contract import Config, FusedExpert, Routing, StoredExperts
from ownpath.kernels.dsl.driver import Boxes, Launch, Pointers, current_stream, num_sms
from ownpath.kernels.empty import EmptyOutput
from ownpath.kernels.launch_cache import LaunchCache
from ownpath.kernels.nvfp4.calls import call_key, check_out
from ownpath.kernels.nvfp4.choose import WIDE_PAIRS, MoeChoice, choose_moe, moe_choice, moe_table
from ownpath.kernels.nvfp4.config import ALIGN_THREADS, CombineConfig, GemmConfig, PermuteConfig
from ownpath.kernels.nvfp4.launch import (
    PAIRS_PER_ALIGN_CTA,
    PAIRS_PER_ALIGN_WARP,
    GemmLaunch,
    MoeCallKey,
    MoeSizes,
    PackedWeight,
    Tiling,
    align,
    align_config,
    box,
    combine,
    permute,
)
from ownpath.kernels.nvfp4.layout import check_scales, gate_up_rows, pack_weight_, plain_rows, unpack_weight
from ownpath.kernels.nvfp4.linear import require_packable
from ownpath.kernels.nvfp4.moe_sliced import PackedExperts, SlicedLaunches, sliced_bytes, sliced_configs
from ownpath.kernels.nvfp4.moe_sliced_config import MAX_SLICED_PAIRS
from ownpath.qtensor import QuantTensor

DIM_MULTIPLE = 128
MAX_EXPERTS = ALIGN_THREADS - 1
PART_BYTES = 256
"""Alignment of the parts of the scratch."""


@dataclass(frozen=True)
class MoeOperand:
    """Packed experts. launches: by ``MoeCallKey``."""

    w13: PackedWeight
    w2: PackedWeight
    num_experts: int
    swiglu_limit: float
    launches: "LaunchCache[MoeCallKey, _AnyLaunches]" = field(default_factory=LaunchCache, compare=False)
    lock: Lock = field(default_factory=Lock, compare=False)

    @property
    def hidden(self) -> int:
        return self.w13.num_cols

    @property
    def inter(self) -> int:
        return self.w2.num_cols


Between = Callable[[c_void_p, int, int], Launch]


class MoeLaunches:
    """The prepared launches for one size of call, and the offsets of the scratch's parts.

    out, scratch: what a call allocates that is given none. between: makes a launch that changes the hidden rows, of
    their address, number and width; the second product reads them without waiting for it (``handover``), so it must not
    let the next kernel start before it has written all.
    """

    def __init__(self, choice: MoeChoice, key: MoeCallKey, operand: MoeOperand, between: Between | None = None) -> None:
        num_tokens, num_choices, num_shared, map_length, wide_ids, x_pitch = key
        num_ids = map_length if map_length >= 0 else operand.num_experts - num_shared
        sizes = MoeSizes(
            num_tokens, num_choices, num_choices + num_shared, num_ids, operand.num_experts, operand.hidden
        )
        pairs, device_index = sizes.pairs, operand.w13.device_index
        tiles = min(operand.num_experts, pairs) + pairs // choice.tile_rows + 1
        self.sorted_at = _align(4 * (4 + 4 * tiles + 2 * pairs + 4))
        self.hidden_at = self.sorted_at + (0 if choice.gate_up.gather else _align(2 * pairs * operand.hidden))
        self.rows_at = self.hidden_at + _align(2 * pairs * operand.inter)
        self.num_bytes = self.rows_at + (4 if choice.is_wide else 2) * pairs * operand.hidden
        self.out = EmptyOutput((num_tokens, operand.hidden), torch.bfloat16, device_index)
        self.scratch = EmptyOutput((self.num_bytes,), torch.uint8, device_index)
        self._pointers = Pointers(9)
        x, ids, expert_map, schedule, ordered, hidden, rows, weights, out = self._pointers.arguments
        aligning = align_config(wide_ids, map_length >= 0, num_shared, pairs)
        tiling = (choice.tile_rows, 4 + 4 * tiles)
        self._before = [align(aligning, sizes, tiling, (ids, expert_map, schedule), device_index)]
        self.sorts = not choice.gate_up.gather
        if self.sorts:
            self._before.append(permute(sizes, (x, schedule, ordered), device_index))
        self._between = [] if between is None else [between(hidden, pairs, operand.inter)]
        combining = CombineConfig(num_shared, choice.is_wide)
        self._combine = combine(combining, sizes, (rows, schedule, weights, out), device_index)
        source = (pairs, operand.hidden) if self.sorts else (num_tokens, x_pitch)
        self._shapes = (
            (choice.gate_up, operand.w13, source, hidden),
            (choice.down, operand.w2, (pairs, operand.inter), rows),
        )
        self._operand, self._tiles, self._schedule = operand, tiles, schedule
        self._products: tuple[GemmLaunch, GemmLaunch] | None = None

    def _new_products(self, x_address: int, hidden_address: int) -> tuple[GemmLaunch, GemmLaunch]:
        """Prepares both products with their inputs at these addresses."""
        found = []
        for (config, weight, (num_rows, pitch), out), address in zip(
            self._shapes, (x_address, hidden_address), strict=True
        ):
            boxes = Boxes(address, (num_rows, weight.num_cols), pitch, box(config))
            tiling = _tiling(config, self._operand, self._tiles)
            found.append(GemmLaunch(config, weight, boxes, tiling, (out, self._schedule)))
        return found[0], found[1]

    def start(self, x: int, routing: Routing, scratch: int, out: int, stream: int) -> None:
        """Launches all kernels. x, scratch, out: addresses."""
        ids, expert_map = routing.ids.data_ptr(), routing.expert_map
        hidden, rows, ordered = scratch + self.hidden_at, scratch + self.rows_at, scratch + self.sorted_at
        mapped = ids if expert_map is None else expert_map.data_ptr()
        self._pointers.set(x, ids, mapped, scratch, ordered, hidden, rows, routing.weights.data_ptr(), out)
        source = ordered if self.sorts else x
        if self._products is None:
            self._products = self._new_products(source, hidden)
        gate_up, down = self._products
        gate_up.x.point_at(source)
        down.x.point_at(hidden)
        for one in self._before:
            one.start(stream)
        gate_up.launch.start(stream)
        for one in self._between:
            one.start(stream)
        down.launch.start(stream)
        self._combine.start(stream)


_AnyLaunches = MoeLaunches | SlicedLaunches


def _tiling(config: GemmConfig, operand: MoeOperand, tiles: int) -> Tiling:
    """Returns the tiling of gate_up (the product with SwiGLU) or down, for at most ``tiles`` tiles of tokens."""
    weight, pitch = (operand.w13, operand.inter) if config.swiglu else (operand.w2, operand.hidden)
    most = tiles * (weight.num_rows // (64 * config.m64_per_tile)) // config.cluster
    grid = min(config.per_sm * num_sms(weight.device_index) // config.cluster, most) * config.cluster
    return Tiling(grid, pitch, 0, operand.swiglu_limit)


def _align(num_bytes: int) -> int:
    return -(-num_bytes // PART_BYTES) * PART_BYTES


class Nvfp4MoeKernel:
    """Packs experts in place and runs them."""

    def __init__(self, is_batch_invariant: bool, choose: Callable[..., MoeChoice] = choose_moe) -> None:
        self.is_batch_invariant = is_batch_invariant
        self._choose = choose

    def prepare(self, stored: StoredExperts) -> MoeOperand:
        """Repacks the stacks in place, one expert at a time, so that two copies of the experts never exist.

        Shapes: as ``StoredExperts``; codes and scales contiguous, on one CUDA device.
        Errors: ValueError naming the operand for sizes that are not multiples of 128, too many experts, or a bad
        block scale; nothing is repacked then.
        """
        num_experts, hidden = stored.num_experts, stored.hidden_size
        inter = stored.down.shape[2]
        if hidden % DIM_MULTIPLE or inter % DIM_MULTIPLE:
            raise ValueError(f"experts are {hidden} -> {inter}: both must be multiples of {DIM_MULTIPLE}")
        if num_experts > MAX_EXPERTS:
            raise ValueError(f"w13 holds {num_experts} experts, at most {MAX_EXPERTS} are supported")
        w13, w2 = _stack("w13", stored.gate_up), _stack("w2", stored.down)
        for (codes, scale, _), order in ((w13, gate_up_rows(2 * inter)), (w2, plain_rows(hidden))):
            placed = order.to(codes.device)
            for expert in range(num_experts):
                pack_weight_(codes[expert], scale[expert], placed)
        both = w2[2][:, None].expand(-1, 2).contiguous()
        gate_up_scale = w13[2].contiguous()
        # Kernels read weights before they wait for their predecessor: what wrote them must be over by then.
        torch.cuda.synchronize(both.device)
        return MoeOperand(
            PackedWeight(w13[0], w13[1], gate_up_scale, 2 * inter, hidden),
            PackedWeight(w2[0], w2[1], both, hidden, inter),
            num_experts,
            stored.swiglu_limit,
        )

    def restore(self, operand: MoeOperand, expert: int) -> FusedExpert:
        """Reads one expert back; the kernel holds the global scale of w2 twice: [2]."""
        sides = (operand.w13, gate_up_rows), (operand.w2, plain_rows)
        w13, w2 = (_restore_stack(weight, rows(weight.num_rows), operand.num_experts, expert) for weight, rows in sides)
        return w13, w2

    def choose(self, pairs: int, operand: MoeOperand, num_ids: int = 0) -> MoeChoice:
        """Chooses the kernels of a call with ``pairs`` (token, slot) pairs.

        num_ids: of an expert map. Pairs of experts elsewhere are skipped: an expert here has as many as if all were.
        """
        num_experts = max(operand.num_experts, num_ids)
        return self._choose(pairs, num_experts, operand.hidden, operand.inter, self.is_batch_invariant)

    def variant(self, x: torch.Tensor, routing: Routing, operand: MoeOperand) -> str:
        """Returns the names of the products that a call with these arguments launches."""
        pairs = routing.ids.numel() + len(x) * routing.num_shared
        num_ids = 0 if routing.expert_map is None else len(routing.expert_map)
        choice = self.choose(pairs, operand, num_ids)
        if choice.sliced:
            wide_ids, mapped = routing.ids.dtype is torch.int64, routing.expert_map is not None
            products, total = sliced_configs(choice.sliced, wide_ids, mapped, routing.num_shared)
            return f"{products.name} {total.name}"
        return f"{choice.gate_up.name} {choice.down.name}"

    def configs(self, operand: MoeOperand) -> list[Config]:
        """Returns the configurations of every kernel that a call without shared experts or a map may launch."""
        return self._configs(operand.hidden, operand.inter)

    def mapped_configs(self, pairs: int, operand: MoeOperand, num_ids: int) -> list[Config]:
        """Returns the configurations of a call with int32 ids through a map of ``num_ids``."""
        choice = self.choose(pairs, operand, num_ids)
        if choice.sliced:
            return list(sliced_configs(choice.sliced, wide_ids=False, mapped=True, num_shared=0))
        found: list[Config] = [align_config(False, True, 0, pairs), choice.gate_up, choice.down]
        found.append(CombineConfig(0, choice.is_wide))
        return found if choice.gate_up.gather else [*found, PermuteConfig()]

    def planned_configs(self, stored: StoredExperts) -> list[Config]:
        """Returns ``configs`` from the shapes."""
        return self._configs(stored.hidden_size, stored.down.shape[2])

    def _configs(self, hidden: int, inter: int) -> list[Config]:
        counts = (1, PAIRS_PER_ALIGN_WARP, PAIRS_PER_ALIGN_CTA, PAIRS_PER_ALIGN_CTA + 1)
        found: list[Config] = [align_config(wide, False, 0, pairs) for wide in (False, True) for pairs in counts]
        found += [PermuteConfig(), CombineConfig(0, True)]
        if not self.is_batch_invariant:
            found.append(CombineConfig(0, False))
        for _, knobs in moe_table(hidden, inter):
            for wide in (True,) if self.is_batch_invariant else (False, True):
                choice = moe_choice(knobs, hidden, inter, wide)
                found += [choice.gate_up, choice.down]
                if choice.sliced and not self.is_batch_invariant:
                    for wide_ids in (False, True):
                        found += sliced_configs(choice.sliced, wide_ids, False, 0)
        return list(dict.fromkeys(found))

    def workspace(self, operand: MoeOperand, num_tokens: int, num_slots: int) -> torch.Tensor:
        """Allocates scratch for up to ``num_tokens`` tokens. num_slots: experts per token, shared ones included."""
        pairs = num_tokens * num_slots
        # A smaller call may have narrower tiles, hence a longer schedule, and may use float32 outputs.
        tiles = min(operand.num_experts, pairs) + pairs // 8 + 1
        row_bytes = 4 * pairs if self.is_batch_invariant else max(4 * min(pairs, WIDE_PAIRS), 2 * pairs)
        parts = (
            4 * (4 + 4 * tiles + 2 * pairs + 4),
            2 * pairs * operand.hidden,
            2 * pairs * operand.inter,
            row_bytes * operand.hidden,
        )
        sliced = sliced_bytes(min(pairs, MAX_SLICED_PAIRS), operand.hidden, operand.inter)
        num_bytes = max(sum(map(_align, parts)), sliced)
        return torch.empty(num_bytes, dtype=torch.uint8, device=operand.w13.codes.device)

    def run(
        self,
        x: torch.Tensor,
        routing: Routing,
        operand: MoeOperand,
        *,
        out: torch.Tensor | None = None,
        workspace: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes y[t] = sum over slots of weight * expert(x[t]), plus the last num_shared experts of x[t].

        Shapes: x bfloat16 [T, D]; routing as ``Routing``; y bfloat16 [T, D], ``out`` if given.
        Errors: ValueError naming a tensor the kernels cannot take. Ids outside the experts contribute nothing.
        """
        key = call_key(x, routing, operand)
        num_tokens = key[0]
        if out is not None:
            check_out(out, num_tokens, operand)
        if not num_tokens:
            return torch.empty_like(x) if out is None else out
        with operand.lock:
            call = operand.launches.get(key) or operand.launches.add(key, self._new_call(key, operand))
            if call.sorts and not x.is_contiguous():
                x = x.contiguous()
            if out is None:
                out = call.out.new()
            if workspace is None:
                workspace = call.scratch.new()
            elif workspace.numel() < call.num_bytes:
                needed = f"this call of {num_tokens} tokens needs {call.num_bytes}"
                raise ValueError(f"workspace holds {workspace.numel()} bytes, {needed}")
            stream = current_stream(operand.w13.device_index)
            call.start(x.data_ptr(), routing, workspace.data_ptr(), out.data_ptr(), stream)
        return out

    def _new_call(self, key: MoeCallKey, operand: MoeOperand) -> "_AnyLaunches":
        num_tokens, num_choices, num_shared, map_length = key[:4]
        if not 0 <= num_shared < operand.num_experts:
            raise ValueError(f"num_shared is {num_shared}, there are {operand.num_experts} experts")
        choice = self.choose(num_tokens * (num_choices + num_shared), operand, map_length)
        if choice.sliced:
            weights = PackedExperts(operand.w13, operand.w2, operand.num_experts, operand.swiglu_limit)
            return SlicedLaunches(choice.sliced, key, weights)
        return MoeLaunches(choice, key, operand)


def _stack(name: str, side: QuantTensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns codes, scales and global scales, checked for repacking in place. Errors: ValueError naming the tensor."""
    assert side.scale is not None
    assert side.global_scale is not None
    require_packable(name, side.qdata)
    require_packable(f"{name}_scale", side.scale)
    check_scales(f"{name}_scale", side.scale)
    return side.qdata, side.scale, side.global_scale


def _restore_stack(weight: PackedWeight, rows: torch.Tensor, num_experts: int, expert: int) -> QuantTensor:
    codes, scales = (part.view(num_experts, -1)[expert] for part in (weight.codes, weight.scales))
    unpacked = unpack_weight(codes, scales, rows.to(codes.device), weight.num_cols)
    return QuantTensor(*unpacked, weight.global_scale[expert], NVFP4)


nvfp4_moe = Nvfp4MoeKernel(is_batch_invariant=False)
nvfp4_moe_invariant = Nvfp4MoeKernel(is_batch_invariant=True)
