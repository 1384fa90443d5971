"""The exchanges between ranks: companions of a layer's products whose results no rank has whole. Pure.

By heads, every rank computes all tokens: its part of ``wo_b``'s sums, of the routed experts' and of the shared one's.
Each part is added up over ranks where the next boundary needs it: two sums a layer. By data, each rank computes its own
tokens, and all come together for the experts alone, whose sums go back to where the tokens are.

The head's rows are divided either way: each rank has columns of the logits. They go to all ranks, which draw the same
tokens from them; where rank 0 draws rows again, with what only it knows of their answers, the tokens are sent. By data
the same exchange tells which rows' index scores are not finite. (A model by data that no engine runs has its own rows'
logits alone.)
"""

from collections.abc import Iterator

from ownpath.config import Layer, ModelConfig, Parallel
from ownpath.ops import OpKind
from ownpath.plan.opspec import CompanionSpec
from ownpath.splits import DRAWN, DRAWN_MULTIPLE, AttentionSplit


def layer_exchanges(config: ModelConfig, layer: Layer, parallel: Parallel) -> Iterator[CompanionSpec]:
    """Yields the exchanges of one layer. dims: the width of what is exchanged of a token."""
    if parallel.size == 1:
        return
    dims = (config.hidden_size,)
    if parallel.attention is AttentionSplit.HEADS:
        yield CompanionSpec(f"{layer.name}.attn.reduce", OpKind.REDUCE, dims)
        yield CompanionSpec(f"{layer.name}.ffn.reduce", OpKind.REDUCE, dims)
        return
    routed = (config.hidden_size, config.num_experts_per_tok)  # experts and their weights travel with the token
    yield CompanionSpec(f"{layer.name}.ffn.gather", OpKind.GATHER, routed)
    yield CompanionSpec(f"{layer.name}.ffn.scatter", OpKind.SCATTER, dims)


def head_exchanges(config: ModelConfig, parallel: Parallel) -> Iterator[CompanionSpec]:
    """Yields the exchanges around the head, of rows whose logits are wanted."""
    if parallel.size == 1:
        return
    if parallel.attention is AttentionSplit.HEADS:
        yield CompanionSpec("head.gather", OpKind.GATHER, (config.vocab_size,))
        yield CompanionSpec(DRAWN, OpKind.REDUCE, (DRAWN_MULTIPLE,))
        return
    yield CompanionSpec("head.gather", OpKind.GATHER, (config.hidden_size,))
    yield CompanionSpec("head.turn", OpKind.TURN, (config.vocab_size,))
    yield CompanionSpec(DRAWN, OpKind.REDUCE, (DRAWN_MULTIPLE,))
