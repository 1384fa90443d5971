"""K05: checks the router on hard logits: exact ties, very small scores, a bias that dwarfs them, token tables.

Legend: T tokens, E experts, K experts per token.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ownpath.conformance.bounds import EXP_STEPS, FLOAT32_ROUND, Exact, deviation
from ownpath.conformance.exact import product
from ownpath.finding import Finding
from ownpath.ops import OpKind
from ownpath.oracle.formulas import expert_scores, routing_weights, top_indices
from ownpath.runners import Router
from ownpath.verify.kernels.operands import weight_of
from ownpath.verify.kernels.probe import Probe
from ownpath.verify.kernels.tally import Tally, error_of

ROWS = 67
VERY_NEGATIVE = -80.0
"""A very small logit: below -87, exp is subnormal in float32; no gate comes near."""
HUGE_BIAS = 1e4
REMEDY = "bias shifts the choice alone, never the weights; the lower id wins a tie; hash layers read tid2eid"


def check_router(probe: Probe) -> Iterator[Finding]:
    """K05: checks a layer's router."""
    for slot in probe.slots_of(OpKind.ROUTER):
        tally = Tally("K05", slot, "ties, small scores, large biases, weights' sums", REMEDY)
        for case, problem in _problems(probe, slot):
            if problem:
                tally.fail(slot, probe.kernels[slot], f"{case}: {problem}")
            else:
                tally.passed(probe.kernels[slot])
        yield from tally.findings()


def _problems(probe: Probe, slot: str) -> Iterator[tuple[str, str]]:
    """Yields (case, what is wrong with it)."""
    try:
        router = probe.slots[slot]
        yield "the layer's own gate", _own_gate(probe, slot)
        if isinstance(router, Router):
            for case, logits_TE in cases(probe):
                yield case, _given(probe, slot, router, logits_TE, None)
            if router.bias_E is not None:
                bias_E = torch.zeros_like(router.bias_E)
                bias_E[1::3], bias_E[2::3] = HUGE_BIAS, -HUGE_BIAS
                yield "a huge bias", _given(probe, slot, router, _spread(probe), bias_E)
                no_bias_E = torch.zeros_like(bias_E)
                yield "all scores equal", _given(probe, slot, router, torch.ones_like(_spread(probe)), no_bias_E)
    except Exception as error:  # whatever a kernel can raise becomes a finding
        yield "call", error_of(error)


def cases(probe: Probe) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, logits [T, E]) in float32."""
    spread_TE = _spread(probe)
    yield "spread logits", spread_TE
    yield "pairs of equal logits", spread_TE[:, torch.arange(spread_TE.shape[1], device=probe.device) // 2]
    yield "all logits equal", torch.full_like(spread_TE, 0.5)
    yield "very negative logits", VERY_NEGATIVE + spread_TE.abs()
    yield "very large logits", -VERY_NEGATIVE * spread_TE.abs()


def _spread(probe: Probe) -> Tensor:
    """Draws rows of the same distinct values between -4 and 4, each in another order."""
    num_experts = probe.config.n_routed_experts
    values_E = torch.linspace(-4, 4, num_experts, device=probe.device)
    return values_E[probe.normal("order", ROWS, num_experts).argsort(-1)]


def _given(probe: Probe, slot: str, router: Router, logits_TE: Tensor, bias_E: Tensor | None) -> str:
    """Runs the router on these logits, and with this bias where one is given."""
    if bias_E is not None:
        chosen, factor = router.num_experts_per_tok, router.routed_scaling_factor
        router = Router(router.gate, chosen, factor, bias_E, None, kernel=router.spec)
    token_ids_T = _token_ids(probe, len(logits_TE))
    ids_TK, weights_TK = router.run(logits_TE, token_ids_T)
    choice = _ExpectedChoice(probe, slot, logits_TE.double(), torch.zeros_like(logits_TE).double(), token_ids_T, bias_E)
    return choice.problem(ids_TK, weights_TK)


def _own_gate(probe: Probe, slot: str) -> str:
    """Runs ordinary input through the router and its gate."""
    gate = f"{slot.removesuffix('.router')}.gate"
    (op,) = probe.ops[gate]
    x_TD = probe.normal(f"{slot} x", ROWS, probe.config.hidden_size).to(probe.dtype)
    token_ids_T = _token_ids(probe, ROWS)
    ids_TK, weights_TK = probe.slots[slot](x_TD, token_ids_T)
    logits = product(x_TD.double(), weight_of(op, probe.stored))
    return _ExpectedChoice(probe, slot, logits.value, logits.bound, token_ids_T, None).problem(ids_TK, weights_TK)


def _token_ids(probe: Probe, num_rows: int) -> Tensor:
    """Draws the first, the last and other ids of the vocabulary."""
    return torch.linspace(0, probe.config.vocab_size - 1, num_rows, device=probe.device).long()


class _ExpectedChoice:
    """The expected choice of a router. bias_E: instead of the checkpoint's."""

    def __init__(
        self, probe: Probe, slot: str, logits_TE: Tensor, bound_TE: Tensor, token_ids_T: Tensor, bias_E: Tensor | None
    ) -> None:
        gate = f"{slot.removesuffix('.router')}.gate"
        config, stored = probe.config, probe.stored
        self.factor, self.num_chosen = config.routed_scaling_factor, config.num_experts_per_tok
        self.scores_TE = expert_scores(logits_TE)
        # exp of x is off by |x| steps, from the product in front of it; the root halves the error of softplus.
        self.relative_TE = (EXP_STEPS + logits_TE.abs()) * FLOAT32_ROUND + bound_TE / 2
        self.error_TE = self.scores_TE * self.relative_TE
        self.table_TK, self.ranked_TE = None, self.scores_TE
        assert probe.layer is not None
        if config.is_hash_layer(probe.layer.layer_idx):
            self.table_TK = stored.param(f"{gate}.tid2eid")[token_ids_T]
        else:
            shift_E = stored.param(f"{gate}.bias") if bias_E is None else bias_E.double()
            self.ranked_TE = self.scores_TE + shift_E
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
