"""Runners of official numerics: a quantiser in front of a linear, and experts that keep their weights as stored."""

from collections.abc import Callable
from typing import Any

import torch

from ownpath.kernels.official_experts.ref import INPUT_BLOCK, ExpertWeights
from ownpath.kernels.registry import Kernel
from ownpath.numerics import fake_quantize_fp8, nvfp4_codes_times_scales
from ownpath.qtensor import QuantTensor
from ownpath.runners.checks import require, require_input, require_routing
from ownpath.runners.linear import Linear
from ownpath.runners.moe import Expert
from ownpath.runners.prepare import gate_and_up


class QuantizedInput:
    """A linear whose input is quantised first and read back, which any dtype of activations holds exactly."""

    def __init__(self, linear: Linear, quantize: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.linear, self._quantize = linear, quantize
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self._quantize(x))

    def compile_configs(self) -> list[Any]:
        """Those of the linear."""
        configs = getattr(self.linear, "compile_configs", None)
        return [] if configs is None else list(configs())


def quantized_fp8(linear: Linear) -> QuantizedInput:
    """E4M3 with a power-of-two scale per 1 x 128, in front of an FP8 linear: W8A8."""
    return QuantizedInput(linear, lambda x: fake_quantize_fp8(x, INPUT_BLOCK))


def quantized_nvfp4(linear: Linear, input_scale: torch.Tensor) -> QuantizedInput:
    """W4A4 by an NVFP4 linear whose global scales are already multiplied by ``input_scale`` (float32 [])."""
    return QuantizedInput(
        linear,
        lambda x: nvfp4_codes_times_scales(x.reshape(-1, x.shape[-1]), input_scale).view(x.shape),
    )


class OfficialMoE:
    """Top-k mixture of SwiGLU experts, each decoded from its stored format when a token chose it.

    kernel: one of ``ref.moe_quantized_inputs``, ``ref.moe_weight_first``, ``ref.moe_official``.
    Errors: ValueError naming the operand for a wrong shape, dtype or device.
    """

    def __init__(self, w13: ExpertWeights, w2: ExpertWeights, swiglu_limit: float, *, kernel: Kernel) -> None:
        self.num_experts, self.hidden_size = len(w13.qdata), w2.qdata.shape[1]
        if len(w2.qdata) != self.num_experts:
            raise ValueError(f"w2 has {len(w2.qdata)} experts, w13 {self.num_experts}")
        for name, weights in (("w13", w13), ("w2", w2)):
            if weights.input_scale is not None:
                require(f"{name}_input_scale", weights.input_scale, (torch.float32,), (self.num_experts,))
        self.w13, self.w2, self.swiglu_limit = w13, w2, swiglu_limit
        self._kernel = kernel

    def stored_expert(self, expert: int) -> Expert:
        """What the kernel holds of one expert."""
        gate_up, down = (
            QuantTensor(side.qdata[expert], _of(side.scale, expert), _of(side.global_scale, expert), side.format)
            for side in (self.w13, self.w2)
        )
        return *gate_and_up(gate_up), down

    def __call__(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """x [T, D], topk_ids int32 or int64 [T, K], topk_weights at least float32 [T, K] -> y [T, D]."""
        require_input(x, self.hidden_size, self.w13.qdata)
        require_routing(x, topk_ids, topk_weights)
        y: torch.Tensor = self._kernel(x, topk_ids, topk_weights, self.w13, self.w2, self.swiglu_limit)
        return y


def _of(stack: torch.Tensor | None, expert: int) -> torch.Tensor | None:
    return None if stack is None else stack[expert]


class KeyQuantizer:
    """What keys become before attention sees them, all but their last ``num_rotary`` channels."""

    def __init__(self, num_rotary: int, *, kernel: Kernel) -> None:
        self.num_rotary, self._kernel = num_rotary, kernel

    def __call__(self, kv: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self._kernel(kv, self.num_rotary)
        return y


class IndexQuantizer:
    """What index queries and keys become before they are scored."""

    def __init__(self, *, kernel: Kernel) -> None:
        self._kernel = kernel

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self._kernel(x)
        return y
