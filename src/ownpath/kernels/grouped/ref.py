"""Torch reference of ``wo_a``: one matrix per group of heads, behind the inverse rotation.

Legend: M rows, T tokens, N heads, H head dim, A angles (half the rotary channels), G head groups, I = N * H / G inputs
per group, R outputs per group.
"""

import torch

from ownpath.formats import BF16, FP32
from ownpath.kernels.contract import StoredGroups
from ownpath.kernels.mixture import sum_dtype
from ownpath.kernels.reference import Reference
from ownpath.numerics import decode_fp8_block
from ownpath.qtensor import QuantTensor


def grouped_linear(x_MGI: torch.Tensor, weight_GRI: torch.Tensor) -> torch.Tensor:
    """Computes y[m, g] = W[g] x[m, g] as a batched product. Shapes: x [M, G, I]; weight [G, R, I]; y [M, G, R]."""
    return torch.bmm(x_MGI.transpose(0, 1), weight_GRI.to(x_MGI.dtype).transpose(1, 2)).transpose(0, 1)


def rope_inverse(x: torch.Tensor, cos_TA: torch.Tensor, sin_TA: torch.Tensor) -> torch.Tensor:
    """Rotates the last 2A channels of x [T, ..., H], in pairs (2i, 2i+1), back by their angles. A may be 0."""
    num_passed = x.shape[-1] - 2 * cos_TA.shape[-1]
    even, odd = x[..., num_passed:].to(sum_dtype(x)).unflatten(-1, (cos_TA.shape[-1], 2)).unbind(-1)
    shape = (len(cos_TA), *[1] * (x.ndim - 2), cos_TA.shape[-1])
    cos, sin = cos_TA.view(shape), -sin_TA.view(shape)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return torch.cat((x[..., :num_passed], turned.to(x.dtype)), dim=-1)


def rope_grouped_linear(
    o_TNH: torch.Tensor,
    cos_TA: torch.Tensor,
    sin_TA: torch.Tensor,
    weight_GRI: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes y[t, g] = W[g] u[t, g], where u is the attention output with the rotation of its channels undone.

    Shapes: o [T, N, H]; cos and sin float32 [T, A]; weight [G, R, I]; y [T, G, R].
    """
    u_TGI = rope_inverse(o_TNH, cos_TA, sin_TA).flatten(1).unflatten(-1, (len(weight_GRI), -1))
    weight_GIR = weight_GRI.to(u_TGI.dtype).transpose(1, 2)
    y_TGR = torch.bmm(u_TGI.transpose(0, 1), weight_GIR).transpose(0, 1)
    return y_TGR if out is None else out.copy_(y_TGR)


def rope_grouped_linear_fp8(
    o_TNH: torch.Tensor,
    cos_TA: torch.Tensor,
    sin_TA: torch.Tensor,
    weight_GRI: torch.Tensor,
    scale: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes ``rope_grouped_linear`` for E4M3 matrices with a scale per 128 x 128, decoded in the dtype of sums.

    scale: E8M0 or float32 [ceil(G * R / 128), ceil(I / 128)].
    """
    dtype = sum_dtype(o_TNH)
    u_TGI = rope_inverse(o_TNH, cos_TA, sin_TA).flatten(1).unflatten(-1, (len(weight_GRI), -1))
    decoded = decode_fp8_block(weight_GRI.flatten(0, 1), scale, dtype).view(weight_GRI.shape)
    y_TGR: torch.Tensor = grouped_linear(u_TGI.to(dtype), decoded).to(o_TNH.dtype)
    return y_TGR if out is None else out.copy_(y_TGR)


class GroupedLinearReference(Reference):
    """``rope_grouped_linear`` as a kernel. The operand is the weight, bfloat16 or float32 [G, R, I]."""

    def prepare(self, stored: StoredGroups) -> torch.Tensor:
        """Returns the matrices unchanged."""
        return stored.matrix.qdata.view(stored.shape)

    def restore(self, operand: torch.Tensor) -> tuple[QuantTensor, ...]:
        """Returns the rows of all groups."""
        return (QuantTensor(operand.flatten(0, 1), None, None, BF16 if operand.dtype == torch.bfloat16 else FP32),)

    def variant(self, o_TNH: torch.Tensor, operand: torch.Tensor) -> None:
        """Returns ``None``: the kernel has no variants."""

    def run(
        self,
        o_TNH: torch.Tensor,
        cos_TA: torch.Tensor,
        sin_TA: torch.Tensor,
        operand: torch.Tensor,
        *,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes y [T, G, R] for o [T, N, H]."""
        return rope_grouped_linear(o_TNH, cos_TA, sin_TA, operand, out)

    def __call__(
        self,
        o_TNH: torch.Tensor,
        cos_TA: torch.Tensor,
        sin_TA: torch.Tensor,
        weight_GRI: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes ``rope_grouped_linear``."""
        return rope_grouped_linear(o_TNH, cos_TA, sin_TA, weight_GRI, out)


GROUPED_LINEAR = GroupedLinearReference()
