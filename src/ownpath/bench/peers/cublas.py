"""cuBLAS in bfloat16, through torch: the choice of an engine that dequantises its weights once."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F

from ownpath.bench.contender import W4A16_MAX_REL_L2, LinearCall, Missing
from ownpath.bench.operands import Fp8Operands, Nvfp4Operands
from ownpath.bench.peers import missing_package
from ownpath.numerics import decode_fp8_block, decode_nvfp4_blocks


class _Cublas:
    name = "cublas bf16"
    is_peer = True
    max_rel_l2 = W4A16_MAX_REL_L2

    def missing(self, device: str) -> Missing | None:
        """Returns None on CUDA: cuBLAS is part of torch."""
        return missing_package("torch", "torch", device)


class CublasNvfp4(_Cublas):
    """The NVFP4 weight rounded to bfloat16; multiplying by the global scale makes that inexact."""

    def prepare(self, operands: Nvfp4Operands, num_rows: Sequence[int]) -> LinearCall:
        values = decode_nvfp4_blocks(operands.weight, operands.weight_scale) * operands.weight_scale_2
        return partial(_linear, values.to(torch.bfloat16))


class CublasFp8(_Cublas):
    """The FP8 weight in bfloat16, exactly."""

    def prepare(self, operands: Fp8Operands, num_rows: Sequence[int]) -> LinearCall:
        return partial(_linear, decode_fp8_block(operands.weight, operands.scale).to(torch.bfloat16))


def _linear(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weight)
