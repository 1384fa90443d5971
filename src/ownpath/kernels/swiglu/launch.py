"""The clamped SwiGLU on Hopper: one elementwise launch.

Roofline. 6 * F bytes a row. Limits. bfloat16 or float32, F a multiple of 8. A row's bits never depend on the other rows
of a call.
"""

import torch
import triton
import triton.language as tl

from ownpath.kernels.checks import check, check_rank

INTERPRETED = triton.knobs.runtime.interpret
FLOATS = (torch.bfloat16, torch.float32)


@triton.jit
def swiglu_kernel(gate_up_ptr, y_ptr, F, limit, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """BLOCK outputs of one row."""
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
    """Outputs of one program."""
    return min(1024, int(triton.next_power_of_2(half)))


def swiglu(gate_up_TF2: torch.Tensor, limit: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit), gate columns first, in float32, rounded once.

    Shapes: gate_up bfloat16 or float32 [..., 2F], contiguous; y [..., F].
    Errors: ValueError naming the operand for a wrong shape, dtype, device, stride or alignment.
    """
    check_rank("gate_up_TF2", gate_up_TF2, max(1, gate_up_TF2.ndim), INTERPRETED)
    *lead, width = gate_up_TF2.shape
    if width % 16:
        raise ValueError(f"gate_up_TF2 must have rows of a multiple of 16 elements, found {width}")
    check("gate_up_TF2", gate_up_TF2, FLOATS, tuple(gate_up_TF2.shape), gate_up_TF2.device)
    half = width // 2
    if out is None:
        out = gate_up_TF2.new_empty(*lead, half)
    check("out", out, (gate_up_TF2.dtype,), (*lead, half), gate_up_TF2.device)
    if out.numel():
        pdl, block = not INTERPRETED, swiglu_block(half)
        grid = (out.numel() // half, triton.cdiv(half, block))
        swiglu_kernel[grid](
            gate_up_TF2, out, half, limit, BLOCK=block, PDL=pdl, num_warps=max(1, block // 256), launch_pdl=pdl
        )
    return out
