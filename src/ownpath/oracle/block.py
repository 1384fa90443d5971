"""The oracle's forward, one decoder layer at a time, with every slot's result on record.

It shares no code with the engine: its own decoding (``weights``), its own formulas (docs/forward.md), a whole sequence
from position 0 at once, no caches. What it takes from the rest of the package is names: which tensors a module is
stored in, and what the slots are called.

Legend: T tokens, S streams, D hidden, V vocabulary, K experts a token, C compressed entries.
"""

from dataclasses import dataclass

from torch import Tensor

from ownpath.config import ModelConfig
from ownpath.oracle.arithmetic import Arithmetic, OracleRun
from ownpath.oracle.attention import attention
from ownpath.oracle.experts import feed_forward
from ownpath.oracle.formulas import write_streams
from ownpath.oracle.weights import StoredWeights
from ownpath.plan.plan import Plan


@dataclass(frozen=True)
class Choices:
    """An engine's choices to take over where given, since a near-tie may fall to either side.

    Shapes: expert_ids [T, K]; index_mask bool [T, C], which compressed entries a query attends to.
    """

    expert_ids_TK: Tensor | None = None
    index_mask_TC: Tensor | None = None


@dataclass(frozen=True)
class LayerTrace:
    """A layer's results. streams_TSD: the streams after it. values: each slot's result, by the engine's slot names.

    Several results of one slot have names of their own: ``<boundary>.x``, its streams, and ``.h``, its normed input;
    ``<router>.ids`` and ``.weights``. So do values between slots: ``<attn>.q``, ``.kv``, ``.entries``, the rotated
    queries, keys and compressed entries; ``<attn>.o``, attention's output rotated back (the slot ``core`` returns it
    before); ``<attn>.indexer.scores`` and ``.mask``; ``<router>.scores``, by which experts are chosen; ``<layer>.out``,
    the streams after the layer.
    """

    values: dict[str, Tensor]
    streams_TSD: Tensor


def reference_block(
    config: ModelConfig,
    layer_idx: int,
    stored: StoredWeights,
    plan: Plan,
    streams_TSD: Tensor,
    token_ids_T: Tensor,
    arithmetic: Arithmetic,
    choices: Choices | None = None,
) -> LayerTrace:
    """Runs one decoder layer on one sequence from its first token; the MTP modules' layers come after the
    backbone's."""
    layer = (*config.backbone_layers(), *config.draft_layers())[layer_idx]
    run, choices = OracleRun.of(stored, plan, arithmetic, f"{layer.name}."), choices or Choices()
    x_TSD = streams_TSD.to(stored.device, stored.dtype)
    for part in ("attn", "ffn"):
        slot = f"{layer.name}.hc_{part}"
        x_TSD = run.record(f"{slot}.x", x_TSD)
        mixing, streams = run.mixing(slot), config.hc_mult
        logits = mixing.logits(x_TSD)
        post, comb = mixing.post(logits, streams), mixing.comb(logits, streams)
        h_TD = run.read_streams(slot, f"{layer.name}.{part}_norm.weight", x_TSD, mixing.pre(logits, streams))
        if part == "attn":
            y_TD = attention(run, layer, h_TD, choices.index_mask_TC)
        else:
            y_TD = feed_forward(run, layer, h_TD, token_ids_T.to(stored.device), choices.expert_ids_TK)
        x_TSD = write_streams(x_TSD, y_TD, post, comb)
    return LayerTrace(run.values, run.record(f"{layer.name}.out", x_TSD))


def reference_embed(config: ModelConfig, stored: StoredWeights, token_ids_T: Tensor, arithmetic: Arithmetic) -> Tensor:
    """Returns the streams before the first layer: [T, S, D]."""
    h_TD = arithmetic.round(stored.rows("embed.weight", token_ids_T))
    return h_TD[:, None].repeat(1, config.hc_mult, 1)


def reference_head(
    config: ModelConfig, stored: StoredWeights, plan: Plan, streams_TSD: Tensor, arithmetic: Arithmetic, name: str = ""
) -> Tensor:
    """Computes logits [T, V] from the streams after the last layer. name: ``mtp.0.`` and so on for a draft's."""
    run = OracleRun.of(stored, plan, arithmetic, "head")
    x_TSD = arithmetic.round(streams_TSD.to(stored.device, stored.dtype))
    mixing = run.mixing(f"{name}hc_head")
    pre_TS = mixing.pre(mixing.logits(x_TSD), config.hc_mult)
    h_TD = run.read_streams(f"{name}hc_head", f"{name}norm.weight", x_TSD, pre_TS)
    return run.wide_linear("head", h_TD, "head")
