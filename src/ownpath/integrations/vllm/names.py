"""Names: vLLM's layers and our slots, and the parts of a model that a user can leave to vLLM."""

import re
from collections.abc import Mapping
from enum import StrEnum

VARIABLE = "OWNPATH_VLLM"
"""The environment variable that names the parts to take."""
NOTHING = "none"
QUANTIZATION = "ownpath"
"""The quantisation's name in vLLM."""
LOAD_FORMAT = "ownpath"
"""The load format that demands the plugin."""


class VllmPart(StrEnum):
    """A part of the model that we take from vLLM."""

    LINEARS = "linears"
    EXPERTS = "experts"
    WO_A = "wo_a"
    HYPER = "hyper"
    ROPE = "rope"


_SLOTS = {
    "attn.fused_wqa_wkv": ("attn.wqa_wkv", VllmPart.LINEARS),
    "attn.wq_b": ("attn.wq_b", VllmPart.LINEARS),
    "attn.wo_a": ("attn.wo_a", VllmPart.WO_A),
    "attn.wo_b": ("attn.wo_b", VllmPart.LINEARS),
    "attn.indexer.wq_b": ("attn.indexer.wq_b", VllmPart.LINEARS),
    "ffn.experts": ("ffn.experts", VllmPart.EXPERTS),
    "ffn.experts.routed_experts": ("ffn.experts", VllmPart.EXPERTS),
    "ffn.shared_experts.gate_up_proj": ("ffn.shared_experts.w13", VllmPart.LINEARS),
    "ffn.shared_experts.down_proj": ("ffn.shared_experts.w2", VllmPart.LINEARS),
}
"""vLLM's name of a layer, within its decoder layer -> our slot there, and the part that it belongs to."""
_PARTS = dict(_SLOTS.values())
_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.(.+)")


def slot_of(prefix: str, num_hidden_layers: int) -> tuple[str, VllmPart] | None:
    """Returns the slot and part of a layer of vLLM's; ``None``: none of ours, or a draft's, behind the last layer."""
    match = _LAYER.fullmatch(prefix)
    if match is None or int(match[1]) >= num_hidden_layers or match[2] not in _SLOTS:
        return None
    slot, part = _SLOTS[match[2]]
    return f"layers.{int(match[1])}.{slot}", part


def part_of(slot: str) -> VllmPart | None:
    """Returns the part that a slot of the backbone belongs to; ``None``: vLLM multiplies it by itself."""
    match = _LAYER.fullmatch(slot)
    return None if match is None else _PARTS.get(match[2])


def chosen_parts(environment: Mapping[str, str]) -> frozenset[VllmPart]:
    """Returns the parts that ``OWNPATH_VLLM`` names, all where it is not set. Errors: ValueError naming the word."""
    asked = environment.get(VARIABLE, "").replace(",", " ").split()
    if not asked or asked == ["all"]:
        return frozenset(VllmPart)
    if asked == [NOTHING]:
        return frozenset()
    known = {str(part): part for part in VllmPart}
    for word in asked:
        if word not in known:
            raise ValueError(f"{VARIABLE} names {word!r}: it can name {', '.join(known)}, or be 'all' or '{NOTHING}'")
    return frozenset(known[word] for word in asked)
