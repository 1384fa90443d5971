"""Torch reference of experts that round as DeepSeek's published inference code does (see ``official.Step``).

Shape suffixes: T tokens, K experts per token, E experts, D hidden, F expert width, S rows sent to one expert, N rows of
a matrix.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from ownpath.formats import FP8_BLOCK, MXFP4, MXFP8, NVFP4, Format
from ownpath.kernels.checks import require
from ownpath.kernels.contract import Routing, StoredExperts
from ownpath.kernels.mixture import ExpertProduct, clamped_swiglu, local_experts, mixture, sum_dtype
from ownpath.kernels.reference import ExpertsReference
from ownpath.numerics import (
    decode_fp8_block,
    decode_mxfp4_blocks,
    decode_mxfp8_blocks,
    decode_nvfp4_blocks,
    fake_quantize_fp8,
    nvfp4_codes_times_scales,
)

INPUT_BLOCK = 128


@dataclass(frozen=True)
class ExpertWeights:
    """One fused matrix of all experts as stored: gate above up, or down.

    Shapes: qdata [E, N, ...]; scale by format, for FP8 a grid each for gate and up: [E, 2, R, C]; global_scale float32
        [E] or [E, 2] (NVFP4 alone); input_scale float32 [E] (NVFP4 alone).
    """

    format: Format
    qdata: torch.Tensor
    scale: torch.Tensor | None = None
    global_scale: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None

    def matrix(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """Returns [N, K] without the global scale, exact in float32."""
        qdata = self.qdata[expert]
        if self.scale is None:
            return qdata.to(dtype)
        scale = self.scale[expert]
        if self.format is NVFP4:
            return decode_nvfp4_blocks(qdata, scale, dtype)
        if self.format is MXFP4:
            return decode_mxfp4_blocks(qdata, scale, dtype)
        if self.format is MXFP8:
            return decode_mxfp8_blocks(qdata, scale, dtype)
        assert self.format is FP8_BLOCK, self.format
        if scale.ndim == 2:
            return decode_fp8_block(qdata, scale, dtype)
        return decode_fp8_block(qdata.unflatten(0, (len(scale), -1)), scale, dtype).flatten(0, 1)

    def row_scale(self, expert: int) -> torch.Tensor:
        """Returns the multiplier of each row's product: float32 [N], or 1."""
        if self.global_scale is None:
            return torch.ones((), device=self.qdata.device)
        scale = self.global_scale[expert].reshape(-1, 1)
        return scale.expand(-1, self.qdata.shape[1] // len(scale)).flatten()


WeightProduct = Callable[[torch.Tensor, ExpertWeights, int], torch.Tensor]


def exact_product(x_SK: torch.Tensor, weights: ExpertWeights, expert: int) -> torch.Tensor:
    """Computes x Wᵀ, summed in the dtype of x: [S, N]."""
    return F.linear(x_SK, weights.matrix(expert, x_SK.dtype)) * weights.row_scale(expert)


def quantized_product(x_SK: torch.Tensor, weights: ExpertWeights, expert: int) -> torch.Tensor:
    """Computes x Wᵀ with x quantised: to NVFP4 with ``input_scale`` where W is NVFP4, else to E4M3 in blocks of 128."""
    if weights.input_scale is None:
        return exact_product(fake_quantize_fp8(x_SK, INPUT_BLOCK), weights, expert)
    input_scale = weights.input_scale[expert]
    codes_SK = nvfp4_codes_times_scales(x_SK, input_scale)
    return F.linear(codes_SK, weights.matrix(expert, x_SK.dtype)) * (weights.row_scale(expert) * input_scale)


def moe_quantized_inputs(
    x_TD: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    w13: ExpertWeights,
    w2: ExpertWeights,
    swiglu_limit: float,
) -> torch.Tensor:
    """Computes y[t] = sum over chosen experts of weight * w2 q(swiglu(w13 q(x[t]))), q as in ``quantized_product``.

    Shapes: x [T, D]; topk_ids int [T, K]; topk_weights float32 [T, K]; y [T, D]. Ids outside the experts contribute
        nothing.
    """
    gate_up, down = _products(quantized_product, w13, w2)
    return mixture(x_TD, _known(topk_ids_TK, w13), topk_weights_TK, gate_up, down, swiglu_limit)


def moe_weight_first(
    x_TD: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    w13: ExpertWeights,
    w2: ExpertWeights,
    swiglu_limit: float,
) -> torch.Tensor:
    """Computes y[t] = sum over chosen experts of w2 (weight * swiglu(w13 x[t])), products rounded to the dtype of x."""
    products = _products(exact_product, w13, w2)
    return _mixture_weight_first(x_TD, _known(topk_ids_TK, w13), topk_weights_TK, products, swiglu_limit)


def moe_official(
    x_TD: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    w13: ExpertWeights,
    w2: ExpertWeights,
    swiglu_limit: float,
) -> torch.Tensor:
    """Computes ``moe_weight_first`` with quantised inputs of both products, as the published code does."""
    products = _products(quantized_product, w13, w2)
    return _mixture_weight_first(x_TD, _known(topk_ids_TK, w13), topk_weights_TK, products, swiglu_limit)


def _mixture_weight_first(
    x_TD: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    products: tuple[ExpertProduct, ExpertProduct],
    swiglu_limit: float,
) -> torch.Tensor:
    """Computes ``mixture`` with the weight on the hidden rows, and every product's result in the dtype of x."""
    narrow, wide = x_TD.dtype, sum_dtype(x_TD)
    gate_up, down = products
    y_TD = torch.zeros_like(x_TD, dtype=wide)
    for expert in topk_ids_TK[topk_ids_TK >= 0].unique().tolist():
        token_ids, slots = torch.where(topk_ids_TK == expert)
        rounded = gate_up(x_TD[token_ids].to(wide), expert).to(narrow).to(wide)
        gate_SF, up_SF = rounded.chunk(2, dim=-1)
        hidden_SF = topk_weights_TK[token_ids, slots, None].to(wide) * clamped_swiglu(gate_SF, up_SF, swiglu_limit)
        out_SD = down(hidden_SF.to(narrow).to(wide), expert).to(narrow)
        y_TD.index_add_(0, token_ids, out_SD.to(wide))
    return y_TD.to(narrow)


def _products(product: WeightProduct, w13: ExpertWeights, w2: ExpertWeights) -> tuple[ExpertProduct, ExpertProduct]:
    return (lambda x_SD, expert: product(x_SD, w13, expert)), (lambda h_SF, expert: product(h_SF, w2, expert))


def _known(topk_ids_TK: torch.Tensor, w13: ExpertWeights) -> torch.Tensor:
    return torch.where(topk_ids_TK < len(w13.qdata), topk_ids_TK, -1)


MoeFunction = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, ExpertWeights, ExpertWeights, float],
    torch.Tensor,
]
"""One of ``moe_quantized_inputs``, ``moe_weight_first`` and ``moe_official``."""


