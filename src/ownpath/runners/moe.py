"""The routed experts' runners."""

from typing import Any

import torch

from ownpath.formats import BF16, FP8_BLOCK, FP32, NVFP4
from ownpath.kernels.registry import KERNELS, Kernel
from ownpath.numerics import mxfp4_scale_as_nvfp4
from ownpath.qtensor import QuantTensor
from ownpath.runners.checks import require, require_input, require_routing
from ownpath.runners.prepare import compile_configs, default_kernel, gate_and_up, prepared, restored_expert

Expert = tuple[QuantTensor, QuantTensor, QuantTensor]
"""w1 (gate), w3 (up) and w2 (down) of one expert, as they are stored."""


class Nvfp4MoE:
    """Top-k mixture of SwiGLU experts with NVFP4 weights.

    Shapes (E experts, D hidden, F expert width): w13 uint8 [E, 2F, D/2], gate rows first; w13_scale E4M3
        [E, 2F, D/16]; w13_scale_2 float32 [E], or [E, 2] when gate and up have their own; w2 uint8 [E, D, F/2];
        w2_scale E4M3 [E, D, F/16]; w2_scale_2 float32 [E]. Global scales are multipliers (ModelOpt's convention).
    On a Hopper GPU the stacks are taken over: they are repacked in place, one expert at a time, so that the experts
    never exist twice. Pass clones of tensors that are needed later.
    Errors: ValueError naming the operand for a wrong dtype, shape or device. Expert ids are not read by the host, which
        would stall a GPU: an id outside the experts contributes nothing.
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
        kernel: Kernel | None = None,
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
        self.hidden_size, self.swiglu_limit = dim, swiglu_limit
        self._kernel = default_kernel("nvfp4_moe", w13) if kernel is None else kernel
        self._codes = w13.view(torch.uint8)
        gate_up, down = (self._codes, w13_scale, w13_scale_2), (w2.view(torch.uint8), w2_scale, w2_scale_2)
        self._operand = prepared(self._kernel, gate_up, down)

    @classmethod
    def from_mxfp4(
        cls,
        w13: torch.Tensor,
        w13_scale: torch.Tensor,
        w2: torch.Tensor,
        w2_scale: torch.Tensor,
        swiglu_limit: float,
        *,
        rooms: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
        **options: Any,
    ) -> "Nvfp4MoE":
        """From MXFP4 experts, exactly: each E8M0 scale becomes two E4M3 ones and a power of two per expert.

        Shapes: w13 uint8 [E, 2F, D/2] and w13_scale E8M0 [E, 2F, D/32], gate rows first; w2 uint8 [E, D, F/2] and
            w2_scale E8M0 [E, D, F/32]. Scales take twice their bytes: 0.5625 a weight instead of 0.53125.
        rooms: where the scales of w13 and w2 are written, E4M3 [E, 2F, D/16] and [E, D, F/16]; the E8M0 ones may be
            their last halves, and are then gone. Without them new memory is taken.
        Errors: ValueError naming the operand and expert whose scales span more than E4M3's 18 powers of two.
        """
        gate_up_scale, gate_up_global = mxfp4_scale_as_nvfp4("w13_scale", w13.view(torch.uint8), w13_scale, rooms[0])
        down_scale, down_global = mxfp4_scale_as_nvfp4("w2_scale", w2.view(torch.uint8), w2_scale, rooms[1])
        return cls(w13, gate_up_scale, gate_up_global, w2, down_scale, down_global, swiglu_limit, **options)

    def compile_configs(self) -> list[Any]:
        """The kernels that calls may launch (without shared experts or an expert map), for compiling ahead."""
        return compile_configs(self._kernel, self._operand)

    def stored_expert(self, expert: int) -> Expert:
        """What the kernel holds of one expert, read back out of its layout; w2's global scale may be there twice."""
        (codes13, scale13, scale13_2), (codes2, scale2, scale2_2) = restored_expert(self._kernel, self._operand, expert)
        gate_up, down = QuantTensor(codes13, scale13, scale13_2, NVFP4), QuantTensor(codes2, scale2, scale2_2, NVFP4)
        return *gate_and_up(gate_up), down

    def workspace(self, num_tokens: int, num_slots: int) -> Any:
        """Scratch that spares calls of up to ``num_tokens`` tokens every allocation; None where none is used.

        num_slots: experts per token, shared ones included.
        """
        make = getattr(self._kernel, "workspace", None)
        return None if make is None else make(*self._operand, num_tokens, num_slots)

    def kernel_arguments(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> tuple[Any, ...]:
        """What a call gives the kernel (without shared experts or an expert map)."""
        return x, topk_ids, topk_weights, *self._operand, self.swiglu_limit

    def __call__(
        self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, **given: Any
    ) -> torch.Tensor:
        """y[t] = sum over slots k of topk_weights[t, k] * expert topk_ids[t, k] of x[t], and the shared experts.

        Shapes: x [T, D]; topk_ids int32 or int64 [T, K]; topk_weights float32 [T, K]; y [T, D] in the dtype of x.
        given: ``num_shared``, how many experts at the end of the stacks are shared: every token goes to them with
            weight 1; ``expert_map`` int32 [global experts], local expert or -1, when this runner holds only some;
            ``workspace`` (Hopper kernels only), so that the call allocates nothing; y is then a view of its ``out``,
            which the next call overwrites.
        """
        require_input(x, self.hidden_size, self._codes)
        require_routing(x, topk_ids, topk_weights)
        y: torch.Tensor = self._kernel(x, topk_ids, topk_weights, *self._operand, self.swiglu_limit, **given)
        return y


class Fp8MoE:
    """Top-k mixture of SwiGLU experts with E4M3 weights in 128 x 128 blocks, by the torch reference.

    Shapes (E experts, D hidden, F expert width, R = ceil(F/128), C = ceil(D/128)): w13 E4M3 [E, 2F, D], gate rows
        first; w13_scale [E, 2, R, C], the grids of gate and up; w2 E4M3 [E, D, F]; w2_scale [E, C, R]. Scales are E8M0
        or float32.
    Errors: ValueError naming the operand for a wrong dtype, shape or device.
    """

    def __init__(
        self,
        w13: torch.Tensor,
        w13_scale: torch.Tensor,
        w2: torch.Tensor,
        w2_scale: torch.Tensor,
        swiglu_limit: float,
        *,
        kernel: Kernel = KERNELS["ref.fp8_moe"],
    ) -> None:
        self.num_experts, rows, dim = w13.shape
        inter = rows // 2
        blocks_F, blocks_D = -(-inter // 128), -(-dim // 128)
        codes, scales = (torch.float8_e4m3fn,), (torch.float8_e8m0fnu, torch.float32)
        require("w13", w13, codes, (self.num_experts, 2 * inter, dim))
        require("w13_scale", w13_scale, scales, (self.num_experts, 2, blocks_F, blocks_D))
        require("w2", w2, codes, (self.num_experts, dim, inter))
        require("w2_scale", w2_scale, scales, (self.num_experts, blocks_D, blocks_F))
        self.hidden_size, self.swiglu_limit = dim, swiglu_limit
        self._operand = ((w13, w13_scale), (w2, w2_scale))
        self._kernel = kernel

    def stored_expert(self, expert: int) -> Expert:
        """What the kernel holds of one expert."""
        gate_up, down = ((codes[expert], scale[expert]) for codes, scale in self._operand)
        return *gate_and_up(QuantTensor(*gate_up, None, FP8_BLOCK)), QuantTensor(*down, None, FP8_BLOCK)

    def __call__(
        self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, **given: Any
    ) -> torch.Tensor:
        """As ``Nvfp4MoE``; given: ``num_shared`` and ``expert_map``."""
        require_input(x, self.hidden_size, self._operand[0][0])
        require_routing(x, topk_ids, topk_weights)
        y: torch.Tensor = self._kernel(x, topk_ids, topk_weights, *self._operand, self.swiglu_limit, **given)
        return y


class PlainMoE:
    """Top-k mixture of SwiGLU experts with unquantised weights, by the torch reference.

    Shapes (E experts, D hidden, F expert width): w13 bfloat16 or float32 [E, 2F, D], gate rows first; w2 [E, D, F].
    Errors: ValueError naming the operand for a wrong dtype, shape or device.
    """

    def __init__(
        self, w13: torch.Tensor, w2: torch.Tensor, swiglu_limit: float, *, kernel: Kernel = KERNELS["ref.plain_moe"]
    ) -> None:
        self.num_experts, rows, dim = w13.shape
        floats = (torch.bfloat16, torch.float32)
        require("w13", w13, floats, (self.num_experts, rows // 2 * 2, dim))
        require("w2", w2, floats, (self.num_experts, dim, rows // 2))
        self.hidden_size, self.swiglu_limit = dim, swiglu_limit
        self.w13, self.w2 = w13, w2
        self._kernel = kernel

    def stored_expert(self, expert: int) -> Expert:
        """What the kernel holds of one expert."""
        fmt = BF16 if self.w13.dtype == torch.bfloat16 else FP32
        gate_up = QuantTensor(self.w13[expert], None, None, fmt)
        return *gate_and_up(gate_up), QuantTensor(self.w2[expert], None, None, fmt)

    def __call__(
        self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, **given: Any
    ) -> torch.Tensor:
        """As ``Nvfp4MoE``; given: ``num_shared`` and ``expert_map``."""
        require_input(x, self.hidden_size, self.w13)
        require_routing(x, topk_ids, topk_weights)
        y: torch.Tensor = self._kernel(x, topk_ids, topk_weights, self.w13, self.w2, self.swiglu_limit, **given)
        return y
