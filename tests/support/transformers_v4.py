"""transformers' DeepseekV4ForCausalLM, in float32, on the weights a checkpoint decodes to: the forward's oracle.

It has no MTP, but every part that MTP is made of: one sliding layer, the collapse of the streams, norms, the head.
"""

import re
from dataclasses import replace
from typing import Any

import torch

from support.checkpoints import Checkpoint, Tensors

# Order matters: earlier rules make the names that later ones see.
_RENAMES = (
    (r"\.attn\.", ".self_attn."),
    (r"\.ffn\.", ".mlp."),
    (r"\.indexer\.compressor\.", ".compressor.indexer."),
    (r"\.self_attn\.indexer\.weights_proj", ".self_attn.compressor.indexer.scorer.weights_proj"),
    (r"\.self_attn\.indexer\.wq_b", ".self_attn.compressor.indexer.q_b_proj"),
    (r"^embed", "model.embed_tokens"),
    (r"^head", "lm_head"),
    (r"^norm", "model.norm"),
    (r"^hc_head_", "model.hc_head.hc_"),
    (r"^layers", "model.layers"),
    (r"\.attn_norm", ".input_layernorm"),
    (r"\.ffn_norm", ".post_attention_layernorm"),
    (r"\.hc_attn_", ".attn_hc."),
    (r"\.hc_ffn_", ".ffn_hc."),
    (r"\.attn_sink", ".sinks"),
    (r"(compressor(\.indexer)?)\.norm\.", r"\1.kv_norm."),
    (r"\.ape$", ".position_bias"),
    (r"\.wq_a", ".q_a_proj"),
    (r"\.wq_b", ".q_b_proj"),
    (r"\.wkv", ".kv_proj"),
    (r"\.wgate", ".gate_proj"),
    (r"\.wo_a", ".o_a_proj"),
    (r"\.wo_b", ".o_b_proj"),
    (r"\.q_norm", ".q_a_norm"),
    (r"\.gate\.bias", ".gate.e_score_correction_bias"),
    (r"\.shared_experts\.w1", ".shared_experts.gate_proj"),
    (r"\.shared_experts\.w3", ".shared_experts.up_proj"),
    (r"\.shared_experts\.w2", ".shared_experts.down_proj"),
)


def reference_model(checkpoint: Checkpoint, device: torch.device) -> Any:
    """The oracle with every weight set; fails on any missing or unexpected one."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    fields = {key: value for key, value in checkpoint.fields.items() if key != "rope_scaling"}
    yarn = dict(checkpoint.fields["rope_scaling"])
    yarn["rope_type"] = yarn.pop("type")
    config = DeepseekV4Config(**fields, rope_parameters=yarn)
    config._attn_implementation = config._experts_implementation = "eager"
    model = DeepseekV4ForCausalLM(config).to(torch.float32)
    backbone = {name: value for name, value in checkpoint.decoded.items() if not name.startswith("mtp.")}
    result = model.load_state_dict(_state_dict(backbone), strict=False)
    assert not result.missing_keys, result.missing_keys
    assert not result.unexpected_keys, result.unexpected_keys
    return model.eval().to(device)


def reference_logprobs(
    checkpoint: Checkpoint, token_ids: list[int], device: torch.device, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Log-probabilities [T, vocab] of one sequence in one pass, computed in a dtype."""
    model = reference_model(checkpoint, device).to(dtype)
    with torch.inference_mode():
        logits = model(torch.tensor([token_ids], device=device), use_cache=False).logits[0]
    return logits.to(dtype).log_softmax(-1)


def reference_draft_logits(checkpoint: Checkpoint, token_ids: list[int], device: torch.device) -> torch.Tensor:
    """MTP's logits float32 [T - 1, vocab] of one sequence: row p has seen token p + 1, and predicts token p + 2."""
    streams: list[torch.Tensor] = []
    backbone = reference_model(checkpoint, device)
    backbone.model.hc_head.register_forward_pre_hook(lambda _, args: streams.append(args[0]))
    ids = torch.tensor([token_ids], device=device)
    with torch.inference_mode():
        backbone(ids[:, :-1], use_cache=False)
        return _draft_logits(checkpoint, streams[0], ids[:, 1:])


