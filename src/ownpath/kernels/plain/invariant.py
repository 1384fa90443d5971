"""Products with unquantised weights whose bits do not depend on the batch: gate, compressors, indexer, vocabulary.

How it works. One tile for every number of tokens: a program owns ROWS rows of W and TOKENS tokens, and adds the
products in one order along K. Weights are the left operand, so that their rows fill the tensor core's tile.

Why it exists. A library picks different kernels, with different orders of sums, for different numbers of tokens. A plan
that requires batch invariance uses this kernel instead. It reads W once per 16 tokens, which at decode is once.

Roofline. 2 * N * K bytes for each 16 tokens (4 * N * K with float32 weights).

Limits. bfloat16 or float32 on either side, any N and K. Mixed or float32 operands are multiplied in float32.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ownpath.kernels.checks import check
from ownpath.kernels.contract import Config
from ownpath.kernels.plain.operand import PlainKernel, PlainOperand
from ownpath.kernels.variants import variant_name

INTERPRETED = triton.knobs.runtime.interpret
FLOATS = (torch.bfloat16, torch.float32)
ROWS, TOKENS, STEP = 64, 16, 64


@triton.jit(do_not_specialize=["num_tokens"])
def plain_linear_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    num_tokens,
    num_rows,
    x_stride,
    K,
    NARROW: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Computes ROWS outputs of TOKENS tokens."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    k = tl.arange(0, STEP)
    in_n, in_t = (n < num_rows)[:, None], (t < num_tokens)[None, :]
    w_at = w_ptr + n.to(tl.int64)[:, None] * K + k[None, :]
    x_at = x_ptr + t.to(tl.int64)[None, :] * x_stride + k[:, None]
    acc = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    for start in range(0, K, STEP):
        in_k = k < K - start
        w = tl.load(w_at + start, mask=in_n & in_k[None, :], other=0.0)
        x = tl.load(x_at + start, mask=in_t & in_k[:, None], other=0.0)
        if not NARROW:
            w, x = w.to(tl.float32), x.to(tl.float32)
        acc = tl.dot(w, x, acc, input_precision="ieee")
    y_at = y_ptr + t.to(tl.int64)[None, :] * num_rows + n[:, None]
    tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=in_n & in_t)


def _check(x_MK: torch.Tensor, weight_NK: torch.Tensor, out_dtype: torch.dtype) -> None:
    if weight_NK.ndim != 2:
        raise ValueError(f"weight must have 2 dimensions, found shape {list(weight_NK.shape)}")
    num_rows, width = weight_NK.shape
    if x_MK.ndim != 2 or x_MK.shape[1] != width:
        raise ValueError(f"x must be [T, {width}], found {list(x_MK.shape)}")
    if x_MK.dtype not in FLOATS or out_dtype not in FLOATS:
        raise ValueError(f"x and y must be bfloat16 or float32, found {x_MK.dtype} and {out_dtype}")
    check("weight", weight_NK, FLOATS, (num_rows, width), x_MK.device)
    if x_MK.stride(1) != 1:
        raise ValueError(f"x must have contiguous rows, found strides {list(x_MK.stride())}")


def plain_linear_invariant(x: torch.Tensor, weight_NK: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Computes y = x Wᵀ, summed in float32, rounded once to ``out_dtype``; a token's bits do not depend on the others.

    Shapes: x bfloat16 or float32 [..., K], rows may be spaced; weight bfloat16 or float32 [N, K]; y [..., N].
    Errors: ValueError naming the operand for a wrong shape, dtype, device, stride or alignment.
    """
    x_MK = x.flatten(0, -2)
    _check(x_MK, weight_NK, out_dtype)
    num_tokens, width = x_MK.shape
    num_rows = len(weight_NK)
    y_MN = x_MK.new_empty(num_tokens, num_rows, dtype=out_dtype)
    if num_tokens:
        grid = (triton.cdiv(num_rows, ROWS), triton.cdiv(num_tokens, TOKENS))
        plain_linear_kernel[grid](
            x_MK,
            weight_NK,
            y_MN,
            num_tokens,
            num_rows,
            x_MK.stride(0),
            width,
            NARROW=x_MK.dtype == weight_NK.dtype == torch.bfloat16,
            ROWS=ROWS,
            TOKENS=TOKENS,
            STEP=STEP,
            num_warps=4,
            num_stages=4,
        )
    return y_MN.view(*x.shape[:-1], num_rows)


class InvariantPlainKernel(PlainKernel):
    """``plain_linear_invariant`` as a kernel."""

    def configs(self, operand: PlainOperand) -> Sequence[Config]:
        """Returns nothing: Triton compiles at the first call."""
        return ()

    def variant(self, x: torch.Tensor, operand: PlainOperand) -> str:
        """Returns the variant's name, which depends on whether both operands are bfloat16."""
        kind = "plain_bfloat16" if x.dtype == operand.weight_NK.dtype == torch.bfloat16 else "plain_float32"
        return variant_name(kind, rows=ROWS, tokens=TOKENS, step=STEP)


PLAIN_LINEAR = InvariantPlainKernel(plain_linear_invariant)
