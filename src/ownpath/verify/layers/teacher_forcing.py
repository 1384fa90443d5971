"""Teacher forcing: runs one layer of the engine on the reference's streams and compares every value.

The engine runs first. Where its choices (experts, compressed entries) differ from the reference's, the reference
computes once more with the engine's, so that what follows can be compared; the choices are judged apart.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from ownpath.config import Layer, Parallel
from ownpath.model.block import Residual
from ownpath.oracle.block import Choices, LayerTrace
from ownpath.oracle.formulas import index_scores
from ownpath.verify.layers.activations import Activations
from ownpath.verify.layers.choices import RunChoices, Scores, scores_of
from ownpath.verify.layers.divided import WHOLE_SUMS, reference_part
from ownpath.verify.layers.measure import ROW_FACTOR, Measurement, Pair, distance, row_distances
from ownpath.verify.layers.oracle import Oracle
from ownpath.verify.layers.single_layer import SequenceRows, SingleLayer

ORDER = (
    "hc_attn.x",
    "hc_attn.h",
    "attn.wqa_wkv",
    "attn.q_norm",
    "attn.wq_b",
    "attn.q_head_norm",
    "attn.q",
    "attn.kv_norm",
    "attn.key_quantizer",
    "attn.kv",
    "attn.compressor.wkv_wgate",
    "attn.entries",
    "attn.indexer.wq_b",
    "attn.indexer.quantizer",
    "attn.indexer.weights_proj",
    "attn.indexer.compressor.wkv_wgate",
    "attn.indexer.scores",
    "attn.core",
    "attn.wo_a",
    "attn.wo_b",
    "attn.reduce",
    "hc_ffn.x",
    "hc_ffn.h",
    "ffn.gate",
    "ffn.router.weights",
    "ffn.experts",
    "ffn.shared_experts.w13",
    "ffn.shared_experts.swiglu",
    "ffn.shared_experts.w2",
    "ffn.reduce",
    "out",
)
"""A layer's values in the order in which they depend on each other."""


@dataclass(frozen=True)
class LayerComparison:
    """The results of one layer. streams_TSD: the reference's after it, by its own choices. out_TSD: the engine's.

    expert: the routed expert of every row beyond its budget, if there is one such. key_rounding: rel-L2 of the window's
    keys to their unrounded values, where they are rounded. few_rows: distance of the reference's rows from those
    computed the engine's way for steps of few rows.
    """

    streams_TSD: torch.Tensor
    out_TSD: torch.Tensor
    measurements: tuple[Measurement, ...]
    scores: Scores
    choices: RunChoices
    expert: int | None
    key_rounding: float | None
    few_rows: float


def compare_layer(single: SingleLayer, oracle: Oracle, streams_TSD: torch.Tensor) -> LayerComparison:
    """Runs one layer of the engine and the reference on the reference's streams [T, S, D] of the whole text."""
    layer = single.layer
    run, cache = Activations(single.specs), single.new_cache()
    entering = Residual(streams_TSD.to(oracle.subject.engine.dtype))
    residual = single.step([SequenceRows(oracle.token_ids, entering, cache)], run)
    values = run.values() | single.entries(cache)
    values[f"{layer.name}.out"] = out_TSD = single.streams(residual)
    index_keys = single.index_keys(cache)
    if index_keys is not None:
        indexer = f"{layer.name}.attn.indexer"
        q_TIH, weights_TI = (values[f"{indexer}.{name}"].double() for name in ("q", "weights"))
        values[f"{indexer}.scores"] = index_scores(q_TIH, index_keys.double(), weights_TI)

    free = oracle.block(single.layer_idx, streams_TSD)
    scores = scores_of(oracle, layer, free)
    choices = scores.judge(run, index_keys)
    trace = free
    if choices.differs:
        router = f"{layer.name}.ffn.router"
        ids_TK = _replace_missing(values[f"{router}.ids"], free.values[f"{router}.ids"], choices.num_experts)
        trace = oracle.block(single.layer_idx, streams_TSD, Choices(ids_TK, choices.entries_TC))
        # A row that attends to other entries has other router scores, by which its choice of experts is judged.
        scores = replace(scores, expert_scores_TE=trace.values[f"{router}.scores"])
        choices = scores.judge(run, index_keys)
    sampled_T = choices.experts_TE[:, list(oracle.subject.expert_ids(single.layer_idx))].any(1)
    pairs = _pairs(layer, values, trace, sampled_T, oracle.subject.engine.parallel)
    measured = tuple(_measure(oracle, single, name, pair, run) for name, pair in pairs.items())
    expert = None
    if "ffn.experts" in pairs:
        experts_TE, budget = choices.experts_TE[sampled_T], oracle.budget("ffn.experts")
        expert = _one_bad_expert(pairs["ffn.experts"], experts_TE, budget)
    rounding, few_rows = _key_rounding(layer, values), _of_few_rows(oracle, single, streams_TSD, trace)
    return LayerComparison(free.streams_TSD, out_TSD, measured, scores, choices, expert, rounding, few_rows)


