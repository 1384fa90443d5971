"""Torch reference of the NVFP4 products: the twin that faster kernels are compared with.

Shape suffixes: M rows, K in, N out; of experts: T tokens, K experts per token, E experts, D hidden, F expert width,
S rows sent to one expert. Sums are float32 (float64 for float64 inputs); the output is rounded once, to the dtype of x.
"""

import torch
import torch.nn.functional as F

from ownpath.formats import NVFP4
from ownpath.kernels.checks import require_input, require_routing
from ownpath.kernels.contract import FusedExpert, Routing, StoredExperts, StoredLinear
from ownpath.kernels.mixture import mixture, sum_dtype, with_shared
from ownpath.kernels.reference import Reference, filled
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


class Nvfp4LinearReference(Reference):
    """``nvfp4_linear`` as a kernel; its operand is the stored weight."""

    def prepare(self, stored: StoredLinear) -> StoredLinear:
        """Concatenates shards, with a global scale per row; a single shard is used as it is."""
        return StoredLinear((QuantTensor(*fuse_nvfp4(stored), NVFP4),))

    def restore(self, operand: StoredLinear) -> tuple[QuantTensor, ...]:
        """Returns the operand as one matrix."""
        return operand.shards

    def variant(self, x: torch.Tensor, operand: StoredLinear) -> None:
        """Returns ``None``: the kernel has no variants."""

    def workspace(self, operand: StoredLinear, num_tokens: int) -> None:
        """Returns ``None``: no call needs scratch."""

    def run(
        self,
        x: torch.Tensor,
        operand: StoredLinear,
        *,
        out: torch.Tensor | None = None,
        workspace: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes y [..., N] in the dtype of x. Errors: ValueError naming what is wrong with x."""
        num_rows, width = operand.shape
        require_input(x, width, operand.shards[0].qdata)
        (weight,) = operand.shards
        assert weight.scale is not None
        assert weight.global_scale is not None
        y = nvfp4_linear(x.reshape(-1, width), weight.qdata, weight.scale, weight.global_scale)
        return filled(out, y.view(*x.shape[:-1], num_rows))

    def run_wide(self, x: torch.Tensor, operand: StoredLinear) -> torch.Tensor:
        """Computes y in at least float32."""
        return self.run(x.to(torch.promote_types(x.dtype, torch.float32)), operand)


class Nvfp4MoeReference(Reference):
    """``nvfp4_moe`` as a kernel; its operand is the stored experts."""

    def prepare(self, stored: StoredExperts) -> StoredExperts:
        """Returns the stored experts unchanged."""
        return stored

    def restore(self, operand: StoredExperts, expert: int) -> FusedExpert:
        """Returns one expert's matrices."""
        return operand.gate_up.of_expert(expert), operand.down.of_expert(expert)

    def variant(self, x: torch.Tensor, routing: Routing, operand: StoredExperts) -> None:
        """Returns ``None``: the kernel has no variants."""

    def workspace(self, operand: StoredExperts, num_tokens: int, num_slots: int) -> None:
        """Returns ``None``: no call needs scratch."""

    def run(
        self,
        x: torch.Tensor,
        routing: Routing,
        operand: StoredExperts,
        *,
        out: torch.Tensor | None = None,
        workspace: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes y [T, D] in the dtype of x. Errors: ValueError naming what is wrong with x or the routing."""
        require_input(x, operand.hidden_size, operand.gate_up.qdata)
        require_routing(x, routing.ids, routing.weights)
        y = nvfp4_moe(
            x,
            routing.ids,
            routing.weights,
            _side(operand.gate_up),
            _side(operand.down),
            operand.swiglu_limit,
            num_shared=routing.num_shared,
            expert_map=routing.expert_map,
        )
        return filled(out, y)


def _side(side: QuantTensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    assert side.scale is not None
    assert side.global_scale is not None
    return side.qdata, side.scale, side.global_scale


NVFP4_LINEAR = Nvfp4LinearReference()
NVFP4_MOE = Nvfp4MoeReference()
