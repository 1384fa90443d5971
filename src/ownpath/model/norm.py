"""RMS normalisation, with a weight and without."""

from dataclasses import dataclass

import torch


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype for statistics and softmax: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def unweighted_rms_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) over the last dimension, computed in at least float32, in the dtype of x."""
    wide = x.to(wide_dtype(x.dtype))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


@dataclass(frozen=True)
class RMSNorm:
    """y = weight * x / sqrt(mean(x²) + eps); rounded once, after the weight (stored BF16, used as float32)."""

    weight: torch.Tensor
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(wide_dtype(x.dtype))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight.to(wide.dtype)).to(x.dtype)
