"""The rotary rotation of channel pairs, and the dtype that statistics are computed in."""

import torch


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype for statistics, softmax and sums: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def rotate_pairs(x: torch.Tensor, cos_TF: torch.Tensor, sin_TF: torch.Tensor) -> torch.Tensor:
    """Rotates the last 2F channels of each row in pairs (2i, 2i+1); the channels before them pass unchanged.

    -sin gives the inverse rotation. Computed in at least float32, rounded once, to the dtype of x.

    Shapes: x [T, ..., >= 2F]; cos and sin float32 [T, F], one row per row of x; result as x.
    """
    rotary_dim = 2 * cos_TF.shape[-1]
    passed, rotary = x[..., :-rotary_dim], x[..., -rotary_dim:]
    even, odd = rotary.to(wide_dtype(x.dtype)).unflatten(-1, (-1, 2)).unbind(-1)
    shape = (len(cos_TF), *[1] * (x.ndim - 2), rotary_dim // 2)
    cos, sin = cos_TF.view(shape), sin_TF.view(shape)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return torch.cat((passed, turned.to(x.dtype)), dim=-1)
