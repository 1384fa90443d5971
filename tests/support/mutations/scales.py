"""Scales that are valid and wrong: a global scale, a matrix's block scales, a layer's experts, a plain tensor."""

import torch

from support.broken import Tensors
from support.mutations.mutation import Mutation, OnDisk, assigned, tensors_changed

FILE = ("file",)
DENSE, EXPERT = "layers.2.attn.wo_b", "layers.1.ffn.experts.3.w2"


def times(key: str, factor: float) -> OnDisk:
    return assigned(key, lambda scale: (scale.float() * factor).to(scale.dtype))


def layer_times(layer: str, factor: float) -> OnDisk:
    def changed(tensors: Tensors) -> None:
        for key in tensors:
            if key.startswith(f"{layer}.ffn.experts.") and key.endswith(".weight_scale_2"):
                tensors[key] = tensors[key] * factor

    return tensors_changed(changed)


def exponents_up(scale: torch.Tensor) -> torch.Tensor:
    """E8M0 scales times 32."""
    return (scale.view(torch.uint8) + 5).view(scale.dtype)


def _dense(what: str, where: str, change: OnDisk, model: str = "small") -> Mutation:
    return Mutation(what, "F14", where, change, stages=FILE, model=model)


MUTATIONS = {
    "a dense global scale times 30": _dense("weight_scale_2", DENSE, times(f"{DENSE}.weight_scale_2", 30)),
    "a dense global scale times 1000": _dense("weight_scale_2", DENSE, times(f"{DENSE}.weight_scale_2", 1000)),
    "a dense global scale times 0.001": _dense("weight_scale_2", DENSE, times(f"{DENSE}.weight_scale_2", 0.001)),
    "a scale in front of a norm times 30": _dense(
        "wq_a's weight_scale_2", "layers.1.attn.wq_a", times("layers.1.attn.wq_a.weight_scale_2", 30)
    ),
    "an expert's global scale times 30": _dense("weight_scale_2", EXPERT, times(f"{EXPERT}.weight_scale_2", 30)),
    "global scale squared": _dense(
        "weight_scale_2", EXPERT, assigned(f"{EXPERT}.weight_scale_2", lambda scale: scale * scale)
    ),
    "a layer's experts times 30": _dense(
        "every weight_scale_2 of them", "layers.1.ffn.experts.w2", layer_times("layers.1", 30)
    ),
    "block scales divided by 64": _dense(
        "all of weight_scale", "layers.1.attn.wq_b", times("layers.1.attn.wq_b.weight_scale", 1 / 64)
    ),
    "MXFP4 block scales times 32": _dense(
        "an expert's exponents", EXPERT, assigned(f"{EXPERT}.scale", exponents_up), model="native"
    ),
    "FP8 block scales times 32": _dense(
        "the exponents of wkv", "layers.1.attn.wkv", assigned("layers.1.attn.wkv.scale", exponents_up), model="native"
    ),
    "a BF16 matrix times 30": _dense("a router's weight", "layers.2.ffn.gate", times("layers.2.ffn.gate.weight", 30)),
    "the head times 1000": _dense("head.weight", "head", times("head.weight", 1000)),
    "the embedding times 0.001": _dense("embed.weight", "embed.weight", times("embed.weight", 0.001)),
    "a norm times 1000": _dense(
        "a norm's weight", "layers.1.attn_norm.weight", times("layers.1.attn_norm.weight", 1000)
    ),
}
