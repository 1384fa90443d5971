"""The fields of the published V4-Flash's and V4-Pro's config.json, and of a small model of the same kind."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

COMMON: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "expert_dtype": "fp4",
    "hc_eps": 1e-06,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "head_dim": 512,
    "hidden_act": "silu",
    "index_head_dim": 128,
    "index_n_heads": 64,
    "max_position_embeddings": 1048576,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 6,
    "num_hash_layers": 3,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 1,
    "o_lora_rank": 1024,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": 65536,
    },
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "scoring_func": "sqrtsoftplus",
    "sliding_window": 128,
    "swiglu_limit": 10.0,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "vocab_size": 129280,
}
FLASH = COMMON | {
    "hidden_size": 4096,
    "num_hidden_layers": 43,
    "num_attention_heads": 64,
    "q_lora_rank": 1024,
    "o_groups": 8,
    "n_routed_experts": 256,
    "moe_intermediate_size": 2048,
    "routed_scaling_factor": 1.5,
    "index_topk": 512,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
}
PRO = COMMON | {
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "o_groups": 16,
    "n_routed_experts": 384,
    "moe_intermediate_size": 3072,
    "routed_scaling_factor": 2.5,
    "index_topk": 1024,
    "compress_ratios": [128, 128, *[4, 128] * 29, 4, 0],
}
ONE_LAYER = {"num_hidden_layers": 1, "num_nextn_predict_layers": 0}
SMALL_VOCAB = {"vocab_size": 4096}  # of the tables only the router's is part of a layer
SMALL: dict[str, Any] = (
    FLASH
    | SMALL_VOCAB
    | {
        "hidden_size": 256,
        "num_attention_heads": 4,
        "q_lora_rank": 128,
        "o_groups": 2,
        "o_lora_rank": 128,
        "n_routed_experts": 8,
        "moe_intermediate_size": 256,
    }
)
SHAPES = MappingProxyType({"flash": FLASH, "pro": PRO, "small": SMALL})


def model_shape(name: str) -> Mapping[str, Any]:
    """Returns a model's fields by name. Errors: ValueError for an unknown name."""
    if name not in SHAPES:
        raise ValueError(f"--shape: no model {name!r}; known: {', '.join(SHAPES)}")
    return SHAPES[name]
