"""Torch references of RMS norm: rounded once, and rounded as DeepSeek's published code does.

Legend: D width.
"""

from collections.abc import Callable

import torch

from ownpath.kernels.contract import NormWeights
from ownpath.kernels.mixture import sum_dtype
from ownpath.kernels.reference import Reference, filled


def rms_norm(
    x: torch.Tensor, weight_D: torch.Tensor | None, eps: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Computes y = weight * x / sqrt(mean(x²) + eps) over the last dimension, rounded once; no weight means ones."""
    wide = x.to(sum_dtype(x))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = (y if weight_D is None else y * weight_D.to(y.dtype)).to(x.dtype)
    return y if out is None else out.copy_(y)


def rms_norm_stepwise(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Computes x * rsqrt(mean(x²) + eps), every operation rounded to the dtype of x, as torch does on a GPU.

    On a CPU torch's own root of a few bfloat16 numbers is rounded twice. There is no weight: the published code
    normalises query heads without one.
    """
    assert weight is None
    inside = x.square().mean(-1, keepdim=True) + eps
    return x * torch.rsqrt(inside.to(sum_dtype(x))).to(x.dtype)


class RmsNormReference(Reference):
    """A norm as a kernel. The operand is the weights."""

    def __init__(self, norm: Callable[[torch.Tensor, torch.Tensor | None, float], torch.Tensor]) -> None:
        self._norm = norm

    def prepare(self, weights: NormWeights) -> NormWeights:
        """Returns the weights unchanged."""
        return weights

    def variant(self, x: torch.Tensor, operand: NormWeights) -> None:
        """Returns ``None``: the kernel has no variants."""

    def run(self, x: torch.Tensor, operand: NormWeights, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """Computes y, of the shape and dtype of x."""
        return filled(out, self._norm(x, operand.weight_D, operand.eps))

    def __call__(
        self, x: torch.Tensor, weight_D: torch.Tensor | None, eps: float, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Computes the norm."""
        return filled(out, self._norm(x, weight_D, eps))


RMS_NORM = RmsNormReference(rms_norm)
RMS_NORM_STEPWISE = RmsNormReference(rms_norm_stepwise)
