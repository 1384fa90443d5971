"""K05: checks the router on hard logits: exact ties, very small scores, a bias that dwarfs them, token tables.

A decode step's router, which has the gate in it, gets its logits through a gate of ones and zeros.

Legend: T tokens, D hidden, E experts.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ownpath.conformance.bounds import Exact
from ownpath.conformance.exact import product
from ownpath.conformance.router import ExpectedChoice, RouterRule
from ownpath.finding import Finding
from ownpath.model.moe import ChooseExperts
from ownpath.ops import OpKind
from ownpath.runners import Route, Router, RouteWeights
from ownpath.verify.kernels.operands import weight_of
from ownpath.verify.kernels.probe import Probe
from ownpath.verify.kernels.tally import Tally

ROWS, FEW_ROWS = 67, (1, 4, 5, 8, 16, 64)
VERY_NEGATIVE = -80.0
"""A very small logit: below -87, exp is subnormal in float32; no gate comes near."""
HUGE_BIAS = 1e4
REMEDY = "bias shifts the choice alone, never the weights; the lower id wins a tie; hash layers read tid2eid"


def check_router(probe: Probe) -> Iterator[Finding]:
    """K05: checks a layer's router, and that of decode steps."""
    for slot in probe.slots_of(OpKind.ROUTER, OpKind.ROUTE):
        tally = Tally("K05", slot, "ties, small scores, large biases, weights' sums", REMEDY)
        kernel = probe.kernels[slot]
        with tally.catch_errors(slot, kernel, "call: "):
            for case, problem in _problems(probe, slot):
                tally.judge(slot, kernel, problem and f"{case}: {problem}")
        yield from tally.findings()


def _problems(probe: Probe, slot: str) -> Iterator[tuple[str, str]]:
    """Yields (case, what is wrong with it)."""
    router = probe.slots[slot]
    for num_rows in _row_counts(probe, slot):
        yield f"the layer's own gate, {num_rows} rows", _own_gate(probe, slot, num_rows)
    yield "padded rows", _padded_rows(probe, slot)
    if not isinstance(router, Router | Route):
        return
    for case, logits_TE in cases(probe):
        yield case, _run_router(probe, slot, router, logits_TE, None)
    if _rule(probe, slot, _token_ids(probe, 1)).bias_E is not None:
        bias_E = torch.zeros(probe.config.n_routed_experts, device=probe.device)
        no_bias_E = torch.zeros_like(bias_E)
        bias_E[1::3], bias_E[2::3] = HUGE_BIAS, -HUGE_BIAS
        yield "a huge bias", _run_router(probe, slot, router, _spread(probe), bias_E)
        yield "all scores equal", _run_router(probe, slot, router, torch.ones_like(_spread(probe)), no_bias_E)


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


def _row_counts(probe: Probe, slot: str) -> tuple[int, ...]:
    """Returns the numbers of rows to run the slot with; a decode step's router takes few."""
    if not slot.endswith(".decode.route"):
        return (ROWS,)
    assert probe.layer is not None
    most = probe.layer.block.ffn.moe.decode_rows
    return tuple(num_rows for num_rows in FEW_ROWS if num_rows <= most)


def _run_router(probe: Probe, slot: str, router: Router | Route, logits_TE: Tensor, bias_E: Tensor | None) -> str:
    """Runs the router on these logits, and with this bias where one is given."""
    if isinstance(router, Route):
        logits_TE = logits_TE[: router.max_rows].to(probe.dtype)
    token_ids_T = _token_ids(probe, len(logits_TE))
    rule = _rule(probe, slot, token_ids_T)
    rule = rule if bias_E is None else replace(rule, bias_E=bias_E)
    result = _of_logits(router, bias_E, logits_TE.shape[1])(logits_TE, token_ids_T)
    exact = Exact(logits_TE.double(), torch.zeros_like(logits_TE, dtype=torch.float64))
    return ExpectedChoice(exact, rule).problem(*result)


def _of_logits(router: Router | Route, bias_E: Tensor | None, num_experts: int) -> ChooseExperts:
    """Returns the router as a function of logits, with this bias where one is given."""
    if isinstance(router, Router):
        if bias_E is not None:
            sizes = router.num_experts_per_tok, router.routed_scaling_factor
            router = Router(router.gate, *sizes, bias_E, None, kernel=router.spec)
        return router.run
    gate_ED, weights = router.weights.gate_ED, router.weights.router
    weights = weights if bias_E is None else replace(weights, bias_E=bias_E, tid2eid_VK=None)
    ones_EE = torch.eye(num_experts, dtype=gate_ED.dtype, device=gate_ED.device)
    return Route(RouteWeights(ones_EE, weights), kernel=router.spec)


def _own_gate(probe: Probe, slot: str, num_rows: int) -> str:
    """Runs ordinary input through the router and its gate."""
    (op,) = probe.ops[_gate_of(slot)]
    x_TD = probe.normal(f"{slot} x", num_rows, probe.config.hidden_size).to(probe.dtype)
    token_ids_T = _token_ids(probe, num_rows)
    logits = product(x_TD.double(), weight_of(op, probe.stored))
    return ExpectedChoice(logits, _rule(probe, slot, token_ids_T)).problem(*probe.slots[slot](x_TD, token_ids_T))


def _padded_rows(probe: Probe, slot: str) -> str:
    """Runs some rows without a token, which go to no expert."""
    x_TD = probe.normal(f"{slot} padded", 7, probe.config.hidden_size).to(probe.dtype)
    token_ids_T = _token_ids(probe, len(x_TD))
    token_ids_T[2::2] = -1
    ids_TK, weights_TK = probe.slots[slot](x_TD, token_ids_T)
    is_inert = bool((ids_TK[2::2] == -1).all()) and not bool(weights_TK[2::2].any())
    return "" if is_inert else "a row without a token has experts"


def _gate_of(slot: str) -> str:
    return f"{slot.removesuffix('.router').removesuffix('.decode.route')}.gate"


def _rule(probe: Probe, slot: str, token_ids_T: Tensor) -> RouterRule:
    """Reads what the checkpoint's router chooses by."""
    assert probe.layer is not None
    config, gate = probe.config, _gate_of(slot)
    sizes = config.num_experts_per_tok, config.routed_scaling_factor
    if config.is_hash_layer(probe.layer.layer_idx):
        return RouterRule(*sizes, table_TK=probe.stored.param(f"{gate}.tid2eid")[token_ids_T])
    return RouterRule(*sizes, bias_E=probe.stored.param(f"{gate}.bias"))


def _token_ids(probe: Probe, num_rows: int) -> Tensor:
    """Draws the first, the last and other ids of the vocabulary."""
    return torch.linspace(0, probe.config.vocab_size - 1, num_rows, device=probe.device).long()
