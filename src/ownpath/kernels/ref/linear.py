"""Torch reference of the dense products: the definition that faster kernels are proved against.

Shape suffixes: M rows, K in, N out, G head groups, I in per group, R out per group.
Sums are float32 (float64 for float64 inputs); the output is rounded once, to the dtype of x.
"""

import torch
import torch.nn.functional as F

from ownpath.numerics import decode_fp8_block, decode_nvfp4_blocks


def sum_dtype(x: torch.Tensor) -> torch.dtype:
    """dtype in which a product with activations ``x`` is summed: at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def nvfp4_linear(
    x_MK: torch.Tensor, qdata_NK2: torch.Tensor, scale_NK16: torch.Tensor, global_scale_N: torch.Tensor
) -> torch.Tensor:
    """y = (x (E2M1 x E4M3)ᵀ) * global_scale, the scale applied per output row after the product.

    Shapes: x [M, K]; qdata uint8 [N, K/2]; scale E4M3 [N, K/16]; global_scale float32 [N]; y [M, N].
    """
    dtype = sum_dtype(x_MK)
    w_NK = decode_nvfp4_blocks(qdata_NK2, scale_NK16, dtype)
    return (F.linear(x_MK.to(dtype), w_NK) * global_scale_N).to(x_MK.dtype)


def fp8_linear(x_MK: torch.Tensor, qdata_NK: torch.Tensor, scale_NK128: torch.Tensor) -> torch.Tensor:
    """y = x (E4M3 x block scale)ᵀ.

    Shapes: x [M, K]; qdata E4M3 [N, K]; scale E8M0 or float32 [ceil(N/128), ceil(K/128)]; y [M, N].
    """
    dtype = sum_dtype(x_MK)
    return F.linear(x_MK.to(dtype), decode_fp8_block(qdata_NK, scale_NK128, dtype)).to(x_MK.dtype)


def plain_linear(x_MK: torch.Tensor, weight_NK: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """y = x Wᵀ computed and returned in ``out_dtype``, never narrower than x.

    Shapes: x [..., K]; weight [N, K]; y [..., N].
    """
    return F.linear(x_MK.to(out_dtype), weight_NK.to(out_dtype))


def grouped_linear(x_MGI: torch.Tensor, weight_GRI: torch.Tensor) -> torch.Tensor:
    """y[m, g] = W[g] x[m, g] as one batched product. Shapes: x [M, G, I]; weight [G, R, I]; y [M, G, R]."""
    return torch.bmm(x_MGI.transpose(0, 1), weight_GRI.to(x_MGI.dtype).transpose(1, 2)).transpose(0, 1)
