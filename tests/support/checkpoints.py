"""Random V4 checkpoints on disk, in the layouts people have, and the weights that they decode to."""

import json
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ownpath.checkpoint.names import draft_params, model_params
from ownpath.checkpoint.schema import (
    COMPRESSED_FP8,
    COMPRESSED_NVFP4,
    MODELOPT_NVFP4,
    NATIVE_FP8,
    NATIVE_MXFP4,
    PLAIN_BF16,
    Encoding,
    ModuleSpec,
    ParamSpec,
)
from ownpath.checkpoint.writer import write_checkpoint
from ownpath.config import ModelConfig
from ownpath.formats import BF16, FP8_BLOCK, NVFP4
from ownpath.numerics import dequantize, nvfp4_global_scale, quantize_fp8_block, quantize_mxfp4, quantize_nvfp4
from ownpath.plan.opspec import OpSpec, draft_ops, model_ops
from ownpath.qtensor import QuantTensor

Layout = Callable[[str], Encoding]
Tensors = dict[str, torch.Tensor]

SMALL: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "qk_rope_head_dim": 32,
    "q_lora_rank": 48,
    "o_groups": 2,
    "o_lora_rank": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 48,
    "scoring_func": "sqrtsoftplus",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0,
    "num_hash_layers": 1,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "sliding_window": 128,
    "compress_ratios": [0, 4, 128, 4, 128, 0],  # two layers of a kind: each has caches of its own
    "index_n_heads": 16,
    "index_head_dim": 32,
    "index_topk": 48,
    "rope_theta": 10000.0,
    "compress_rope_theta": 160000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": 256,
    },
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
"""A config of every layer type, small enough for CPU; its indexer's top-k is passed at 192 tokens."""


def experts_only(module: str) -> Encoding:
    """NVIDIA's ModelOpt export: routed experts NVFP4, other projections FP8 blocks, small ones BF16."""
    if ".ffn.experts." in module:
        return MODELOPT_NVFP4
    return NATIVE_FP8 if _is_projection(module) else PLAIN_BF16


def full_nvfp4(module: str) -> Encoding:
    """The full export: attention projections and shared experts NVFP4 too, ``wo_a`` BF16 without a scale."""
    if module.endswith(".wo_a"):
        return PLAIN_BF16
    if module.endswith(".indexer.wq_b"):
        return NATIVE_FP8
    return MODELOPT_NVFP4 if _is_projection(module) or ".ffn.experts." in module else PLAIN_BF16


def deepseek_native(module: str) -> Encoding:
    """DeepSeek's own release: routed experts MXFP4, other projections (``wo_a`` too) FP8 blocks, small ones BF16."""
    if ".ffn.experts." in module:
        return NATIVE_MXFP4
    return NATIVE_FP8 if _is_projection(module) else PLAIN_BF16


def fp8_experts(module: str) -> Encoding:
    """DeepSeek's base model: routed experts in FP8 blocks like the other projections, small ones BF16."""
    is_fp8 = ".ffn.experts." in module or _is_projection(module)
    return NATIVE_FP8 if is_fp8 else PLAIN_BF16


def compressed_tensors(module: str) -> Encoding:
    """llm-compressor's mixed export: routed experts NVFP4, attention projections FP8 blocks, all else BF16."""
    if ".ffn.experts." in module:
        return COMPRESSED_NVFP4
    is_attention = ".attn." in module and ".indexer." not in module
    return COMPRESSED_FP8 if is_attention and _is_projection(module) else PLAIN_BF16


def bf16(_module: str) -> Encoding:
    """Nothing quantised."""
    return PLAIN_BF16


LAYOUTS: dict[str, Layout] = {
    "modelopt-experts-only": experts_only,
    "full-nvfp4": full_nvfp4,
    "compressed-tensors": compressed_tensors,
    "deepseek-native": deepseek_native,
    "fp8-experts": fp8_experts,
    "bf16": bf16,
}


THREE_LAYERS: dict[str, Any] = {"num_hidden_layers": 3, "compress_ratios": [0, 4, 128, 0]}
"""A layer of each kind, and a draft: for tests to which the caches of two layers of one kind are nothing new."""

