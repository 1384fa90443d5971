"""The oracle's whole forward from token ids to logits, and that of a draft module.

Legend: T tokens, S streams, D hidden, V vocabulary.
"""

import torch
from torch import Tensor

from ownpath.oracle.arithmetic import Arithmetic, OracleRun
from ownpath.oracle.block import LayerTrace, reference_block, reference_embed, reference_head
from ownpath.oracle.weights import StoredWeights
from ownpath.plan.plan import Plan


def reference_logits(plan: Plan, stored: StoredWeights, token_ids_T: Tensor, arithmetic: Arithmetic) -> Tensor:
    """Computes the logits of one sequence from its first token: [T, V]."""
    streams_TSD = reference_streams(plan, stored, token_ids_T, arithmetic)
    return reference_head(plan.config, stored, plan, streams_TSD, arithmetic)


def reference_streams(plan: Plan, stored: StoredWeights, token_ids_T: Tensor, arithmetic: Arithmetic) -> Tensor:
    """Computes the streams after the last layer: [T, S, D]."""
    config = plan.config
    x_TSD = reference_embed(config, stored, token_ids_T, arithmetic)
    for layer_idx in range(config.num_hidden_layers):
        x_TSD = reference_block(config, layer_idx, stored, plan, x_TSD, token_ids_T, arithmetic).streams_TSD
    return x_TSD


def reference_draft_logits(plan: Plan, stored: StoredWeights, token_ids_T: Tensor, arithmetic: Arithmetic) -> Tensor:
    """Computes the logits of ``mtp.0`` for each token but the last, whose follower is unknown: [T - 1, V]. The plan
    must hold it."""
    config, following = plan.config, token_ids_T[1:]
    streams_TSD = reference_streams(plan, stored, token_ids_T, arithmetic)[:-1]
    x_TSD = reference_draft_entry(plan, stored, streams_TSD, following, arithmetic).streams_TSD
    layer_idx = config.num_hidden_layers
    x_TSD = reference_block(config, layer_idx, stored, plan, x_TSD, following, arithmetic).streams_TSD
    return reference_head(config, stored, plan, x_TSD, arithmetic, "mtp.0.")


def reference_draft_entry(
    plan: Plan, stored: StoredWeights, streams_TSD: Tensor, following_T: Tensor, arithmetic: Arithmetic
) -> LayerTrace:
    """Computes what enters the layer of ``mtp.0``, from the backbone's last streams and the token behind each row.
    Values: the module's norms and products, by their names."""
    name = "mtp.0"
    run = OracleRun.of(stored, plan, arithmetic, f"{name}.")
    e_TD = run.norm(f"{name}.enorm", stored.rows("embed.weight", following_T), f"{name}.enorm.weight")
    h_TSD = run.norm(f"{name}.hnorm", streams_TSD, f"{name}.hnorm.weight")
    h_TSD = run.linear(f"{name}.h_proj", h_TSD, f"{name}.h_proj")
    e_TD = run.linear(f"{name}.e_proj", e_TD, f"{name}.e_proj")
    return LayerTrace(run.values, arithmetic.round(torch.add(e_TD[:, None], h_TSD)))
