"""Maps transformers' tensor names to DeepSeek's, and stacked experts to slices.

transformers uses two sets of names. A model in memory has ``model.layers.0.self_attn.q_a_proj.weight`` and stacks a
layer's experts into ``experts.gate_up_proj`` [E, 2F, D] and ``experts.down_proj`` [E, D, F]. ``save_pretrained``
reverts most of that and writes ``model.layers.0.attn.wq_a.weight`` and one tensor per expert. Both begin with
``model.``, as no DeepSeek name does. Only names change here; the schema still decides formats.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

PREFIX = "model."

# Applied in order: later rules see the names that earlier ones made.
_RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^model\.", ""),
        (r"^embed_tokens\.", "embed."),
        (r"^lm_head\.", "head."),
        (r"^hc_head\.hc_", "hc_head_"),
        (r"\.self_attn\.", ".attn."),
        (r"\.mlp\.", ".ffn."),
        (r"\.input_layernorm\.", ".attn_norm."),
        (r"\.post_attention_layernorm\.", ".ffn_norm."),
        (r"\.(attn|ffn)_hc\.", r".hc_\1_"),
        (r"\.attn\.sinks$", ".attn.attn_sink"),
        # save_pretrained cannot tell the layer's kv_norm from a compressor's and shortens both.
        (r"\.attn\.norm\.", ".attn.kv_norm."),
        (r"\.attn\.q_a_norm\.", ".attn.q_norm."),
        (r"\.compressor\.indexer\.(kv_proj|gate_proj|kv_norm|position_bias)", r".indexer.compressor.\1"),
        (r"\.compressor\.indexer\.scorer\.", ".indexer."),
        (r"\.compressor\.indexer\.", ".indexer."),
        (r"\.compressor\.kv_norm\.", ".compressor.norm."),
        (r"\.compressor\.gate_proj\.", ".compressor.wgate."),
        (r"\.compressor\.position_bias$", ".compressor.ape"),
        (r"\.(q_a|q_b|o_a|o_b)_proj\.", r".w\1."),
        (r"\.kv_proj\.", ".wkv."),
        (r"\.gate\.e_score_correction_bias$", ".gate.bias"),
        (r"\.shared_experts\.gate_proj\.", ".shared_experts.w1."),
        (r"\.shared_experts\.up_proj\.", ".shared_experts.w3."),
        (r"\.shared_experts\.down_proj\.", ".shared_experts.w2."),
        (r"\.weight_scale_inv$", ".scale"),  # a multiplier, whatever the name says
    )
)
_STACKED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")


@dataclass(frozen=True)
class Source:
    """A tensor's place in its file: its key there, and in stacked experts the expert and its first row."""

    key: str
    expert: int | None = None
    first_row: int = 0


def are_transformers_names(keys: Iterable[str]) -> bool:
    """Returns True if a checkpoint's keys are transformers' names."""
    return any(key.startswith(PREFIX) for key in keys)


def native_name(key: str) -> str:
    """Returns DeepSeek's name for either of transformers' names."""
    for pattern, replacement in _RULES:
        key = pattern.sub(replacement, key)
    return key


def native_tensors(key: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...], Source]]:
    """Yields native name, shape and place of each tensor in a stored one: itself, or each of its stacked experts."""
    name = native_name(key)
    stacked = _STACKED.fullmatch(name)
    if stacked is None or len(shape) != 3 or (stacked[2] == "gate_up_proj" and shape[1] % 2):
        yield name, shape, Source(key)
        return
    projections = ("w2",) if stacked[2] == "down_proj" else ("w1", "w3")
    num_rows = shape[1] // len(projections)
    for expert in range(shape[0]):
        for idx, projection in enumerate(projections):
            source = Source(key, expert, idx * num_rows)
            yield f"{stacked[1]}.{expert}.{projection}.weight", (num_rows, shape[2]), source
