"""Torch reference of the products with unquantised weights.

Shape suffixes: M rows, K in, N out; of experts: T tokens, K experts per token, E experts, G = 2F gate and up, D hidden,
F expert width, S rows sent to one expert.
"""

import torch
import torch.nn.functional as F

from ownpath.kernels.contract import Routing, StoredExperts
from ownpath.kernels.mixture import mixture, with_shared
from ownpath.kernels.plain.operand import PlainKernel
from ownpath.kernels.reference import ExpertsReference


def plain_linear(x_MK: torch.Tensor, weight_NK: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Computes y = x Wᵀ in ``out_dtype``, never narrower than x.

    Shapes: x [..., K]; weight [N, K]; y [..., N].
    """
    return F.linear(x_MK.to(out_dtype), weight_NK.to(out_dtype))


def plain_moe(
    x_TD: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    w13_EGD: torch.Tensor,
    w2_EDF: torch.Tensor,
    swiglu_limit: float,
    *,
    num_shared: int = 0,
    expert_map: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes as ``nvfp4_moe``, with experts in plain floating point.

    Shapes: w13 bfloat16 or float32 [E, G, D], G = 2F, gate rows first; w2 [E, D, F]; the others as in ``nvfp4_moe``.
    """

    def gate_up(x_SD: torch.Tensor, expert: int) -> torch.Tensor:
        return F.linear(x_SD, w13_EGD[expert].to(x_SD.dtype))

    def down(hidden_SF: torch.Tensor, expert: int) -> torch.Tensor:
        return F.linear(hidden_SF, w2_EDF[expert].to(hidden_SF.dtype))

    ids_TK, weights_TK = with_shared(topk_ids_TK, topk_weights_TK, len(w13_EGD), num_shared, expert_map)
    return mixture(x_TD, ids_TK, weights_TK, gate_up, down, swiglu_limit)


def _experts(x_TD: torch.Tensor, routing: Routing, operand: StoredExperts) -> torch.Tensor:
    return plain_moe(
        x_TD,
        routing.ids,
        routing.weights,
        operand.gate_up.qdata,
        operand.down.qdata,
        operand.swiglu_limit,
        num_shared=routing.num_shared,
        expert_map=routing.expert_map,
    )


PLAIN_LINEAR = PlainKernel(plain_linear)
PLAIN_MOE = ExpertsReference(_experts)