DSPARK: dict[str, Any] = {
    "compress_ratios": [*SMALL["compress_ratios"][:5], 0, 0, 0],
    "dspark_block_size": 5,
    "dspark_noise_token_id": 90,
    "dspark_target_layer_ids": [2, 3, 4],
    "dspark_markov_rank": 24,
}
"""Fields that make the draft a DSpark of three stages, as the refreshed releases have them."""

WIDTHS = {"deepseek-native": 64, "fp8-experts": 144}
"""Expert widths that a layout needs: whole blocks of 32; a second block of 128 that is partial."""


def _is_projection(module: str) -> bool:
    leaf = module.rsplit(".", 1)[-1]
    in_shared = ".shared_experts." in module
    in_draft = leaf in ("e_proj", "h_proj", "main_proj")
    return in_shared or in_draft or (leaf in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b") and "compressor" not in module)


@dataclass(frozen=True)
class Checkpoint:
    """``decoded``: native module or parameter name -> the float32 values that the stored tensors mean."""

    folder: Path
    config: ModelConfig
    fields: dict[str, Any]
    decoded: Tensors


def random_checkpoint(
    folder: Path,
    layout: str = "full-nvfp4",
    seed: int = 0,
    fp8_scale: torch.dtype | None = None,
    draft: str | None = None,
    **changes: Any,
) -> Checkpoint:
    """Writes a random checkpoint of ``SMALL`` with ``changes``, in shards of at most 200 kB.

    fp8_scale: dtype of FP8 block scales; by default the one that the layout's published checkpoints have.
    draft: layout of a draft to write too: an MTP module, or with ``changes`` of DSpark's fields that one. The
        backbone's tensors are the same with and without it.
    """
    made = _made(layout, seed, fp8_scale, draft, json.dumps(changes))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(made.fields))
    write_checkpoint(folder, made.tensors.items(), max_shard_bytes=200_000)
    decoded = {name: tensor.clone() for name, tensor in made.decoded.items()}
    return Checkpoint(folder, made.config, deepcopy(made.fields), decoded)


@dataclass(frozen=True)
class _Made:
    """A checkpoint's contents before it is written."""

    config: ModelConfig
    fields: dict[str, Any]
    tensors: Tensors
    decoded: Tensors


@lru_cache(maxsize=16)
def _made(layout: str, seed: int, fp8_scale: torch.dtype | None, draft: str | None, changes: str) -> _Made:
    """Tests of a file ask for the same checkpoint again and again. changes: as JSON."""
    stored = (layout,) if draft is None else (layout, draft)
    width = max(WIDTHS.get(name, SMALL["moe_intermediate_size"]) for name in stored)
    fields = SMALL | {"moe_intermediate_size": width}
    fields |= ({} if draft is None else {"num_nextn_predict_layers": 1}) | json.loads(changes)
    config = ModelConfig.from_dict(fields)
    generator = torch.Generator().manual_seed(seed)
    parts = [(tuple(model_params(config)), tuple(model_ops(config)), layout)]
    parts += [(tuple(draft_params(config)), tuple(draft_ops(config)), draft)] if draft is not None else []
    tensors: Tensors = {}
    decoded: Tensors = {}
    for params, ops, stored_in in parts:
        for spec in params:
            tensors[spec.key] = _random_param(spec, config, generator)
            decoded[spec.key] = tensors[spec.key]
        scale = fp8_scale or (torch.float32 if stored_in == "fp8-experts" else None)
        for name, weight, encoding, shared_amax in _random_modules(ops, LAYOUTS[stored_in], generator):
            quantized = _quantize(weight, encoding, shared_amax, scale)
            input_scale = torch.rand((), generator=generator) * 0.01 + 1e-4
            tensors.update(encoding.encode(name, quantized, input_scale))
            decoded[name] = dequantize(_read_back(quantized, encoding))
    return _Made(config, fields, tensors, decoded)


