"""The clamped SwiGLU on Hopper: one elementwise launch.

Roofline. 6 * F bytes a row. Limits. bfloat16 or float32, F a multiple of 8. A row's bits never depend on the other rows
of a call.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock

import torch
import triton
import triton.language as tl

from ownpath.kernels.checks import VECTOR_BYTES, check, check_alignment, check_rank
from ownpath.kernels.contract import Config
from ownpath.kernels.dsl.driver import current_stream
from ownpath.kernels.dsl.triton import TritonCall, launch
from ownpath.kernels.empty import EmptyOutput
from ownpath.kernels.launch_cache import LaunchCache
from ownpath.kernels.variants import variant_name

INTERPRETED = triton.knobs.runtime.interpret
FLOATS = (torch.bfloat16, torch.float32)


@triton.jit
def swiglu_kernel(gate_up_ptr, y_ptr, F, limit, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Computes BLOCK outputs of one row."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up_ptr + row * 2 * F + f, mask=f < F, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * F + F + f, mask=f < F, other=0.0).to(tl.float32)
    gate = tl.minimum(gate, limit)
    up = tl.minimum(tl.maximum(up, -limit), limit)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + row * F + f, y.to(y_ptr.dtype.element_ty), mask=f < F)


def swiglu_block(half: int) -> int:
    """Returns the number of outputs of one program."""
    return min(1024, int(triton.next_power_of_2(half)))


SwigluCallKey = tuple[torch.Size, tuple[int, ...], torch.dtype, int]
"""Shape, strides, dtype and device of gate_up."""


@dataclass(frozen=True)
class SwigluOperand:
    """launches: by ``SwigluCallKey``, for inputs that have passed every check."""

    limit: float
    launches: LaunchCache[SwigluCallKey, tuple[TritonCall, EmptyOutput]] = field(
        default_factory=LaunchCache, compare=False
    )
    lock: Lock = field(default_factory=Lock, compare=False)


class TritonSwiglu:
    """silu(min(gate, limit)) * clamp(up, -limit, limit), gate columns first, in float32, rounded once."""

    def prepare(self, limit: float) -> SwigluOperand:
        """Makes the operand."""
        return SwigluOperand(limit)

    def configs(self, operand: SwigluOperand) -> Sequence[Config]:
        """Returns nothing: Triton compiles at the first call."""
        return ()

    def variant(self, gate_up: torch.Tensor, operand: SwigluOperand) -> str:
        """Returns the variant's name, which depends on the width alone."""
        return variant_name("swiglu", block=swiglu_block(gate_up.shape[-1] // 2))

    def run(self, gate_up: torch.Tensor, operand: SwigluOperand, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """Computes y. Shapes: gate_up bfloat16 or float32 [..., 2F], contiguous; y [..., F].

        Errors: ValueError naming the operand for a wrong shape, dtype, device, stride or alignment.
        """
        key = gate_up.shape, gate_up.stride(), gate_up.dtype, gate_up.get_device()
        prepared = operand.launches.get(key)
        if prepared is None:
            return _first(gate_up, operand, key, out)
        call, empty = prepared
        address = gate_up.data_ptr()
        if address % VECTOR_BYTES:
            check_alignment("gate_up_TF2", gate_up)
        if out is None:
            out = empty.new()
        else:
            _check_out(out, gate_up)
        with operand.lock:
            call.start(current_stream(key[3]), address, out.data_ptr())
        return out

    def __call__(self, gate_up: torch.Tensor, limit: float, out: torch.Tensor | None = None) -> torch.Tensor:
        """Computes ``run`` with the signature of the twin."""
        return self.run(gate_up, self.prepare(limit), out=out)


def _check_out(out: torch.Tensor, gate_up: torch.Tensor) -> None:
    *lead, width = gate_up.shape
    check("out", out, (gate_up.dtype,), (*lead, width // 2), gate_up.device)


def _first(gate_up: torch.Tensor, operand: SwigluOperand, key: SwigluCallKey, out: torch.Tensor | None) -> torch.Tensor:
    """Checks everything, launches, and caches the launch of this size."""
    check_rank("gate_up_TF2", gate_up, max(1, gate_up.ndim), INTERPRETED)
    *lead, width = gate_up.shape
    if width % 16:
        raise ValueError(f"gate_up_TF2 must have rows of a multiple of 16 elements, found {width}")
    check("gate_up_TF2", gate_up, FLOATS, tuple(gate_up.shape), gate_up.device)
    if out is None:
        out = gate_up.new_empty(*lead, width // 2)
    else:
        _check_out(out, gate_up)
    call = _first_launch(gate_up, out, operand.limit) if out.numel() else None
    if call is not None:
        operand.launches.add(key, (call, EmptyOutput(out.shape, out.dtype, out.get_device())))
    return out


def _first_launch(gate_up: torch.Tensor, out: torch.Tensor, limit: float) -> TritonCall | None:
    half = out.shape[-1]
    pdl, block = not INTERPRETED, swiglu_block(half)
    grid = (out.numel() // half, triton.cdiv(half, block))
    options = {"BLOCK": block, "PDL": pdl, "num_warps": max(1, block // 256), "launch_pdl": pdl}
    return launch(swiglu_kernel, grid, (gate_up, out, half, limit), options, moving=(0, 1))


SWIGLU = TritonSwiglu()
