"""Judges a router's choice of experts and their weights, by the oracle's scores.

Legend: T tokens, E experts, K experts per token.
"""

from dataclasses import dataclass

from torch import Tensor

from ownpath.conformance.bounds import EXP_STEPS, FLOAT32_ROUND, Exact, deviation
from ownpath.oracle.formulas import expert_scores, routing_weights, top_indices


@dataclass(frozen=True)
class RouterRule:
    """The rule of a choice. bias_E: added to the scores that rank; table_TK: the experts of each token, instead."""

    num_chosen: int
    factor: float
    bias_E: Tensor | None = None
    table_TK: Tensor | None = None


class ExpectedChoice:
    """The expected choice of a router. logits: exact ones [T, E], and the bound of their error."""

    def __init__(self, logits: Exact, rule: RouterRule) -> None:
        self.num_chosen, self.factor, self.table_TK = rule.num_chosen, rule.factor, rule.table_TK
        self.scores_TE = expert_scores(logits.value)
        # exp of x is off by |x| steps, from the product in front of it; the root halves the error of softplus.
        self.relative_TE = (EXP_STEPS + logits.value.abs()) * FLOAT32_ROUND + logits.bound / 2
        self.error_TE = self.scores_TE * self.relative_TE
        self.ranked_TE = self.scores_TE
        if rule.bias_E is not None:
            self.ranked_TE = self.scores_TE + rule.bias_E.double()
            self.error_TE = self.error_TE + FLOAT32_ROUND * self.ranked_TE.abs()

    def problem(self, ids_TK: Tensor, weights_TK: Tensor) -> str:
        """Describes what is wrong with a choice; empty if nothing is."""
        shape = (len(self.scores_TE), self.num_chosen)
        if tuple(ids_TK.shape) != shape or tuple(weights_TK.shape) != shape:
            return f"ids {list(ids_TK.shape)} and weights {list(weights_TK.shape)}, not {list(shape)}"
        ids_TK = ids_TK.long()
        if bool(((ids_TK < 0) | (ids_TK >= self.scores_TE.shape[1])).any()):
            return "an id is no expert's"
        return self._wrong_ids(ids_TK) or self._wrong_weights(ids_TK, weights_TK)

    def _wrong_ids(self, ids_TK: Tensor) -> str:
        if self.table_TK is not None:
            wrong = int((ids_TK != self.table_TK).any(-1).sum())
            return f"{wrong} tokens do not get the experts of tid2eid" if wrong else ""
        ordered = ids_TK.sort(-1).values
        if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
            return "an expert is chosen twice"
        order = top_indices(self.ranked_TE, self.num_chosen)
        worst_T1 = self.ranked_TE.gather(1, order)[:, -1:]
        short_TK = worst_T1 - self.ranked_TE.gather(1, ids_TK)
        allowed_TK = self.error_TE.gather(1, ids_TK) + self.error_TE.gather(1, order)[:, -1:]
        if bool((short_TK > allowed_TK).any()):
            return f"an expert is chosen whose score is {float(short_TK.max()):.3g} too small"
        # Equal scores are equal in any precision: the lower ids, in their order.
        equal = (self.ranked_TE == self.ranked_TE[:, :1]).all(-1)
        if bool((ids_TK[equal].sort(-1).values != order[equal].sort(-1).values).any()):
            return "of equal scores, others than the lowest ids are chosen"
        return ""

    def _wrong_weights(self, ids_TK: Tensor, weights_TK: Tensor) -> str:
        relative_TK = self.relative_TE.gather(1, ids_TK)
        exact_TK = routing_weights(self.scores_TE, ids_TK, self.factor)
        # A quotient has its score's error, and no more than the worst score's in its sum.
        bound_TK = exact_TK * (relative_TK + relative_TK.amax(-1, keepdim=True))
        found = deviation(weights_TK, Exact(exact_TK, bound_TK))
        if not found.is_allowed:
            return f"weight {found}"
        off = float((weights_TK.double().sum(-1) - self.factor).abs().max())
        allowed = EXP_STEPS * FLOAT32_ROUND * self.factor
        return "" if off <= allowed else f"weights sum to {self.factor} only within {off:.3g}"
