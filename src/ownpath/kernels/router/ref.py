"""Torch references of the router, and of gate and router in one.

Legend: T tokens, D hidden, E experts, K experts per token, V vocabulary.
"""

import sys

import torch
import torch.nn.functional as F

from ownpath.kernels.checks import require_input
from ownpath.kernels.contract import RouterWeights, RouteWeights
from ownpath.kernels.plain.ref import plain_linear
from ownpath.kernels.reference import Reference


def router(
    logits_TE: torch.Tensor,
    num_experts_per_tok: int,
    routed_scaling_factor: float,
    bias_E: torch.Tensor | None = None,
    token_ids_T: torch.Tensor | None = None,
    tid2eid_VK: torch.Tensor | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses ids [T, K] and weights [T, K] that sum to ``routed_scaling_factor``; scores are sqrt(softplus(logits)).

    Either ``bias_E`` shifts the scores for the selection (never the weights; the lower id wins an exact tie), or
    ``tid2eid_VK`` names the experts of each token id. A negative token id marks a padded row: its expert ids are -1 and
    its weights 0.
    """
    scores_TE = F.softplus(logits_TE).sqrt()
    if tid2eid_VK is not None:
        assert token_ids_T is not None
        ids_TK = tid2eid_VK[token_ids_T.clamp(min=0)]
    else:
        assert bias_E is not None
        # A stable sort: the lower expert id wins an exact tie, on every device.
        ranked_TE = (scores_TE + bias_E).sort(dim=-1, descending=True, stable=True).indices
        ids_TK = ranked_TE[:, :num_experts_per_tok]
    weights_TK = scores_TE.gather(1, ids_TK)
    weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True) * routed_scaling_factor
    if token_ids_T is not None:
        is_padded_T1 = (token_ids_T < 0)[:, None]
        ids_TK, weights_TK = ids_TK.masked_fill(is_padded_T1, -1), weights_TK.masked_fill(is_padded_T1, 0.0)
    return (ids_TK, weights_TK) if out is None else (out[0].copy_(ids_TK), out[1].copy_(weights_TK))


class RouterReference(Reference):
    """``router`` as a kernel. The operand is the weights."""

    def prepare(self, weights: RouterWeights) -> RouterWeights:
        """Returns the weights unchanged."""
        return weights

    def variant(self, logits_TE: torch.Tensor, operand: RouterWeights) -> None:
        """Returns ``None``: the kernel has no variants."""

    def run(
        self,
        logits_TE: torch.Tensor,
        token_ids_T: torch.Tensor | None,
        operand: RouterWeights,
        *,
        out: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns ids and weights [T, K]."""
        return router(
            logits_TE,
            operand.num_experts_per_tok,
            operand.routed_scaling_factor,
            operand.bias_E,
            token_ids_T,
            operand.tid2eid_VK,
            out,
        )

    def __call__(
        self,
        logits_TE: torch.Tensor,
        num_experts_per_tok: int,
        routed_scaling_factor: float,
        bias_E: torch.Tensor | None = None,
        token_ids_T: torch.Tensor | None = None,
        tid2eid_VK: torch.Tensor | None = None,
        out: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes ``router``."""
        return router(logits_TE, num_experts_per_tok, routed_scaling_factor, bias_E, token_ids_T, tid2eid_VK, out)


ROUTER = RouterReference()


def route(
    x_TD: torch.Tensor,
    gate_ED: torch.Tensor,
    weights: RouterWeights,
    token_ids_T: torch.Tensor | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes ``router`` of the gate's logits, x times its matrix, in at least float32."""
    num_chosen, factor, bias_E, tid2eid_VK = vars(weights).values()
    return router(gate_logits(x_TD, gate_ED), num_chosen, factor, bias_E, token_ids_T, tid2eid_VK, out)


def gate_logits(x_TD: torch.Tensor, gate_ED: torch.Tensor) -> torch.Tensor:
    """Computes the gate's logits [T, E], at least float32. Errors: ValueError for x that does not fit."""
    require_input(x_TD, gate_ED.shape[1], gate_ED)
    return plain_linear(x_TD, gate_ED, torch.promote_types(x_TD.dtype, torch.float32))


class RouteReference(Reference):
    """``route`` as a kernel. The operand is the weights."""

    max_rows = sys.maxsize

    def prepare(self, weights: RouteWeights) -> RouteWeights:
        """Returns the weights unchanged."""
        return weights

    def variant(self, x_TD: torch.Tensor, operand: RouteWeights) -> None:
        """Returns ``None``: the kernel has no variants."""

    def run(
        self,
        x_TD: torch.Tensor,
        token_ids_T: torch.Tensor | None,
        operand: RouteWeights,
        *,
        out: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns ids and weights [T, K]."""
        return route(x_TD, operand.gate_ED, operand.router, token_ids_T, out)

    def __call__(
        self,
        x_TD: torch.Tensor,
        gate_ED: torch.Tensor,
        weights: RouterWeights,
        token_ids_T: torch.Tensor | None = None,
        out: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes ``route``."""
        return route(x_TD, gate_ED, weights, token_ids_T, out)


ROUTE = RouteReference()
