"""The reference's values that a rank's are compared with, where several ranks divide a layer.

A rank has some heads, some groups and a part of the shared expert's width: the same part of the reference's values. Of
sums over ranks it has a part that no other value is; the exchange behind it makes the whole sum, on every rank.
"""

from collections.abc import Mapping

import torch

from ownpath.config import Parallel

_SUMMED = ("attn.wo_b", "ffn.experts", "ffn.shared_experts.w2")
"""Values of which each rank has a summand."""
_HEADS = ("attn.wq_b", "attn.q_head_norm", "attn.q", "attn.core", "attn.wo_a", "ffn.shared_experts.swiglu")
"""Values that are divided along their columns."""
_PAIR = "ffn.shared_experts.w13"
"""Gate above up, each divided by itself."""
WHOLE_SUMS = {"attn.reduce": ("attn.wo_b",), "ffn.reduce": ("ffn.experts", "ffn.shared_experts.w2")}
"""Exchange -> the reference's values whose sum it makes. The first one's budget is its budget."""


def reference_part(
    values: Mapping[str, torch.Tensor], layer: str, name: str, parallel: Parallel
) -> torch.Tensor | None:
    """Returns what a right engine has for ``name`` on this rank; ``None`` where it has a summand."""
    if name in WHOLE_SUMS:
        return torch.stack([values[f"{layer}.{part}"] for part in WHOLE_SUMS[name]]).sum(0)
    whole = values[f"{layer}.{name}"]
    if parallel.size == 1:
        return whole
    if name in _SUMMED:
        return None
    if name == _PAIR:
        return torch.cat([_share(half, parallel) for half in whole.chunk(2, -1)], -1)
    return _share(whole.flatten(1), parallel) if name in _HEADS else whole


def _share(columns: torch.Tensor, parallel: Parallel) -> torch.Tensor:
    mine = parallel.share(columns.shape[-1])
    return columns[..., mine.start : mine.stop]
