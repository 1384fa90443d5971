"""The network to train: transformers' DeepSeek-V4 at tiny-v4's size.

Parameters have the dtypes of the checkpoint on disk: BF16, except hyper-connections, sinks and position biases (FP32).
"""

from typing import Any

import torch
from torch import Tensor
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4ForCausalLM,
    DeepseekV4HashRouter,
)

from tiny.tokens import VOCAB_SIZE

# Field names of the published config.json; sizes are ours, constants are DeepSeek-V4's.
FIELDS: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "compress_ratios": [0, 4, 128, 4],
    "compress_rope_theta": 160000,
    "eos_token_id": 1,
    "hc_eps": 1e-06,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "head_dim": 512,
    "hidden_act": "silu",
    "hidden_size": 256,
    "index_head_dim": 128,
    "index_n_heads": 4,
    "index_topk": 128,
    "initializer_range": 0.02,
    "max_position_embeddings": 65536,
    "moe_intermediate_size": 256,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hash_layers": 1,
    "num_hidden_layers": 4,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 0,
    "o_groups": 2,
    "o_lora_rank": 128,
    "pad_token_id": 2,
    "q_lora_rank": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 16,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "sliding_window": 128,
    "swiglu_limit": 10.0,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": VOCAB_SIZE,
}
_FP32_NAMES = ("attn_hc.", "ffn_hc.", "hc_head.", "sinks", "position_bias", "e_score_correction_bias")


def transformers_config() -> DeepseekV4Config:
    """Returns ``FIELDS`` as transformers' config."""
    fields = {k: v for k, v in FIELDS.items() if k not in ("architectures", "model_type", "torch_dtype")}
    fields["rope_scaling"] = {**fields["rope_scaling"], "rope_type": "yarn"}
    del fields["rope_scaling"]["type"]
    return DeepseekV4Config(**fields, attn_implementation="eager")


def build_network(seed: int) -> DeepseekV4ForCausalLM:
    """Makes a newly initialised network on CPU: seeded weights and a seeded token-to-expert table."""
    torch.manual_seed(seed)
    network = DeepseekV4ForCausalLM(transformers_config())
    for name, parameter in network.named_parameters():
        if not any(part in name for part in _FP32_NAMES):
            parameter.data = parameter.data.to(torch.bfloat16)
    for module in network.modules():
        if isinstance(module, DeepseekV4HashRouter):
            module.tid2eid.copy_(token_experts(module.tid2eid.shape[0], module.num_experts, module.top_k, seed))
    return network


def token_experts(num_tokens: int, num_experts: int, top_k: int, seed: int) -> Tensor:
    """Draws distinct experts for each token id: int64 [num_tokens, top_k]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_tokens, num_experts, generator=generator).argsort(dim=-1)[:, :top_k].contiguous()


def window_mask(width: int, window: int, device: str) -> Tensor:
    """Makes the additive mask, BF16 [1, 1, width, width]: a token sees itself and the ``window - 1`` before it."""
    position = torch.arange(width, device=device)
    distance = position[:, None] - position[None, :]
    hidden = (distance < 0) | (distance >= window)
    mask = torch.zeros(width, width, dtype=torch.bfloat16, device=device)
    return mask.masked_fill(hidden, float("-inf"))[None, None]
