"""Torch reference of the NVFP4 products: the twin that faster kernels are compared with.

Shape suffixes: M rows, K in, N out; of experts: T tokens, K experts per token, E experts, D hidden, F expert width,
S rows sent to one expert. Sums are float32 (float64 for float64 inputs); the output is rounded once, to the dtype of x.
"""

import torch
import torch.nn.functional as F

from ownpath.formats import NVFP4
from ownpath.kernels.contract import Routing, StoredExperts, StoredLinear
from ownpath.kernels.mixture import mixture, sum_dtype, with_shared
from ownpath.kernels.reference import ExpertsReference, LinearReference
from ownpath.kernels.shards import fuse_nvfp4
from ownpath.numerics import decode_nvfp4_blocks
from ownpath.qtensor import QuantTensor


def nvfp4_linear(
    x_MK: torch.Tensor, qdata_NK2: torch.Tensor, scale_NK16: torch.Tensor, global_scale_N: torch.Tensor
) -> torch.Tensor:
    """Computes y = (x (E2M1 x E4M3)ᵀ) * global_scale, the scale applied per output row after the product.

    Shapes: x [M, K]; qdata uint8 [N, K/2]; scale E4M3 [N, K/16]; global_scale float32 [N]; y [M, N].
    """
    dtype = sum_dtype(x_MK)
    w_NK = decode_nvfp4_blocks(qdata_NK2, scale_NK16, dtype)
    return (F.linear(x_MK.to(dtype), w_NK) * global_scale_N).to(x_MK.dtype)


def nvfp4_moe(
    x_TD: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    w13: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    w2: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    swiglu_limit: float,
    *,
    num_shared: int = 0,
    expert_map: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes y[t] = sum over chosen experts of weight * w2 swiglu(w13 x[t]), gate rows first in w13.

    Shapes: x [T, D]; topk_ids int [T, K]; topk_weights float32 [T, K]; y [T, D].
        w13: qdata uint8 [E, 2F, D/2], scale E4M3 [E, 2F, D/16], global_scale float32 [E, 2] (gate, up).
        w2: qdata uint8 [E, D, F/2], scale E4M3 [E, D, F/16], global_scale float32 [E].
    The last num_shared experts run for every token, with weight 1. expert_map int32 [global experts]: the expert
    here, or -1. Ids outside the experts contribute nothing. Expert outputs are summed in float32 in the order of
    expert ids, so that the result does not depend on timing.
    """
    inter, dim = w13[0].shape[1] // 2, w2[0].shape[1]

    def gate_up(x_SD: torch.Tensor, expert: int) -> torch.Tensor:
        scale = w13[2][expert, :, None].expand(-1, inter).flatten()
        return nvfp4_linear(x_SD, w13[0][expert], w13[1][expert], scale)

    def down(hidden_SF: torch.Tensor, expert: int) -> torch.Tensor:
        return nvfp4_linear(hidden_SF, w2[0][expert], w2[1][expert], w2[2][expert].expand(dim))

    ids_TK, weights_TK = with_shared(topk_ids_TK, topk_weights_TK, len(w13[0]), num_shared, expert_map)
    return mixture(x_TD, ids_TK, weights_TK, gate_up, down, swiglu_limit)


def _fuse(stored: StoredLinear) -> StoredLinear:
    """Concatenates shards, with a global scale per row; a single shard is used as it is."""
    return StoredLinear((QuantTensor(*fuse_nvfp4(stored), NVFP4),))


def _linear(x_MK: torch.Tensor, operand: StoredLinear) -> torch.Tensor:
    (weight,) = operand.shards
    return nvfp4_linear(x_MK, *_parts(weight))


def _experts(x_TD: torch.Tensor, routing: Routing, operand: StoredExperts) -> torch.Tensor:
    return nvfp4_moe(
        x_TD,
        routing.ids,
        routing.weights,
        _parts(operand.gate_up),
        _parts(operand.down),
        operand.swiglu_limit,
        num_shared=routing.num_shared,
        expert_map=routing.expert_map,
    )


def _parts(weight: QuantTensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    assert weight.scale is not None
    assert weight.global_scale is not None
    return weight.qdata, weight.scale, weight.global_scale


NVFP4_LINEAR = LinearReference(_linear, _fuse)
NVFP4_MOE = ExpertsReference(_experts)
