"""The places where DeepSeek-V4 is tapped inside vLLM, and our names for each tap's tensors.

Found in 0.26, 0.32 and 0.33, CUDA and CPU: modules are the same; hyper-connections are modules (CPU), or functions that
the layer calls (CUDA), so they are read off what enters and leaves the layer and its two parts.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import torch

from ownpath.integrations.vllm.proof.taps import Kept, Point

_LAYER = "model.layers.*"
_ATTN, _FFN = f"{_LAYER}.attn", f"{_LAYER}.ffn"
PRODUCTS = MappingProxyType(
    {
        "attn.fused_wqa_wkv": "attn.wqa_wkv",
        "attn.wq_b": "attn.wq_b",
        "attn.wo_b": "attn.wo_b",
        "attn.indexer.wq_b": "attn.indexer.wq_b",
        "attn.indexer.weights_proj": "attn.indexer.weights_proj",
        "ffn.gate": "ffn.gate",
        "ffn.shared_experts.gate_up_proj": "ffn.shared_experts.w13",
        "ffn.shared_experts.down_proj": "ffn.shared_experts.w2",
    }
)
"""vLLM's linear modules of a layer -> our slots."""

POINTS = (
    Point("", "compute_logits", takes=("in",)),
    Point("model", returns=("out",)),
    Point("model.embed_tokens", takes=("in",)),
    Point(
        _LAYER,
        takes=("x", "positions", "input_ids", "post_mix", "res_mix", "residual"),
        returns=("out", "out_residual", "out_post", "out_comb"),
    ),
    Point(_LAYER, "hc_post"),
    Point(_ATTN, takes=("hidden_states",)),
    Point(_ATTN, "forward_mqa", takes=("q", "kv"), changes=("output",), keeps=("topk_indices_buffer",)),
    Point(_ATTN, "_o_proj", takes=("o",)),
    Point(f"{_ATTN}.compressor", takes=("kv_score",), returns=()),
    Point(f"{_ATTN}.indexer.compressor", takes=("kv_score",), returns=()),
    Point(_FFN, takes=("hidden_states",)),
    Point(f"{_FFN}.experts.routed_experts", "forward_modular", takes=("x", "topk_weights", "topk_ids")),
    Point(f"{_FFN}.experts.routed_experts", "forward_monolithic", takes=("x",)),
    *(Point(f"{_LAYER}.{path}", takes=("in",)) for path in PRODUCTS),
    Point(f"{_ATTN}.wo_b", "apply", holder="quant_method"),  # what a rank adds to the sum over ranks
)

_OF_LAYER = MappingProxyType(
    {
        "forward:x": "enter.x",
        "forward:post_mix": "enter.post",
        "forward:res_mix": "enter.comb",
        "forward:residual": "enter.residual",
        "forward:positions": "positions",
        "forward:input_ids": "token_ids",
        "forward:out": "leave.x",
        "forward:out_residual": "leave.residual",
        "forward:out_post": "leave.post",
        "forward:out_comb": "leave.comb",
        "hc_post:out": "hc_ffn.x",
        "attn.forward:hidden_states": "attn.in",
        "attn.forward:out": "attn.out",
        "attn.forward_mqa:q": "attn.q",
        "attn.forward_mqa:kv": "attn.kv_norm",
        "attn.forward_mqa:output": "attn.core",
        "attn.forward_mqa:topk_indices_buffer": "attn.entry_ids",
        "attn._o_proj:o": "attn.o",
        "attn.wo_b.apply:out": "attn.wo_b.part",
        "attn.compressor.forward:kv_score": "attn.compressor.wkv_wgate",
        "attn.indexer.compressor.forward:kv_score": "attn.indexer.compressor.wkv_wgate",
        "ffn.forward:hidden_states": "ffn.in",
        "ffn.forward:out": "ffn.out",
        "ffn.experts.routed_experts.forward_modular:x": "ffn.experts.in",
        "ffn.experts.routed_experts.forward_modular:topk_weights": "ffn.router.weights",
        "ffn.experts.routed_experts.forward_modular:topk_ids": "ffn.router.ids",
        "ffn.experts.routed_experts.forward_modular:out": "ffn.experts",
        "ffn.experts.routed_experts.forward_monolithic:x": "ffn.experts.in",
        "ffn.experts.routed_experts.forward_monolithic:out": "ffn.experts",
    }
    | {f"{path}.forward:in": f"{slot}.in" for path, slot in PRODUCTS.items()}
    | {f"{path}.forward:out": slot for path, slot in PRODUCTS.items()}
)
_OF_MODEL = MappingProxyType(
    {
        "model.embed_tokens.forward:in": "token_ids",
        "model.embed_tokens.forward:out": "embed",
        "model.forward:out": "norm",
        ".compute_logits:in": "head.in",
        ".compute_logits:out": "head",
    }
)
_LAYER_KEY = re.compile(r"model\.layers\.(\d+)\.(.*)")


def named_values(kept: Mapping[str, torch.Tensor]) -> tuple[Kept, dict[int, Kept]]:
    """Returns what the taps hold by our names: of the model's ends, and of each layer."""
    ends: Kept = {}
    layers: dict[int, Kept] = {}
    for key, value in kept.items():
        match = _LAYER_KEY.fullmatch(key)
        if match is None:
            if key in _OF_MODEL:
                ends[_OF_MODEL[key]] = value
        elif match[2] in _OF_LAYER:
            layers.setdefault(int(match[1]), {})[_OF_LAYER[match[2]]] = value
    return ends, layers


def modules_of(layer_idx: int) -> dict[str, str]:
    """Returns the path of the module that makes each value of a layer; hyper-connections may be functions instead."""
    layer = f"model.layers.{layer_idx}"
    own = {slot: f"{layer}.{path}" for path, slot in PRODUCTS.items()}
    own |= {f"hc_{part}.h": f"{layer}.mhc_pre" for part in ("attn", "ffn")}
    own |= {"hc_ffn.x": f"{layer}.mhc_post", "out": f"{layer}.mhc_post"}
    own |= {name: f"{layer}.{name}" for name in ("attn.q_norm", "attn.kv_norm")}
    own |= {"attn.q": f"{layer}.attn", "attn.core": f"{layer}.attn", "attn.wo_a": f"{layer}.attn.wo_a"}
    for name in ("attn.compressor", "attn.indexer.compressor"):
        own[f"{name}.wkv_wgate"] = f"{layer}.{name}.fused_wkv_wgate"
    experts = f"{layer}.ffn.experts.routed_experts"
    own |= {"ffn.experts": experts, "ffn.router.weights": experts, "ffn.sum": experts}
    return own | {"ffn.shared_experts.swiglu": f"{layer}.ffn.shared_experts.act_fn"}


ENDS_MODULES = MappingProxyType({"embed": "model.embed_tokens", "hc_head": "model.hc_head_op", "head": "lm_head"})
"""The modules of the values outside all layers."""


def layer_of(key: str) -> int | None:
    """Returns the layer of a tap's key, ``None`` for the model's ends."""
    match = _LAYER_KEY.fullmatch(key)
    return None if match is None else int(match[1])


def points_of(layer_ids: frozenset[int] | None) -> tuple[Point, ...]:
    """Returns the points of some layers, and of the ends; ``None``: of all layers."""
    if layer_ids is None:
        return POINTS
    chosen = []
    for point in POINTS:
        if point.path.startswith(_LAYER):
            paths = (point.path.replace("*", str(idx), 1) for idx in sorted(layer_ids))
            chosen += [replace(point, path=path) for path in paths]
        else:
            chosen.append(point)
    return tuple(chosen)
