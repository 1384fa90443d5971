"""Experts whose weights E4M3 cannot hold, with inputs rounded to E4M3 all the same: BF16 tensor cores.

The values of E4M3 with a power-of-two scale are BF16 numbers, so the BF16 kernels compute the quantised products
exactly. Tokens are rounded and read back before the first product, hidden rows, in place, between both.
"""

from ctypes import c_int, c_void_p
from dataclasses import dataclass, field, replace

import torch

from ownpath.formats import MXFP4, NVFP4, Format
from ownpath.kernels.contract import Config, FusedExpert, Routing, StoredExperts
from ownpath.kernels.dsl.cache import load
from ownpath.kernels.dsl.driver import Argument, Launch, Pointers, current_stream
from ownpath.kernels.empty import EmptyOutput
from ownpath.kernels.fp8_experts.config import QUANTIZE_GROUPS
from ownpath.kernels.fp8_experts.read_back_config import ReadBackConfig
from ownpath.kernels.launch_cache import LaunchCache
from ownpath.kernels.nvfp4.calls import call_key, check_out
from ownpath.kernels.nvfp4.choose import MoeChoice
from ownpath.kernels.nvfp4.launch import MoeCallKey
from ownpath.kernels.nvfp4.moe import PART_BYTES, MoeLaunches, MoeOperand, Nvfp4MoeKernel
from ownpath.numerics import mxfp4_scale_as_nvfp4
from ownpath.qtensor import QuantTensor


@dataclass(frozen=True)
class ReadBackOperand:
    """Experts packed for BF16 products. reason: why E4M3 cannot hold them. stored: their format in the file."""

    experts: MoeOperand
    reason: str
    stored: Format
    launches: "LaunchCache[MoeCallKey, _ReadBackLaunches]" = field(default_factory=LaunchCache, compare=False)


