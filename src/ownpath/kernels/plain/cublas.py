"""Products with unquantised weights through torch's library, which on CUDA is cuBLAS.

These are the small projections that every export leaves in BF16 (gate, compressors, indexer weights, vocabulary). With
BF16 on both sides every product is exact in float32, so that asking cuBLAS for its float32 sums gives what a product
of widened operands would give, at a quarter of the reads.
"""

import torch
import torch.nn.functional as F

from ownpath.kernels.plain.operand import PlainKernel


def plain_linear(x_MK: torch.Tensor, weight_NK: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Computes y = x Wᵀ in ``out_dtype``, never narrower than x. Shapes: x [..., K]; weight [N, K]; y [..., N]."""
    if x_MK.is_cuda and x_MK.dtype == weight_NK.dtype == torch.bfloat16 and out_dtype == torch.float32:
        y = torch.mm(x_MK.flatten(0, -2), weight_NK.T, out_dtype=out_dtype)
        return y.view(*x_MK.shape[:-1], len(weight_NK))
    return F.linear(x_MK.to(out_dtype), weight_NK.to(out_dtype))


PLAIN_LINEAR = PlainKernel(plain_linear)
