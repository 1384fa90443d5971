"""RMS norm on Hopper: one launch.

How it works. Each row has a program (short rows share one), which reads it once and keeps it in registers. At decode
sizes the time is launch latency, which programmatic dependent launch overlaps with the end of the previous kernel.

Roofline. 4 * D bytes a row. Limits. bfloat16 or float32, D up to 16384, last dimension contiguous, rows equally spaced.
A row's bits never depend on the other rows of a call.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock

import torch
import triton
import triton.language as tl

from ownpath.kernels.checks import VECTOR_BYTES, check, check_alignment, check_rank
from ownpath.kernels.contract import Config, NormWeights
from ownpath.kernels.dsl.driver import current_stream
from ownpath.kernels.dsl.triton import TritonCall, launch
from ownpath.kernels.empty import EmptyOutput
from ownpath.kernels.launch_cache import LaunchCache
from ownpath.kernels.variants import variant_name

INTERPRETED = triton.knobs.runtime.interpret
MAX_WIDTH = 16384
FLOATS = (torch.bfloat16, torch.float32)


@triton.jit(do_not_specialize=["num_rows", "inner_rows"])
def rms_norm_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    num_rows,
    inner_rows,
    outer_stride,
    row_stride,
    D,
    eps,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Normalises ROWS rows; row r starts at (r // inner_rows) * outer_stride + (r % inner_rows) * row_stride."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # 32 bits, in which a division is short
    r = row.to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = (r < num_rows)[:, None] & (d < D)[None, :]
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    outer, inner = row // inner_rows, row % inner_rows
    start = outer.to(tl.int64) * outer_stride + inner.to(tl.int64) * row_stride
    x = tl.load(x_ptr + start[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
    if HAS_WEIGHT:
        y = y * weight[None, :]
    tl.store(y_ptr + r[:, None] * D + d[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


def _row_steps(x: torch.Tensor) -> tuple[int, int, int]:
    """Returns the strides of x [..., D]: rows of the innermost run, elements from run to run, and from row to row.

    Errors: ValueError naming x when its rows need more than two steps.
    """
    shape, stride = list(x.shape[:-1]), list(x.stride()[:-1])
    runs: list[tuple[int, int]] = []
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size == 1:
            continue
        if runs and step == runs[-1][0] * runs[-1][1]:
            runs[-1] = (runs[-1][0] * size, runs[-1][1])
        else:
            runs.append((size, step))
    if len(runs) > 2:
        raise ValueError(f"x must have rows at one or two regular steps, found strides {list(x.stride())}")
    inner = runs[0] if runs else (1, 0)
    return inner[0], runs[1][1] if len(runs) > 1 else 0, inner[1]


def _check_norm(x: torch.Tensor, weight_D: torch.Tensor | None) -> None:
    if x.ndim == 0:
        raise ValueError("x must have at least one dimension")
    check_rank("x", x, x.ndim, INTERPRETED)
    if x.dtype not in FLOATS:
        raise ValueError(f"x must be bfloat16 or float32, found {x.dtype}")
    dim, vector = x.shape[-1], VECTOR_BYTES // x.element_size()
    if not 0 < dim <= MAX_WIDTH or dim % vector:
        raise ValueError(f"x must have rows of a multiple of {vector} up to {MAX_WIDTH} elements, found {dim}")
    steps = [step for step, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    if x.stride(-1) != 1 or any(step % vector for step in steps):
        raise ValueError(f"x must have contiguous rows at multiples of 16 bytes, found strides {list(x.stride())}")
    check_alignment("x", x)
    if weight_D is not None:
        check("weight_D", weight_D, FLOATS, (dim,), x.device)


def norm_tile(dim: int) -> tuple[int, int, int]:
    """Returns rows of a program, elements of a row with padding, and warps.

    They depend on the width alone, so that a row's sum never depends on the other rows.
    """
    block = int(triton.next_power_of_2(dim))
    rows = max(1, min(8, 2048 // block))
    return rows, block, max(1, min(16, rows * block // 256))


NormCallKey = tuple[torch.Size, tuple[int, ...], torch.dtype, int]
"""Shape, strides, dtype and device of x."""


@dataclass(frozen=True)
class NormOperand:
    """launches: by ``NormCallKey``, for inputs that have passed every check."""

    weights: NormWeights
    launches: LaunchCache[NormCallKey, tuple[TritonCall, EmptyOutput]] = field(
        default_factory=LaunchCache, compare=False
    )
    lock: Lock = field(default_factory=Lock, compare=False)


class RmsNormKernel:
    """y = weight * x / sqrt(mean(x²) + eps) over the last dimension, rounded once; no weight means ones."""

    def prepare(self, weights: NormWeights) -> NormOperand:
        """Makes the operand. The first call raises for a weight that does not fit."""
        return NormOperand(weights)

    def configs(self, operand: NormOperand) -> Sequence[Config]:
        """Returns nothing: Triton compiles at the first call."""
        return ()

    def variant(self, x: torch.Tensor, operand: NormOperand) -> str:
        """Returns the variant's name, which depends on the width alone."""
        rows, block, num_warps = norm_tile(x.shape[-1])
        return variant_name("rms_norm", rows=rows, block=block, warps=num_warps)

    def run(self, x: torch.Tensor, operand: NormOperand, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """Computes y. Shapes: x bfloat16 or float32 [..., D], possibly a slice of wider rows; out as x, contiguous.

        Errors: ValueError naming the operand for a wrong shape, dtype, device, stride or alignment.
        """
        key = x.shape, x.stride(), x.dtype, x.get_device()
        prepared = operand.launches.get(key)
        if prepared is None:
            return self._first(x, operand, key, out)
        call, empty = prepared
        address = x.data_ptr()
        if address % VECTOR_BYTES:
            check_alignment("x", x)
        if out is None:
            out = empty.new()
        else:
            check("out", out, (x.dtype,), tuple(x.shape), x.device)
        with operand.lock:
            call.start(current_stream(key[3]), address, out.data_ptr())
        return out

    def _first(
        self,
        x: torch.Tensor,
        operand: NormOperand,
        key: NormCallKey,
        out: torch.Tensor | None,
    ) -> torch.Tensor:
        weight_D, eps = operand.weights.weight_D, operand.weights.eps
        _check_norm(x, weight_D)
        if out is None:
            out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        check("out", out, (x.dtype,), tuple(x.shape), x.device)
        dim = x.shape[-1]
        num_rows = x.numel() // dim
        if num_rows:
            (rows, block_d, num_warps), pdl = norm_tile(dim), not INTERPRETED
            call = launch(
                rms_norm_kernel,
                (triton.cdiv(num_rows, rows),),
                (x, x if weight_D is None else weight_D, out, num_rows, *_row_steps(x), dim, eps),
                {
                    "ROWS": rows,
                    "BLOCK_D": block_d,
                    "HAS_WEIGHT": weight_D is not None,
                    "PDL": pdl,
                    "num_warps": num_warps,
                    "launch_pdl": pdl,
                },
                moving=(0, 2),
            )
            if call is not None:
                operand.launches.add(key, (call, EmptyOutput(x.shape, x.dtype, x.get_device())))
        return out

    def __call__(
        self, x: torch.Tensor, weight_D: torch.Tensor | None, eps: float, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Computes ``run`` with the signature of the twin."""
        return self.run(x, self.prepare(NormWeights(weight_D, eps)), out=out)


RMS_NORM = RmsNormKernel()