class _ReadBackLaunches:
    """The prepared launches for one size of call. The scratch begins with the rounded tokens, bfloat16 [T, D]."""

    def __init__(self, choice: MoeChoice, key: MoeCallKey, experts: MoeOperand) -> None:
        num_tokens, _, _, _, _, x_pitch = key
        device_index = experts.w13.device_index
        self._at = -(-2 * num_tokens * experts.hidden // PART_BYTES) * PART_BYTES
        self._pointers = Pointers(2)
        x, rounded = self._pointers.arguments
        self._round = _launch((x, rounded), (num_tokens, experts.hidden, x_pitch), device_index)
        self._inner = MoeLaunches(
            choice, (*key[:5], experts.hidden), experts,
            lambda hidden, count, width: _launch((hidden, hidden), (count, width, width), device_index),
        )  # fmt: skip
        self.num_bytes = self._at + self._inner.num_bytes
        self.out = self._inner.out
        self.scratch = EmptyOutput((self.num_bytes,), torch.uint8, device_index)

    def start(self, x: int, routing: Routing, scratch: int, out: int, stream: int) -> None:
        """Launches all kernels. x, scratch, out: addresses."""
        self._pointers.set(x, scratch)
        self._round.start(stream)
        self._inner.start(scratch, routing, scratch + self._at, out, stream)


def _launch(pointers: tuple[c_void_p, c_void_p], rows: tuple[int, int, int], device_index: int) -> Launch:
    """Prepares the rounding of rows. rows: their number, width and pitch."""
    args: tuple[Argument, ...] = (*pointers, *map(c_int, rows))
    grid = -(-rows[0] * (rows[1] // 128) // QUANTIZE_GROUPS)
    return Launch(load(ReadBackConfig(), device_index), (grid, 1, 1), args)


class ReadBackKernel:
    """The BF16 kernels with rounded inputs."""

    def __init__(self, inner: Nvfp4MoeKernel) -> None:
        self._inner = inner

    def prepare(self, stored: StoredExperts, reason: str) -> ReadBackOperand:
        """Packs the experts. Errors: ScaleSpanError for MXFP4 scales that NVFP4 cannot hold either."""
        sides = (("w13_scale", stored.gate_up), ("w2_scale", stored.down))
        gate_up, down = (_as_nvfp4(name, side) for name, side in sides)
        experts = self._inner.prepare(replace(stored, gate_up=gate_up, down=down))
        return ReadBackOperand(experts, reason, stored.down.format)

    def restore(self, operand: ReadBackOperand, expert: int) -> FusedExpert:
        """Reads one expert back, in its stored format."""
        gate_up, down = self._inner.restore(operand.experts, expert)
        return (gate_up, down) if operand.stored is NVFP4 else (_as_mxfp4(gate_up), _as_mxfp4(down))

    def variant(self, x: torch.Tensor, routing: Routing, operand: ReadBackOperand) -> str:
        """Returns the names of the products that a call launches."""
        choice = self._choose(call_key(x, routing, operand.experts), operand.experts)
        return f"{ReadBackConfig().name} {choice.gate_up.name} {choice.down.name}"

    def configs(self, operand: ReadBackOperand) -> list[Config]:
        """Returns the configurations of every kernel that a call without shared experts or a map may launch."""
        return [ReadBackConfig(), *self._inner.configs(operand.experts)]

    def workspace(self, operand: ReadBackOperand, num_tokens: int, num_slots: int) -> torch.Tensor:
        """Allocates scratch for up to ``num_tokens`` tokens."""
        inner = self._inner.workspace(operand.experts, num_tokens, num_slots).numel()
        num_bytes = 2 * num_tokens * operand.experts.hidden + PART_BYTES + inner
        return torch.empty(num_bytes, dtype=torch.uint8, device=operand.experts.w13.codes.device)

    def run(
        self,
        x: torch.Tensor,
        routing: Routing,
        operand: ReadBackOperand,
        out: torch.Tensor | None,
        workspace: torch.Tensor | None,
    ) -> torch.Tensor:
        """Computes the experts. Errors: ValueError naming a tensor the kernels cannot take."""
        experts = operand.experts
        key = call_key(x, routing, experts)
        if out is not None:
            check_out(out, key[0], experts)
        if not key[0]:
            return torch.empty_like(x) if out is None else out
        with experts.lock:
            call = operand.launches.get(key)
            if call is None:
                call = operand.launches.add(key, _ReadBackLaunches(self._choose(key, experts), key, experts))
            out = call.out.new() if out is None else out
            workspace = call.scratch.new() if workspace is None else workspace
            if workspace.numel() < call.num_bytes:
                raise ValueError(f"workspace holds {workspace.numel()} bytes, this call needs {call.num_bytes}")
            stream = current_stream(experts.w13.device_index)
            call.start(x.data_ptr(), routing, workspace.data_ptr(), out.data_ptr(), stream)
        return out

    def _choose(self, key: MoeCallKey, experts: MoeOperand) -> MoeChoice:
        num_tokens, num_choices, num_shared, map_length = key[:4]
        choice = self._inner.choose(num_tokens * (num_choices + num_shared), experts, map_length)
        # Slices keep hidden rows in registers, where nothing can round them in between.
        return replace(choice, sliced=None)


def _as_nvfp4(name: str, side: QuantTensor) -> QuantTensor:
    if side.format is not MXFP4:
        return side
    assert side.scale is not None
    scale, factor = mxfp4_scale_as_nvfp4(name, side.qdata, side.scale, None)
    return QuantTensor(side.qdata, scale, factor[:, None].repeat(1, 2) if name == "w13_scale" else factor, NVFP4)


def _as_mxfp4(side: QuantTensor) -> QuantTensor:
    """Undoes ``_as_nvfp4`` for one expert."""
    assert side.scale is not None
    assert side.global_scale is not None
    exponents = torch.log2(side.scale[:, ::2].float() * side.global_scale.flatten()[0]).round()
    return QuantTensor(side.qdata, (exponents + 127).to(torch.uint8).view(torch.float8_e8m0fnu), None, MXFP4)
