"""Quack's NVFP4 W4A16 product (quack-kernels): dense only, it has no grouped entry."""

from collections.abc import Sequence

import torch

from ownpath.bench.contender import W4A16_MAX_REL_L2, LinearCall, Missing
from ownpath.bench.operands import Nvfp4Operands
from ownpath.bench.peers import missing_package


class QuackNvfp4:
    """``quack.gemm_w4.gemm_w4a16`` with its own choice of tile and split."""

    name = "quack"
    is_peer = True
    max_rel_l2 = W4A16_MAX_REL_L2

    def missing(self, device: str) -> Missing | None:
        """Requires quack-kernels and the CuTe DSL below it."""
        return missing_package("quack", "quack-kernels", device) or missing_package(
            "cutlass", "nvidia-cutlass-dsl", device
        )

    def prepare(self, operands: Nvfp4Operands, num_rows: Sequence[int]) -> LinearCall:
        from quack.gemm_w4 import gemm_w4a16, prepare_w4_weight

        blob, scales = prepare_w4_weight(operands.weight, operands.weight_scale, "nvfp4")
        tensor_scale = float(operands.weight_scale_2)

        def call(x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = gemm_w4a16(x, blob, scales, tensor_scale=tensor_scale, wformat="nvfp4")
            return y

        return call