def _draft_logits(checkpoint: Checkpoint, streams: torch.Tensor, next_ids: torch.Tensor) -> torch.Tensor:
    """streams [1, T, S, D] -> [T, vocab], by a model of one layer whose weights are the draft's."""
    from torch.nn.functional import linear, rms_norm

    device, eps = streams.device, checkpoint.config.rms_norm_eps
    decoded = {name.replace("mtp.0.", "") if _is_whole(name) else name.replace("mtp.0.", "layers.0."): value
               for name, value in checkpoint.decoded.items() if name.startswith("mtp.0.")}  # fmt: skip
    own = {name: decoded.pop(name).float().to(device) for name in ("e_proj", "h_proj", "enorm.weight", "hnorm.weight")}
    decoded |= {name: checkpoint.decoded[name] for name in ("embed.weight", "head")}
    one_layer = {"num_hidden_layers": 1, "compress_ratios": [0], "num_hash_layers": 0}
    model = reference_model(replace(checkpoint, fields=checkpoint.fields | one_layer, decoded=decoded), device)
    embedded = model.model.embed_tokens(next_ids)
    e = linear(rms_norm(embedded, embedded.shape[-1:], own["enorm.weight"], eps), own["e_proj"])
    h = linear(rms_norm(streams, streams.shape[-1:], own["hnorm.weight"], eps), own["h_proj"])
    positions = torch.arange(next_ids.shape[1], device=device)[None]
    turns = {kind: model.model.rotary_emb(embedded, position_ids=positions, layer_type=kind)
             for kind in ("main", "compress")}  # fmt: skip
    age = positions[0][:, None] - positions[0]
    is_hidden = (age < 0) | (age >= checkpoint.config.sliding_window)
    mask = torch.zeros(1, 1, *age.shape, device=device).masked_fill(is_hidden, torch.finfo(torch.float32).min)
    x = model.model.layers[0](e.unsqueeze(2) + h, position_embeddings=turns, position_ids=positions,
                              attention_mask=mask, input_ids=next_ids, past_key_values=None)  # fmt: skip
    return model.lm_head(model.model.norm(model.model.hc_head(x)))[0]  # type: ignore[no-any-return]


def _is_whole(name: str) -> bool:
    """Returns True if a draft's tensor is not one of its layer's."""
    return name.startswith(("mtp.0.hc_head_", "mtp.0.norm.", "mtp.0.e_proj", "mtp.0.h_proj", "mtp.0.enorm.",
                            "mtp.0.hnorm."))  # fmt: skip


def _state_dict(decoded: Tensors) -> Tensors:
    state: Tensors = {}
    for name, value in decoded.items():
        if ".ffn.experts." in name:
            continue
        is_module = value.ndim == 2 and not re.search(r"(_fn|ape|tid2eid|weight)$", name)
        key = f"{name}.weight" if is_module else name
        for pattern, replacement in _RENAMES:
            key = re.sub(pattern, replacement, key)
        state[key] = value if value.dtype == torch.int64 else value.float()
    state.update(_stacked_experts(decoded))
    return state


def _stacked_experts(decoded: Tensors) -> Tensors:
    layers = sorted({int(name.split(".")[1]) for name in decoded if ".ffn.experts." in name})
    stacked: Tensors = {}
    for layer_idx in layers:
        prefix = f"layers.{layer_idx}.ffn.experts."
        num_experts = sum(name.startswith(prefix) and name.endswith(".w1") for name in decoded)
        w1, w3, w2 = (
            torch.stack([decoded[f"{prefix}{e}.{projection}"] for e in range(num_experts)])
            for projection in ("w1", "w3", "w2")
        )
        stacked[f"model.layers.{layer_idx}.mlp.experts.gate_up_proj"] = torch.cat((w1, w3), dim=1)
        stacked[f"model.layers.{layer_idx}.mlp.experts.down_proj"] = w2
    return stacked
