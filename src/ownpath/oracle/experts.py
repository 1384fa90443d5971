"""The mixture of experts, one expert decoded at a time, and only those that a token goes to.

Legend: T tokens, D hidden, E experts, K experts a token, F expert width, S rows of one expert.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ownpath.config import Layer
from ownpath.official import Step
from ownpath.oracle.arithmetic import OracleRun
from ownpath.oracle.formulas import expert_scores, routing_weights, swiglu, top_indices

WidthPart = Callable[[Tensor], Tensor]


def feed_forward(
    run: OracleRun, layer: Layer, x_TD: Tensor, token_ids_T: Tensor, forced_ids_TK: Tensor | None
) -> Tensor:
    """Maps x [T, D] -> [T, D]. forced_ids: the experts each token goes to, instead of the router's choice."""
    name = f"{layer.name}.ffn"
    logits_TE = run.wide_linear(f"{name}.gate", x_TD, f"{name}.gate")
    ids_TK, weights_TK = route(run, layer, logits_TE, token_ids_T, forced_ids_TK)
    y_TD = run.record(f"{name}.experts", routed_experts(run, name, x_TD, ids_TK, weights_TK))
    return run.arithmetic.round(y_TD + _shared_expert(run, name, x_TD))


def routed_experts(
    run: OracleRun, ffn: str, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, part: WidthPart | None = None
) -> Tensor:
    """Sums the chosen experts' weighted outputs: [T, D]. part: leaves what is to be summed of hidden values [S, F]."""
    y_TD = torch.zeros_like(x_TD)
    for expert, rows, slots in _rows_by_expert(ids_TK):
        y_SD = _routed_expert(run, f"{ffn}.experts.{expert}", x_TD[rows], weights_TK[rows, slots, None], part)
        y_TD.index_add_(0, rows, y_SD)
    return y_TD


def route(
    run: OracleRun, layer: Layer, logits_TE: Tensor, token_ids_T: Tensor, forced_ids_TK: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns expert ids and weights [T, K]; records ``router.scores``, by which they are chosen."""
    config, name = run.config, f"{layer.name}.ffn"
    scores_TE = expert_scores(logits_TE)
    if layer.is_hash:
        ranked_TE = scores_TE
        ids_TK = run.stored.rows(f"{name}.gate.tid2eid", token_ids_T)
    else:
        ranked_TE = scores_TE + run.stored.param(f"{name}.gate.bias")
        ids_TK = top_indices(ranked_TE, config.num_experts_per_tok)
    if forced_ids_TK is not None:
        ids_TK = forced_ids_TK.to(logits_TE.device, torch.int64)
    weights_TK = routing_weights(scores_TE, ids_TK, config.routed_scaling_factor)
    run.record_wide(f"{name}.router.scores", ranked_TE)
    run.record_wide(f"{name}.router.ids", ids_TK)
    return ids_TK, run.record_wide(f"{name}.router.weights", weights_TK)


def _rows_by_expert(ids_TK: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yields each chosen expert, with the tokens that chose it and its place among their choices."""
    flat = ids_TK.flatten()
    counts = flat.bincount().tolist()
    by_expert = flat.argsort(stable=True).split(counts)
    for expert, pairs in enumerate(by_expert):
        if len(pairs):
            yield expert, pairs // ids_TK.shape[1], pairs % ids_TK.shape[1]


def _routed_expert(run: OracleRun, name: str, x_SD: Tensor, weight_S1: Tensor, part: WidthPart | None) -> Tensor:
    """Computes one routed expert's weighted output for its rows. If the weight is applied first, products are rounded
    too."""
    round_, is_weight_first = run.arithmetic.round, Step.ROUTING_WEIGHT in run.arithmetic.official
    gate_up = run.products(x_SD, f"{name}.w1", f"{name}.w3")
    gate, up = (round_(gate_up) if is_weight_first else gate_up).chunk(2, -1)
    hidden = swiglu(gate, up, run.config.swiglu_limit)
    hidden = hidden if part is None else part(hidden)
    if is_weight_first:
        return round_(run.products(round_(weight_S1 * hidden), f"{name}.w2"))
    return weight_S1 * round_(run.products(round_(hidden), f"{name}.w2"))


def _shared_expert(run: OracleRun, ffn: str, x_TD: Tensor) -> Tensor:
    """Runs the shared expert, which every token goes to."""
    name = f"{ffn}.shared_experts"
    gate_up = run.linear(f"{name}.w13", x_TD, f"{name}.w1", f"{name}.w3")
    gate, up = gate_up.chunk(2, -1)
    hidden = run.record(f"{name}.swiglu", swiglu(gate, up, run.config.swiglu_limit))
    return run.linear(f"{name}.w2", hidden, f"{name}.w2")