class OfficialExperts(ExpertsReference):
    """Experts that may read the calibrated scales of their inputs. has_fp8_inputs: they do not, whatever the weights.

    (Without such a scale, inputs are quantised to E4M3.)
    """

    def __init__(self, function: MoeFunction, has_fp8_inputs: bool = False) -> None:
        super().__init__(self._run)
        self._function, self._has_fp8_inputs = function, has_fp8_inputs

    def prepare(self, stored: StoredExperts) -> StoredExperts:
        """Returns the stored experts. Errors: ValueError naming an input scale of a wrong shape or dtype."""
        if self._has_fp8_inputs:
            return replace(stored, gate_up_input_scale=None, down_input_scale=None)
        for name, scale in (("w13", stored.gate_up_input_scale), ("w2", stored.down_input_scale)):
            if scale is not None:
                require(f"{name}_input_scale", scale, (torch.float32,), (stored.num_experts,))
        return stored

    def _run(self, x_TD: torch.Tensor, routing: Routing, operand: StoredExperts) -> torch.Tensor:
        if routing.num_shared:
            raise ValueError("experts of official numerics take no shared experts")
        ids = local_experts(routing.ids, operand.num_experts, routing.expert_map)
        up, down = operand.gate_up, operand.down
        w13 = ExpertWeights(up.format, up.qdata, up.scale, up.global_scale, operand.gate_up_input_scale)
        w2 = ExpertWeights(down.format, down.qdata, down.scale, down.global_scale, operand.down_input_scale)
        return self._function(x_TD, ids, routing.weights, w13, w2, operand.swiglu_limit)


MOE_QUANTIZED_INPUTS = OfficialExperts(moe_quantized_inputs)
MOE_WEIGHT_FIRST = OfficialExperts(moe_weight_first)
MOE_OFFICIAL = OfficialExperts(moe_official)
MOE_FP8_INPUTS = OfficialExperts(moe_quantized_inputs, has_fp8_inputs=True)
MOE_FP8_OFFICIAL = OfficialExperts(moe_official, has_fp8_inputs=True)
