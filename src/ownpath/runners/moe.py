"""The routed experts' runner."""

import torch

from ownpath.kernels.registry import KERNELS, Kernel
from ownpath.runners.checks import require, require_input


class Nvfp4MoE:
    """Top-k mixture of SwiGLU experts with NVFP4 weights.

    Shapes (E experts, D hidden, F expert width): w13 uint8 [E, 2F, D/2], gate rows first; w13_scale E4M3
        [E, 2F, D/16]; w13_scale_2 float32 [E], or [E, 2] when gate and up have their own; w2 uint8 [E, D, F/2];
        w2_scale E4M3 [E, D, F/16]; w2_scale_2 float32 [E]. Global scales are multipliers (ModelOpt's convention).
    Errors: ValueError naming the operand for a wrong dtype, shape or device. Expert ids must lie in [0, E); looking
        at their values would stall a GPU, so that they are not checked here but where they are made or loaded.
    """

    def __init__(
        self,
        w13: torch.Tensor,
        w13_scale: torch.Tensor,
        w13_scale_2: torch.Tensor,
        w2: torch.Tensor,
        w2_scale: torch.Tensor,
        w2_scale_2: torch.Tensor,
        swiglu_limit: float,
        *,
        kernel: Kernel = KERNELS["ref.nvfp4_moe"],
    ) -> None:
        self.num_experts, rows, packed = w13.shape
        dim, inter = 2 * packed, rows // 2
        packed_dtypes = (torch.uint8, torch.int8)
        require("w13", w13, packed_dtypes, (self.num_experts, 2 * inter, dim // 2))
        require("w13_scale", w13_scale, (torch.float8_e4m3fn,), (self.num_experts, 2 * inter, dim // 16))
        shared = (self.num_experts, 2) if w13_scale_2.ndim == 2 else (self.num_experts,)
        require("w13_scale_2", w13_scale_2, (torch.float32,), shared)
        require("w2", w2, packed_dtypes, (self.num_experts, dim, inter // 2))
        require("w2_scale", w2_scale, (torch.float8_e4m3fn,), (self.num_experts, dim, inter // 16))
        require("w2_scale_2", w2_scale_2, (torch.float32,), (self.num_experts,))
        if w13_scale_2.ndim == 1:
            w13_scale_2 = w13_scale_2[:, None].expand(-1, 2)
        self.w13 = (w13.view(torch.uint8), w13_scale, w13_scale_2)
        self.w2 = (w2.view(torch.uint8), w2_scale, w2_scale_2)
        self.hidden_size, self.swiglu_limit = dim, swiglu_limit
        self._kernel = kernel

    def __call__(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """x [T, D], topk_ids int32 or int64 [T, K], topk_weights float32 [T, K] -> y [T, D] in the dtype of x."""
        require_input(x, self.hidden_size, self.w13[0])
        routed = (x.shape[0], topk_ids.shape[-1])
        require("topk_ids", topk_ids, (torch.int32, torch.int64), routed)
        require("topk_weights", topk_weights, (torch.float32, torch.float64), routed)
        y: torch.Tensor = self._kernel(x, topk_ids, topk_weights, self.w13, self.w2, self.swiglu_limit)
        return y
