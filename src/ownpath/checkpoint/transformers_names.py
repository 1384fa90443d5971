"""Maps transformers' tensor names to DeepSeek's, and tensors that hold several weights to slices.

transformers uses two sets of names. A model in memory has ``model.layers.0.self_attn.q_a_proj.weight`` and stacks a
layer's experts into ``experts.gate_up_proj`` [E, 2F, D] and ``experts.down_proj`` [E, D, F]. ``save_pretrained``
reverts most of that and writes ``model.layers.0.attn.wq_a.weight`` and one tensor per expert. Tools that quantise write
one Linear per expert instead, ``experts.0.gate_proj.weight_packed``, or gate above up as ``gate_up_proj``. A name is
mapped wherever it is one of these, with ``model.`` in front or without; no DeepSeek name is changed. Only names change
here; the schema still decides formats.
"""

import re
from collections.abc import Iterator

from ownpath.checkpoint.tensor_info import Source

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
        (r"\.(shared_experts|experts\.\d+)\.gate_proj\.", r".\1.w1."),
        (r"\.(shared_experts|experts\.\d+)\.up_proj\.", r".\1.w3."),
        (r"\.(shared_experts|experts\.\d+)\.down_proj\.", r".\1.w2."),
        (r"\.weight_scale_inv$", ".scale"),  # a multiplier, whatever the name says
    )
)
_PLAIN = re.compile(r"(?:layers|mtp)\.\d+\.ffn\.experts\.\d+\.w[123]\.(?!weight_scale_inv$)\w+")
"""Nearly all of 10^5 names: no rule changes them, and they hold one tensor each."""
_ANY = re.compile("|".join(f"(?:{pattern.pattern})" for pattern, _ in _RULES))
_STACKED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)(_scale_inv)?")
_FUSED = re.compile(r"(.*\.(?:shared_experts|experts\.\d+))\.gate_up_proj\.([^.]+)")


def native_name(key: str) -> str:
    """Returns DeepSeek's name for either of transformers' names; other names stay as they are."""
    if _PLAIN.fullmatch(key) or _ANY.search(key) is None:
        return key
    for pattern, replacement in _RULES:
        key = pattern.sub(replacement, key)
    return key


def native_tensors(key: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...], Source | None]]:
    """Yields native name, shape and place of each tensor in a stored one: itself, each of its stacked experts, or gate
    and up of one expert, which share a scalar."""
    if _PLAIN.fullmatch(key):
        yield key, shape, None
        return
    name = native_name(key)
    stacked, fused = _STACKED.fullmatch(name), _FUSED.fullmatch(name)
    if stacked is not None and len(shape) == 3 and not (stacked[2] == "gate_up_proj" and shape[1] % 2):
        projections = ("w2",) if stacked[2] == "down_proj" else ("w1", "w3")
        num_rows = shape[1] // len(projections)
        part = "scale" if stacked[3] else "weight"
        for expert in range(shape[0]):
            for idx, projection in enumerate(projections):
                source = Source(key, expert, idx * num_rows)
                yield f"{stacked[1]}.{expert}.{projection}.{part}", (num_rows, shape[2]), source
    elif fused is not None and shape in ((), (1,)):
        for projection in ("w1", "w3"):
            yield f"{fused[1]}.{projection}.{fused[2]}", shape, Source(key)
    elif fused is not None and shape[0] % 2 == 0:
        num_rows = shape[0] // 2
        for idx, projection in enumerate(("w1", "w3")):
            yield f"{fused[1]}.{projection}.{fused[2]}", (num_rows, *shape[1:]), Source(key, None, idx * num_rows)
    else:
        yield name, shape, None if name == key else Source(key)
