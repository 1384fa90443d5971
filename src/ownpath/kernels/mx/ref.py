"""Torch reference of products with MXFP4 and MXFP8 weights, read as they are stored.

Shape suffixes: M rows, K in, N out; of experts: T tokens, K experts per token, D hidden, F expert width, S rows sent to
one expert.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ownpath.kernels.contract import Routing, StoredExperts, StoredLinear
from ownpath.kernels.mixture import mixture, sum_dtype, with_shared
from ownpath.kernels.reference import ExpertsReference, LinearReference
from ownpath.numerics import dequantize
from ownpath.qtensor import QuantTensor


def mx_linear(x_MK: Tensor, weight: QuantTensor) -> Tensor:
    """Computes y = x (codes x block scale)ᵀ, summed in at least float32. Shapes: x [M, K]; weight [N, K]; y [M, N]."""
    dtype = sum_dtype(x_MK)
    return F.linear(x_MK.to(dtype), dequantize(weight, dtype)).to(x_MK.dtype)


def mx_moe(x_TD: Tensor, routing: Routing, experts: StoredExperts) -> Tensor:
    """Computes y[t] = sum over chosen experts of weight * w2 swiglu(w13 x[t]), as ``nvfp4_moe`` does. Shapes: x, y
    [T, D]."""

    def gate_up(x_SD: Tensor, expert: int) -> Tensor:
        return mx_linear(x_SD, experts.gate_up.of_expert(expert))

    def down(hidden_SF: Tensor, expert: int) -> Tensor:
        return mx_linear(hidden_SF, experts.down.of_expert(expert))

    ids_TK, weights_TK = with_shared(
        routing.ids, routing.weights, experts.num_experts, routing.num_shared, routing.expert_map
    )
    return mixture(x_TD, ids_TK, weights_TK, gate_up, down, experts.swiglu_limit)


def _linear(x_MK: Tensor, operand: StoredLinear) -> Tensor:
    parts = [mx_linear(x_MK, shard) for shard in operand.shards]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


MXFP4_LINEAR, MXFP8_LINEAR = LinearReference(_linear), LinearReference(_linear)
MXFP4_MOE, MXFP8_MOE = ExpertsReference(mx_moe), ExpertsReference(mx_moe)
"""One for each format, because records tell kernels apart by what runs them."""
