"""``cute.fp8_experts``: routed experts on FP8 tensor cores, with E4M3 activations and 4-bit weights, in six launches.

    align -> quantise and spread tokens -> gate_up with SwiGLU -> quantise hidden rows -> down -> combine

Weights are E2M1 codes whose block scales are powers of two: MXFP4, or the NVFP4 that was made from it. See ``layout``
for what that takes, ``gemm_sm90`` for the products and ``nvfp4.moe_sm90`` for the kernels around them. Numerics: the
step ``fp8_inputs`` of ``official``: both products' inputs are rounded to E4M3 with a power-of-two scale per 1 x 128.

A call's scratch is one buffer: schedule; tokens' rows in the experts' order, E4M3 [P, D], and their scales; hidden
rows, bfloat16 [P, F]; the same in E4M3, and their scales; the experts' outputs, float32 or bfloat16 [P, D].
"""

from collections.abc import Callable
from ctypes import c_float, c_int, c_void_p
from dataclasses import dataclass, field
from threading import Lock

import torch

from ownpath.formats import MXFP4, NVFP4
from ownpath.kernels.contract import Config, FusedExpert, Routing, StoredExperts
from ownpath.kernels.dsl.cache import load
from ownpath.kernels.dsl.driver import Argument, Boxes, Launch, Pointers, current_stream, num_sms, pointer
from ownpath.kernels.empty import EmptyOutput
from ownpath.kernels.fp8_experts.choose import SHAPES, Fp8MoeChoice, choose, make
from ownpath.kernels.fp8_experts.config import QUANTIZE_GROUPS, ExpertGemmConfig, QuantizeRowsConfig
from ownpath.kernels.fp8_experts.layout import (
    Window,
    mxfp4_window,
    nvfp4_window,
    pack_codes,
    pack_scales,
    unpack_codes,
    unpack_scales,
)
from ownpath.kernels.launch_cache import LaunchCache
from ownpath.kernels.nvfp4.calls import call_key, check_out
from ownpath.kernels.nvfp4.choose import CLUSTER_CTAS, WIDE_PAIRS
from ownpath.kernels.nvfp4.config import CombineConfig
from ownpath.kernels.nvfp4.launch import (
    PAIRS_PER_ALIGN_CTA,
    PAIRS_PER_ALIGN_WARP,
    MoeCallKey,
    MoeSizes,
    align,
    align_config,
    box,
    combine,
)
from ownpath.kernels.nvfp4.layout import check_scales, gate_up_rows, plain_rows
from ownpath.kernels.nvfp4.linear import require_packable
from ownpath.kernels.nvfp4.moe import MAX_EXPERTS, PART_BYTES
from ownpath.qtensor import QuantTensor

DIM_MULTIPLE = 256