def read_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint on disk decoded by the definitions alone, without the project's schema, plan or loader."""
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stored: Tensors = {}
    for shard in folder.glob("*.safetensors"):
        stored.update(load_file(shard))
    decoded: Tensors = {}
    for name, tensor in stored.items():
        module = name.removesuffix(".weight")
        if f"{module}.weight_scale_2" in stored and name.endswith(".weight"):
            scales = stored[f"{module}.weight_scale"], stored[f"{module}.weight_scale_2"]
            decoded[module] = dequantize(QuantTensor(tensor, *scales, NVFP4))
        elif f"{module}.scale" in stored and name.endswith(".weight"):
            decoded[module] = dequantize(QuantTensor(tensor, stored[f"{module}.scale"], None, FP8_BLOCK))
        elif not name.endswith((".weight_scale", ".weight_scale_2", ".input_scale", ".scale")):
            is_norm_or_table = tensor.ndim != 2 or name == "embed.weight" or not name.endswith(".weight")
            decoded[name if is_norm_or_table else module] = tensor
    return Checkpoint(folder, ModelConfig.from_dict(fields), fields, decoded)


def _random_modules(
    ops: Iterable[OpSpec], layout: Layout, generator: torch.Generator
) -> Iterator[tuple[str, torch.Tensor, Encoding, float | None]]:
    """(name, weight, encoding, amax to share). Routed w1 and w3 share a global scale, as ModelOpt ties them."""
    for op in ops:
        weights = {module.name: _random_weight(module, generator) for module in op.modules}
        for module in op.modules:
            partner = (
                module.name.replace(".w1", ".w3") if module.name.endswith(".w1") else module.name.replace(".w3", ".w1")
            )
            tied = ".ffn.experts." in module.name and partner in weights
            amax = max(float(weights[name].abs().max()) for name in (module.name, partner)) if tied else None
            yield module.name, weights[module.name], layout(module.name), amax


def _random_weight(module: ModuleSpec, generator: torch.Generator) -> torch.Tensor:
    n, k = module.shape
    gain = torch.rand((), generator=generator) + 0.5  # a different amplitude, hence global scale, for every module
    return torch.randn(n, k, generator=generator) * gain * k**-0.5


def _quantize(
    weight: torch.Tensor, encoding: Encoding, shared_amax: float | None, fp8_scale: torch.dtype | None
) -> QuantTensor:
    if encoding in (MODELOPT_NVFP4, COMPRESSED_NVFP4):
        tied = None if shared_amax is None else nvfp4_global_scale(torch.tensor([[shared_amax]]))
        return quantize_nvfp4(weight, tied)
    if encoding is NATIVE_MXFP4:
        return quantize_mxfp4(weight)
    if encoding is NATIVE_FP8:
        return quantize_fp8_block(weight, fp8_scale or torch.float8_e8m0fnu)
    if encoding is COMPRESSED_FP8:
        quantized = quantize_fp8_block(weight, torch.float32)
        assert quantized.scale is not None
        return replace(quantized, scale=quantized.scale.to(fp8_scale or torch.bfloat16))
    assert encoding is PLAIN_BF16, encoding
    return QuantTensor(weight.to(torch.bfloat16), None, None, BF16)


def _read_back(weight: QuantTensor, encoding: Encoding) -> QuantTensor:
    """Returns a weight's values once stored: a stored divisor is float32, and so is its multiplier."""
    if encoding is not COMPRESSED_NVFP4:
        return weight
    assert weight.global_scale is not None
    return replace(weight, global_scale=1 / (1 / weight.global_scale))


def _random_param(spec: ParamSpec, config: ModelConfig, generator: torch.Generator) -> torch.Tensor:
    shape, key = spec.shape, spec.key
    if key.endswith("tid2eid"):
        order = torch.rand(shape[0], config.n_routed_experts, generator=generator).argsort(dim=1)
        return order[:, : shape[1]].contiguous()
    noise = torch.randn(shape, generator=generator)
    if key.endswith("norm.weight"):
        return (1 + 0.2 * noise).to(torch.bfloat16)
    if key == "embed.weight":
        return noise.to(torch.bfloat16)
    if key.endswith("_fn"):
        return noise * shape[-1] ** -0.5
    return noise * 0.3 + (1.0 if key.endswith("_scale") else 0.0)