def _of_few_rows(oracle: Oracle, single: SingleLayer, streams_TSD: torch.Tensor, trace: LayerTrace) -> float:
    """Measures ``few_rows`` with the same choices."""
    other = oracle.of_few_rows()
    if other is None:
        return 0.0
    ids_TK = trace.values[f"{single.layer.name}.ffn.router.ids"]
    mask_TC = trace.values.get(f"{single.layer.name}.attn.indexer.mask")
    found = other.block(single.layer_idx, streams_TSD, Choices(ids_TK, mask_TC))
    return distance(found.streams_TSD, trace.streams_TSD).worst_row


def _key_rounding(layer: Layer, values: Mapping[str, torch.Tensor]) -> float | None:
    slot = f"{layer.name}.attn.key_quantizer"
    return distance(values[slot], values[f"{slot}.in"]).rel_l2 if slot in values else None


def _replace_missing(ids_TK: torch.Tensor, instead_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Replaces expert ids that do not exist: a row that names one gets the reference's own."""
    ids_TK = ids_TK.long()
    is_real_T = ((ids_TK >= 0) & (ids_TK < num_experts)).all(1, keepdim=True)
    return torch.where(is_real_T, ids_TK, instead_TK)


def _pairs(
    layer: Layer,
    values: Mapping[str, torch.Tensor],
    trace: LayerTrace,
    sampled_T: torch.Tensor,
    parallel: Parallel,
) -> dict[str, Pair]:
    """Pairs the engine's values with the reference's, by name within the layer, in the order in which they depend.

    sampled: tokens that went to one of the chosen experts; of the routed experts' outputs, no others are compared.
    parallel: of several ranks, a rank's values are paired with their part of the reference's.
    """
    router = f"{layer.name}.ffn.router"
    theirs = {name: trace.values[f"{router}.{name}"] for name in ("ids", "weights", "scores")}
    num_experts = theirs["scores"].shape[1]
    ids_TK = _replace_missing(values[f"{router}.ids"], theirs["ids"], num_experts)
    pairs = {}
    for name in ORDER:
        full = f"{layer.name}.{name}"
        if full not in values:
            continue
        if name == "ffn.router.weights":
            mine_TE = _by_expert(ids_TK, values[full], num_experts)
            pairs[name] = mine_TE, _by_expert(theirs["ids"], theirs["weights"], num_experts)
        elif name == "attn.indexer.scores":
            pairs[name] = _visible_scores(values[full], trace.values[full])
        else:
            wanted = reference_part(trace.values, layer.name, name, parallel)
            if wanted is not None:
                rows = sampled_T if name == "ffn.experts" else slice(None)
                pairs[name] = values[full][rows], wanted.reshape(values[full].shape)[rows]
    return pairs


def _visible_scores(mine_TC: torch.Tensor, theirs_TC: torch.Tensor) -> Pair:
    """Pairs index scores of the entries that a row may see; the reference's others are -inf."""
    return mine_TC.masked_fill(theirs_TC == -torch.inf, 0.0), theirs_TC.masked_fill(theirs_TC == -torch.inf, 0.0)


def _by_expert(ids_TK: torch.Tensor, weights_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Spreads routing weights over experts [T, E], whatever order a row names its experts in."""
    weights_TE = torch.zeros(len(ids_TK), num_experts, dtype=torch.float64, device=ids_TK.device)
    return weights_TE.scatter_(1, ids_TK, weights_TK.double())


def _measure(oracle: Oracle, single: SingleLayer, name: str, pair: Pair, run: Activations) -> Measurement:
    full = f"{single.layer.name}.{name}"
    slot = single.slot_of(full)
    kernel = single.loaded.ledger.kernels[slot][1] if slot else ""
    budget = oracle.budget(WHOLE_SUMS[name][0] if name in WHOLE_SUMS else name)
    return Measurement.of(single.layer_idx, name, pair, budget, kernel, run.dtypes.get(slot, ("", "")))


def _one_bad_expert(pair: Pair, experts_TE: torch.Tensor, budget: float) -> int | None:
    """Returns the expert of every row beyond its budget, if there is just one such."""
    bad_T = row_distances(*pair) > ROW_FACTOR * budget
    if not bad_T.any():
        return None
    shared = experts_TE[bad_T].all(0).nonzero().flatten().tolist()
    return int(shared[0]) if len(shared) == 1 else None
