"""Torch reference of the routed experts.

Shape suffixes: T tokens, K experts per token, E experts, D hidden, F expert width, S rows sent to one expert.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ownpath.kernels.ref.linear import nvfp4_linear, sum_dtype
from ownpath.numerics import decode_fp8_block

Product = Callable[[torch.Tensor, int], torch.Tensor]
"""(rows in the dtype of sums, expert) -> their product with one of the expert's matrices."""


def swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float) -> torch.Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit): DeepSeek-V4's clamped SwiGLU, in the dtype given."""
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


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
    """y[t] = sum over chosen experts of weight * w2 swiglu(w13 x[t]), gate rows first in w13.

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

    ids_TK, weights_TK = _with_shared(topk_ids_TK, topk_weights_TK, len(w13[0]), num_shared, expert_map)
    return mixture(x_TD, ids_TK, weights_TK, gate_up, down, swiglu_limit)


def fp8_moe(
    x_TD: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    w13: tuple[torch.Tensor, torch.Tensor],
    w2: tuple[torch.Tensor, torch.Tensor],
    swiglu_limit: float,
    *,
    num_shared: int = 0,
    expert_map: torch.Tensor | None = None,
) -> torch.Tensor:
    """As ``nvfp4_moe``, with E4M3 experts that have a scale per 128 x 128.

    Shapes (R = ceil(F/128), C = ceil(D/128)): w13: qdata E4M3 [E, 2F, D], gate rows first, scale E8M0 or float32
        [E, 2, R, C]: gate and up each have their own grid, the last blocks of both may be partial. w2: qdata E4M3
        [E, D, F], scale [E, C, R]. The others as there.
    """

    def gate_up(x_SD: torch.Tensor, expert: int) -> torch.Tensor:
        both = w13[0][expert].unflatten(0, (2, -1))
        return F.linear(x_SD, decode_fp8_block(both, w13[1][expert], x_SD.dtype).flatten(0, 1))

    def down(hidden_SF: torch.Tensor, expert: int) -> torch.Tensor:
        return F.linear(hidden_SF, decode_fp8_block(w2[0][expert], w2[1][expert], hidden_SF.dtype))

    ids_TK, weights_TK = _with_shared(topk_ids_TK, topk_weights_TK, len(w13[0]), num_shared, expert_map)
    return mixture(x_TD, ids_TK, weights_TK, gate_up, down, swiglu_limit)


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
    """As ``nvfp4_moe``, with experts in plain floating point.

    Shapes: w13 bfloat16 or float32 [E, G, D], G = 2F, gate rows first; w2 [E, D, F]; the others as there.
    """

    def gate_up(x_SD: torch.Tensor, expert: int) -> torch.Tensor:
        return F.linear(x_SD, w13_EGD[expert].to(x_SD.dtype))

    def down(hidden_SF: torch.Tensor, expert: int) -> torch.Tensor:
        return F.linear(hidden_SF, w2_EDF[expert].to(hidden_SF.dtype))

    ids_TK, weights_TK = _with_shared(topk_ids_TK, topk_weights_TK, len(w13_EGD), num_shared, expert_map)
    return mixture(x_TD, ids_TK, weights_TK, gate_up, down, swiglu_limit)


def mixture(
    x_TD: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    gate_up: Product,
    down: Product,
    swiglu_limit: float,
) -> torch.Tensor:
    """The sum over experts in the order of their ids, whatever their weights are stored as."""
    dtype = sum_dtype(x_TD)
    y_TD = torch.zeros_like(x_TD, dtype=dtype)
    for expert in topk_ids_TK[topk_ids_TK >= 0].unique().tolist():
        token_ids, slots = torch.where(topk_ids_TK == expert)
        gate_SF, up_SF = gate_up(x_TD[token_ids].to(dtype), expert).chunk(2, dim=-1)
        hidden_SF = swiglu(gate_SF, up_SF, swiglu_limit).to(x_TD.dtype).to(dtype)
        out_SD = down(hidden_SF, expert)
        y_TD.index_add_(0, token_ids, out_SD * topk_weights_TK[token_ids, slots, None].to(dtype))
    return y_TD.to(x_TD.dtype)


def _with_shared(
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    num_experts: int,
    num_shared: int,
    expert_map: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of the experts held here and weights, with the shared experts appended to every token's."""
    local_TK = _local_experts(ids_TK, num_experts - num_shared, expert_map)
    shared_TS = torch.arange(num_experts - num_shared, num_experts, device=ids_TK.device).expand(len(ids_TK), -1)
    ones_TS = torch.ones_like(shared_TS, dtype=weights_TK.dtype)
    return torch.cat([local_TK, shared_TS], dim=1), torch.cat([weights_TK, ones_TS], dim=1)


def _local_experts(ids_TK: torch.Tensor, num_routed: int, expert_map: torch.Tensor | None) -> torch.Tensor:
    """int64 ids of the experts held here, -1 for others."""
    num_ids = num_routed if expert_map is None else len(expert_map)
    known = (ids_TK >= 0) & (ids_TK < num_ids)
    local = ids_TK.long().clamp(0, num_ids - 1)
    if expert_map is not None:
        local = expert_map.long()[local]
    return torch.where(known, local, -1)
