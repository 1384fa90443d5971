"""W4A4 runners, for Blackwell: activations too become NVFP4, with the checkpoint's calibrated input scales.

They take one operand more than the W4A16 runners, because a W4A4 product without a calibrated ``input_scale`` has no
meaning. Their kernels were compiled and interpreted but never ran on a device, so that the first runner on a device
proves them there: ``runners.proof`` compares them with their torch twin, and a difference is an error.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ownpath.formats import NVFP4
from ownpath.kernels.nvfp4_sm100.layout import linear_operand, moe_operand, scale_padding, unboxed
from ownpath.kernels.registry import KERNELS, Kernel
from ownpath.qtensor import QuantTensor
from ownpath.runners.checks import require, require_input
from ownpath.runners.linear import Shards
from ownpath.runners.moe import Expert
from ownpath.runners.prepare import gate_and_up
from ownpath.runners.proof import prove_linear, prove_moe

PACKED = (torch.uint8, torch.int8)


class Nvfp4LinearW4A4:
    """Product of an NVFP4 weight, or several fused ones, with activations quantised to NVFP4.

    Shapes: weight uint8 [N, K/2], low nibble = even k (int8 is viewed as uint8); weight_scale E4M3 [N, K/16];
        weight_scale_2 float32 [] or [N], a multiplier (ModelOpt's convention); input_scale float32 [] or [shards],
        also a multiplier. Lists of the first three are fused shards: their rows follow each other in y. The input is
        quantised once, with the largest input scale. x bfloat16 [..., K]; y bfloat16 [..., N].
    Errors: ValueError naming the operand for a wrong dtype, shape or device, K not a multiple of 64, or a scale that
        is not finite and positive; ProofError when the kernel differs from its twin on this device.
    """

    def __init__(
        self,
        weight: Shards,
        weight_scale: Shards,
        weight_scale_2: Shards,
        input_scale: Shards,
        *,
        kernel: Kernel | None = None,
    ) -> None:
        kernel = KERNELS["triton.nvfp4_linear_w4a4_sm100"] if kernel is None else kernel
        weights, scales, globals_ = _listed(weight), _listed(weight_scale), _listed(weight_scale_2)
        if not len(weights) == len(scales) == len(globals_):
            raise ValueError("weight, weight_scale and weight_scale_2 must have the same number of shards")
        for idx, (w, s, g) in enumerate(zip(weights, scales, globals_, strict=True)):
            num_rows, packed = w.shape
            require(f"weight[{idx}]", w, PACKED, (num_rows, weights[0].shape[1]))
            require(f"weight_scale[{idx}]", s, (torch.float8_e4m3fn,), (num_rows, packed // 8))
            require(f"weight_scale_2[{idx}]", g, (torch.float32,), (num_rows,) if g.ndim else ())
        rows = [g.expand(len(w)) for w, g in zip(weights, globals_, strict=True)]
        largest = torch.stack([scale.max() for scale in _listed(input_scale)]).max()
        require("input_scale", largest, (torch.float32,), ())
        codes = _fused([w.view(torch.uint8) for w in weights])
        self.operand = linear_operand(codes, _fused(scales), _fused(rows), largest)
        self.out_features, self.in_features = self.operand.shape
        if codes.is_cuda:
            prove_linear(kernel, codes.device)
        self._kernel = kernel

    def stored(self) -> tuple[QuantTensor, ...]:
        """What the kernel holds, in the stored order. Its global scales [N] have the input's in them."""
        operand, num_groups = self.operand, self.in_features // 16
        scale = unboxed(operand.scale, self.out_features, num_groups)
        return (QuantTensor(operand.codes, scale, operand.alpha, NVFP4),)

    def padding(self) -> torch.Tensor | None:
        """Scales that the kernel may read beyond the matrix."""
        return scale_padding(self.operand.scale, self.out_features, self.in_features // 16)

    def kernel_arguments(self, x: torch.Tensor) -> tuple[Any, ...]:
        """What a call gives the kernel."""
        return x.reshape(-1, self.in_features), self.operand

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        require_input(x, self.in_features, self.operand.codes)
        y: torch.Tensor = self._kernel(x.reshape(-1, self.in_features), self.operand)
        return y.view(*x.shape[:-1], self.out_features)


class Nvfp4MoEW4A4:
    """Top-k mixture of SwiGLU experts, weights and activations NVFP4.

    Shapes (E experts, D hidden, F expert width, both multiples of 128): as ``Nvfp4MoE``, and w13_input_scale float32
        [E], or [E, 2] for gate and up, of which the larger is used; w2_input_scale float32 [E].
    Errors: ValueError naming the operand for a wrong dtype, shape or device, or a scale that is not finite and
        positive; ProofError when the kernels differ from their twin on this device. Expert ids outside [0, E) are
        skipped: those experts live elsewhere.
    """

    def __init__(
        self,
        w13: Sequence[torch.Tensor],
        w2: Sequence[torch.Tensor],
        swiglu_limit: float,
        *,
        kernel: Kernel | None = None,
    ) -> None:
        """w13 and w2: (qdata, scale, global scale, input scale)."""
        kernel = KERNELS["triton.nvfp4_moe_w4a4_sm100"] if kernel is None else kernel
        self.num_experts, rows, packed = w13[0].shape
        dim, inter = 2 * packed, rows // 2
        _require_experts("w13", w13, (2 * inter, dim))
        _require_experts("w2", w2, (dim, inter))
        gate_up_scale = w13[2] if w13[2].ndim == 2 else w13[2][:, None].expand(-1, 2)
        w13_input_scale = w13[3] if w13[3].ndim == 1 else w13[3].amax(dim=1)
        self.operand = moe_operand(
            (w13[0].view(torch.uint8), w13[1], gate_up_scale, w13_input_scale),
            (w2[0].view(torch.uint8), w2[1], w2[2], w2[3]),
            swiglu_limit,
        )
        self.hidden_size = dim
        if w2[0].is_cuda:
            prove_moe(kernel, w2[0].device)
        self._kernel = kernel

    def stored_expert(self, expert: int) -> Expert:
        """What the kernel holds of one expert, in the stored order. Its global scales have the input's in them."""
        operand = self.operand
        gate_up = self._side(operand.w13, operand.w13_scale, operand.w13_alpha, expert)
        return *gate_and_up(gate_up), self._side(operand.w2, operand.w2_scale, operand.w2_alpha, expert)

    def _side(self, codes: torch.Tensor, scale: torch.Tensor, alpha: torch.Tensor, expert: int) -> QuantTensor:
        own = codes.unflatten(0, (self.num_experts, -1))[expert]
        pieces = scale.unflatten(1, (self.num_experts, -1))[:, expert]
        return QuantTensor(own, unboxed(pieces, len(own), own.shape[1] // 8), alpha[expert], NVFP4)

    def kernel_arguments(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> tuple[Any, ...]:
        """What a call gives the kernel."""
        return x, topk_ids, topk_weights, self.operand

    def __call__(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """x bfloat16 [T, D], topk_ids int32 or int64 [T, K], topk_weights float32 [T, K] -> y bfloat16 [T, D]."""
        require_input(x, self.hidden_size, self.operand.w13)
        y: torch.Tensor = self._kernel(x, topk_ids, topk_weights, self.operand)
        return y


def _require_experts(name: str, parts: Sequence[torch.Tensor], shape: tuple[int, int]) -> None:
    qdata, scale, global_scale, input_scale = parts
    num_experts, (n, k) = len(qdata), shape
    require(name, qdata, PACKED, (num_experts, n, k // 2))
    require(f"{name}_scale", scale, (torch.float8_e4m3fn,), (num_experts, n, k // 16))
    for label, scalars in ((f"{name}_scale_2", global_scale), (f"{name}_input_scale", input_scale)):
        pairs = scalars.ndim == 2 and name == "w13"
        require(label, scalars, (torch.float32,), (num_experts, 2) if pairs else (num_experts,))


def _listed(value: Shards) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else list(value)


def _fused(shards: list[torch.Tensor]) -> torch.Tensor:
    return shards[0] if len(shards) == 1 else torch.cat(shards)
