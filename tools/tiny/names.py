"""Maps transformers' parameter names to the published checkpoint names."""

import re

# Applied in order, each at most once per name.
_RENAMES = (
    (r"^model\.", ""),
    (r"^lm_head\.", "head."),
    (r"^embed_tokens\.", "embed."),
    (r"^hc_head\.hc_(fn|base|scale)$", r"hc_head_\1"),
    (r"\.attn_hc\.(fn|base|scale)$", r".hc_attn_\1"),
    (r"\.ffn_hc\.(fn|base|scale)$", r".hc_ffn_\1"),
    (r"\.input_layernorm\.", ".attn_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."),
    (r"\.compressor\.indexer\.(kv_proj|gate_proj|kv_norm|position_bias)", r".indexer.compressor.\1"),
    (r"\.compressor\.indexer\.scorer\.", ".indexer."),
    (r"\.compressor\.indexer\.q_b_proj\.", ".indexer.wq_b."),
    (r"(compressor\.)kv_norm\.", r"\1norm."),
    (r"(compressor\.)kv_proj\.", r"\1wkv."),
    (r"(compressor\.)gate_proj\.", r"\1wgate."),
    (r"(compressor\.)position_bias$", r"\1ape"),
    (r"\.mlp\.shared_experts\.gate_proj\.", ".mlp.shared_experts.w1."),
    (r"\.mlp\.shared_experts\.up_proj\.", ".mlp.shared_experts.w3."),
    (r"\.mlp\.shared_experts\.down_proj\.", ".mlp.shared_experts.w2."),
    (r"\.mlp\.gate\.e_score_correction_bias$", ".mlp.gate.bias"),
    (r"\.self_attn\.sinks$", ".self_attn.attn_sink"),
    (r"\.self_attn\.q_a_norm\.", ".self_attn.q_norm."),
    (r"\.self_attn\.q_a_proj\.", ".self_attn.wq_a."),
    (r"\.self_attn\.q_b_proj\.", ".self_attn.wq_b."),
    (r"\.self_attn\.kv_proj\.", ".self_attn.wkv."),
    (r"\.self_attn\.o_a_proj\.", ".self_attn.wo_a."),
    (r"\.self_attn\.o_b_proj\.", ".self_attn.wo_b."),
    (r"\.self_attn\.", ".attn."),
    (r"\.mlp\.", ".ffn."),
)


def native_name(name: str) -> str:
    """Returns a parameter's name in the checkpoint; fused experts keep ``gate_up_proj`` and ``down_proj``."""
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name, count=1)
    return name
