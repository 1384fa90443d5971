"""The sum over experts that all torch references of routed experts share, whatever their weights' format.

Shape suffixes: T tokens, K experts per token, E experts, D hidden, F expert width, S rows sent to one expert.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F


def sum_dtype(x: torch.Tensor) -> torch.dtype:
    """Returns the dtype in which a product with activations ``x`` is summed: at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


ExpertProduct = Callable[[torch.Tensor, int], torch.Tensor]
"""(rows in the dtype of sums, expert) -> their product with one of the expert's matrices."""


def clamped_swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float) -> torch.Tensor:
    """Computes silu(min(gate, limit)) * clamp(up, -limit, limit), DeepSeek-V4's SwiGLU, in the dtype of its inputs."""
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def mixture(
    x_TD: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    gate_up: ExpertProduct,
    down: ExpertProduct,
    swiglu_limit: float,
) -> torch.Tensor:
    """Sums weighted expert outputs in the order of expert ids."""
    dtype = sum_dtype(x_TD)
    y_TD = torch.zeros_like(x_TD, dtype=dtype)
    for expert in topk_ids_TK[topk_ids_TK >= 0].unique().tolist():
        token_ids, slots = torch.where(topk_ids_TK == expert)
        gate_SF, up_SF = gate_up(x_TD[token_ids].to(dtype), expert).chunk(2, dim=-1)
        hidden_SF = clamped_swiglu(gate_SF, up_SF, swiglu_limit).to(x_TD.dtype).to(dtype)
        out_SD = down(hidden_SF, expert)
        y_TD.index_add_(0, token_ids, out_SD * topk_weights_TK[token_ids, slots, None].to(dtype))
    return y_TD.to(x_TD.dtype)


def with_shared(
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    num_experts: int,
    num_shared: int,
    expert_map: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns local expert ids and weights, with the shared experts appended to every token's."""
    local_TK = local_experts(ids_TK, num_experts - num_shared, expert_map)
    shared_TS = torch.arange(num_experts - num_shared, num_experts, device=ids_TK.device).expand(len(ids_TK), -1)
    ones_TS = torch.ones_like(shared_TS, dtype=weights_TK.dtype)
    return torch.cat([local_TK, shared_TS], dim=1), torch.cat([weights_TK, ones_TS], dim=1)


def local_experts(ids_TK: torch.Tensor, num_routed: int, expert_map: torch.Tensor | None) -> torch.Tensor:
    """Returns int64 ids of the local experts, -1 for others."""
    num_ids = num_routed if expert_map is None else len(expert_map)
    known = (ids_TK >= 0) & (ids_TK < num_ids)
    local = ids_TK.long().clamp(0, num_ids - 1)
    if expert_map is not None:
        local = expert_map.long()[local]
    return torch.where(known, local, -1)