@dataclass(frozen=True)
class PackedCodes:
    """One matrix of every expert in the layout of ``fp8_experts.layout``.

    Shapes: codes uint8 [E * N * K / 2]; scales uint8 [E * N * K / 32]; row_scales float32 [E, N], of packed rows;
        global_scale as stored: float32 [E, 2] or [E]; ``None`` for MXFP4.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    row_scales: torch.Tensor
    global_scale: torch.Tensor | None
    num_rows: int
    num_cols: int

    @property
    def device_index(self) -> int:
        return self.codes.get_device()


@dataclass(frozen=True)
class Fp8MoeOperand:
    """Packed experts. launches: by ``MoeCallKey``."""

    w13: PackedCodes
    w2: PackedCodes
    num_experts: int
    swiglu_limit: float
    launches: "LaunchCache[MoeCallKey, _Launches]" = field(default_factory=LaunchCache, compare=False)
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


class QuantizeLaunch:
    """Prepared launch that quantises rows [count, width]. pointers: x, schedule, out, scales."""

    def __init__(
        self, config: QuantizeRowsConfig, rows: tuple[int, int, int], pairs: tuple[int, int], pointers: tuple[c_void_p, ...],
        device_index: int,
    ) -> None:
        count, width, pitch = rows
        slots, ld_scales = pairs
        args: tuple[Argument, ...] = (*pointers, *map(c_int, (count, slots, width, pitch, ld_scales)))
        grid = -(-count * (width // 128) // QUANTIZE_GROUPS)
        self.launch = Launch(load(config, device_index), (grid, 1, 1), args)


class ProductLaunch:
    """Prepared launch of one product. pointers: the tokens' scales, out, schedule."""

    def __init__(
        self, config: ExpertGemmConfig, operand: Fp8MoeOperand, sizes: tuple[int, int], address: int,
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


class _Launches:
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
        self._quantize = QuantizeLaunch(
            QuantizeRowsConfig(True), (num_tokens, operand.hidden, x_pitch), (sizes.slots, pairs),
            (x, schedule, tokens, token_scales), device_index,
        )  # fmt: skip
        self._quantize_hidden = QuantizeLaunch(
            QuantizeRowsConfig(False), (pairs, operand.inter, operand.inter), (1, pairs),
            (hidden, schedule, rounded, rounded_scales), device_index,
        )  # fmt: skip
        self._combine = combine(
            CombineConfig(num_shared, choice.down.wide), sizes, (rows, schedule, weights, out), device_index
        )
        self._new_products = lambda tokens_at, rounded_at: (
            ProductLaunch(choice.gate_up, operand, (pairs, tiles), tokens_at, (token_scales, hidden, schedule)),
            ProductLaunch(choice.down, operand, (pairs, tiles), rounded_at, (rounded_scales, rows, schedule)),
        )
        self._products: tuple[ProductLaunch, ProductLaunch] | None = None

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


class Fp8ExpertsKernel:
    """Packs experts and runs them."""

    def __init__(self, is_batch_invariant: bool, choose: Callable[..., Fp8MoeChoice] = choose) -> None:
        self.is_batch_invariant = is_batch_invariant
        self._choose = choose

    def prepare(self, stored: StoredExperts) -> Fp8MoeOperand:
        """Repacks the codes in place, one expert at a time, so that two copies of the experts never exist.

        Shapes: as ``StoredExperts``; codes and scales contiguous, on one CUDA device.
        Errors: ValueError naming the operand for sizes that are not multiples of 256, too many experts, a bad block
        scale, or scales that E4M3 cannot take; nothing is repacked then.
        """
        num_experts, hidden = stored.num_experts, stored.hidden_size
        inter = stored.down.shape[2]
        if hidden % DIM_MULTIPLE or inter % DIM_MULTIPLE:
            raise ValueError(f"experts are {hidden} -> {inter}: both must be multiples of {DIM_MULTIPLE}")
        if num_experts > MAX_EXPERTS:
            raise ValueError(f"w13 holds {num_experts} experts, at most {MAX_EXPERTS} are supported")
        for name, side in (("w13", stored.gate_up), ("w2", stored.down)):
            _check_stack(name, side)
        w13 = _pack_stack(stored.gate_up, gate_up_rows(2 * inter))
        w2 = _pack_stack(stored.down, plain_rows(hidden))
        # Kernels read weights before they wait for their predecessor: what wrote them must be over by then.
        torch.cuda.synchronize(w2.codes.device)
        return Fp8MoeOperand(w13, w2, num_experts, stored.swiglu_limit)

    def restore(self, operand: Fp8MoeOperand, expert: int) -> FusedExpert:
        """Reads one expert back."""
        w13 = _restore(operand.w13, gate_up_rows(operand.w13.num_rows), operand.num_experts, expert)
        return w13, _restore(operand.w2, plain_rows(operand.w2.num_rows), operand.num_experts, expert)

    def choose(self, pairs: int, operand: Fp8MoeOperand, num_ids: int = 0) -> Fp8MoeChoice:
        """Chooses the kernels of a call with ``pairs`` (token, slot) pairs. num_ids: of an expert map."""
        num_experts = max(operand.num_experts, num_ids)
        return self._choose(pairs, num_experts, operand.hidden, operand.inter, self.is_batch_invariant)

    def variant(self, x: torch.Tensor, routing: Routing, operand: Fp8MoeOperand) -> str:
        """Returns the names of the products that a call with these arguments launches."""
        pairs = routing.ids.numel() + len(x) * routing.num_shared
        choice = self.choose(pairs, operand, 0 if routing.expert_map is None else len(routing.expert_map))
        return f"{choice.gate_up.name} {choice.down.name}"

    def configs(self, operand: Fp8MoeOperand) -> list[Config]:
        """Returns the configurations of every kernel that a call without shared experts or a map may launch."""
        return self._configs(operand.hidden, operand.inter)

    def planned_configs(self, stored: StoredExperts) -> list[Config]:
        """Returns ``configs`` from the shapes."""
        return self._configs(stored.hidden_size, stored.down.shape[2])

    def _configs(self, hidden: int, inter: int) -> list[Config]:
        counts = (1, PAIRS_PER_ALIGN_WARP, PAIRS_PER_ALIGN_CTA, PAIRS_PER_ALIGN_CTA + 1)
        found: list[Config] = [align_config(wide, False, 0, pairs) for wide in (False, True) for pairs in counts]
        found += [QuantizeRowsConfig(True), QuantizeRowsConfig(False)]
        for wide in (True,) if self.is_batch_invariant else (False, True):
            found.append(CombineConfig(0, wide))
            for _, shape in SHAPES:
                choice = make(shape, hidden, inter, wide)
                found += [choice.gate_up, choice.down]
        return list(dict.fromkeys(found))

    def workspace(self, operand: Fp8MoeOperand, num_tokens: int, num_slots: int) -> torch.Tensor:
        """Allocates scratch for up to ``num_tokens`` tokens. num_slots: experts per token, shared ones included."""
        pairs = num_tokens * num_slots
        # A smaller call may have narrower tiles, hence a longer schedule, and may use float32 outputs.
        tiles = min(operand.num_experts, pairs) + pairs // 8 + 1
        widths = operand.hidden, operand.inter
        wide = Scratch.of(pairs if self.is_batch_invariant else min(pairs, WIDE_PAIRS), tiles, widths, True)
        num_bytes = max(wide.num_bytes, Scratch.of(pairs, tiles, widths, False).num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8, device=operand.w13.codes.device)

    def run(
        self,
        x: torch.Tensor,
        routing: Routing,
        operand: Fp8MoeOperand,
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
            if out is None:
                out = call.out.new()
            if workspace is None:
                workspace = call.scratch.new()
            elif workspace.numel() < call.places.num_bytes:
                needed = f"this call of {num_tokens} tokens needs {call.places.num_bytes}"
                raise ValueError(f"workspace holds {workspace.numel()} bytes, {needed}")
            stream = current_stream(operand.w13.device_index)
            call.start(x.data_ptr(), routing, workspace.data_ptr(), out.data_ptr(), stream)
        return out

    def _new_call(self, key: MoeCallKey, operand: Fp8MoeOperand) -> _Launches:
        num_tokens, num_choices, num_shared, map_length = key[:4]
        if not 0 <= num_shared < operand.num_experts:
            raise ValueError(f"num_shared is {num_shared}, there are {operand.num_experts} experts")
        choice = self.choose(num_tokens * (num_choices + num_shared), operand, map_length)
        return _Launches(choice, key, operand)


def _window(side: QuantTensor, expert: int) -> Window | str:
    assert side.scale is not None
    read = mxfp4_window if side.format is MXFP4 else nvfp4_window
    return read(side.qdata[expert], side.scale[expert])


def _check_stack(name: str, side: QuantTensor) -> None:
    """Errors: ValueError naming a stack that cannot be packed."""
    assert side.scale is not None
    require_packable(name, side.qdata)
    require_packable(f"{name}_scale", side.scale)
    if side.format is NVFP4:
        check_scales(f"{name}_scale", side.scale)
    elif bool((side.scale.view(torch.uint8) == 255).any()):
        raise ValueError(f"{name}_scale holds a NaN block scale")
    for expert in range(len(side.qdata)):
        window = _window(side, expert)
        if isinstance(window, str):
            raise ValueError(f"{name} of expert {expert} has no exact form in E4M3: {window}")


def _pack_stack(side: QuantTensor, rows: torch.Tensor) -> PackedCodes:
    """Packs a checked stack: its codes in place, its scales into a byte for 32 of them."""
    assert side.scale is not None
    codes, placed = side.qdata, rows.to(side.qdata.device)
    num_experts, num_rows, num_cols = side.shape
    scales = torch.empty(num_experts, num_rows * num_cols // 32, dtype=torch.uint8, device=codes.device)
    row_scales = torch.empty(num_experts, num_rows, dtype=torch.float32, device=codes.device)
    for expert in range(num_experts):
        window = _window(side, expert)
        assert not isinstance(window, str)
        if side.format is NVFP4:
            dead = side.scale[expert].view(torch.uint8) & 0x7F == 0
            codes[expert].masked_fill_(dead.repeat_interleave(8, dim=1), 0)
        scales[expert] = pack_scales(window.relative, placed)
        row_scales[expert] = torch.ldexp(_row_scales(side.global_scale, expert, num_rows, codes), window.row_exponents)[placed]
        codes[expert].view(-1).copy_(pack_codes(codes[expert], placed))
    return PackedCodes(codes, scales, row_scales, side.global_scale, num_rows, num_cols)


def _row_scales(global_scale: torch.Tensor | None, expert: int, num_rows: int, like: torch.Tensor) -> torch.Tensor:
    """Returns the stored multiplier of each row, float32 [N]: of gate and up, of the matrix, or 1."""
    if global_scale is None:
        return torch.ones(num_rows, device=like.device)
    stored = global_scale[expert].reshape(-1)
    return stored.repeat_interleave(num_rows // len(stored))


def _restore(weight: PackedCodes, rows: torch.Tensor, num_experts: int, expert: int) -> QuantTensor:
    placed = rows.to(weight.codes.device)
    packed, scales = (part.view(num_experts, -1)[expert] for part in (weight.codes, weight.scales))
    codes = unpack_codes(packed, placed, weight.num_cols)
    multipliers = torch.empty_like(weight.row_scales[expert])
    multipliers[placed] = weight.row_scales[expert]
    shift = torch.log2(multipliers / _row_scales(weight.global_scale, expert, weight.num_rows, codes)).round().int()
    exponents = unpack_scales(scales, placed, weight.num_cols) + shift[:, None]
    if weight.global_scale is None:
        return QuantTensor(codes, (exponents + 127).to(torch.uint8).view(torch.float8_e8m0fnu), None, MXFP4)
    # A block of zeros may have been moved out of E4M3's range; any scale gives the same products.
    powers = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents.clamp(-9, 8))
    scale = powers.repeat_interleave(2, dim=1).to(torch.float8_e4m3fn)
    return QuantTensor(codes, scale, weight.global_scale[expert], NVFP4)


fp8_experts = Fp8ExpertsKernel(is_batch_invariant=False)
fp8_experts_invariant = Fp8ExpertsKernel(is_batch_invariant=True)
