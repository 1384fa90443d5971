"""Torch reference of RMS norm, rounded once, and as DeepSeek's published code rounds it.

Legend: D width.
"""

import torch

from ownpath.kernels.mixture import sum_dtype


def rms_norm(
    x: torch.Tensor, weight_D: torch.Tensor | None, eps: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """y = weight * x / sqrt(mean(x²) + eps) over the last dimension, rounded once; no weight means ones."""
    wide = x.to(sum_dtype(x))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = (y if weight_D is None else y * weight_D.to(y.dtype)).to(x.dtype)
    return y if out is None else out.copy_(y)


def rms_norm_stepwise(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """x * rsqrt(mean(x²) + eps), every operation rounded to the dtype of x, as torch computes it on such tensors.

    There is no weight: the published code norms query heads without one.
    """
    assert weight is None
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
