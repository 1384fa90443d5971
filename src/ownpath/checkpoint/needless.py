"""Tensors that exporters write and this model needs nothing of: a short list, each with its reason.

Whatever is neither read nor on this list, nor a draft's that was not asked for, is an error.
"""

import re
from dataclasses import dataclass

DRAFT_KEY = re.compile(r"mtp\.(\d+)\.(.+)")
"""The name of a drafter's tensor."""


@dataclass(frozen=True)
class NeedlessKind:
    """Tensors of one kind. example: the name of one."""

    pattern: re.Pattern[str]
    example: str
    reason: str


NEEDLESS = tuple(
    NeedlessKind(re.compile(pattern), example, reason)
    for pattern, example, reason in (
        (
            r".*\.(?:[qkv]|kv|qkv|prob)(?:_cache)?_(?:rcp_)?(?:scale|zero_point|scaling_factor)"
            r"|.*\.(?:[kv]_proj|wkv)\.output_scale|.*\.[qkv]_bmm_quantizer\._(?:amax|scale)",
            "layers.0.attn.k_scale",
            "scale of a quantised KV cache: keys and values are kept unquantised here",
        ),
        (
            r".*\.(?:input_scale|input_global_scale|input_scale_inv|activation_scale)",
            "layers.0.attn.wo_a.input_scale",
            "scale of an input: no planned kernel reads it",
        ),
        (r".*\._extra_state", "layers.0.attn.wq_b._extra_state", "Transformer Engine's own bookkeeping, no weight"),
        (
            r"(?:.*\.)?(?:inv_freq|\w+_inv_freq|freqs_cis|rope_freqs(?:\.weight)?|rope\.freqs"
            r"|(?:cos|sin)_cached?|cos_sin_cache|rotary(?:_pos)?_emb\.(?:cos|sin))",
            "rotary_emb.inv_freq",
            "table of rotary angles: computed from config.json",
        ),
        (
            r".*\.attn\.(?:.+\.)?(?:kv_cache|k_cache|v_cache|kv_state|score_state)",
            "layers.0.attn.kv_cache",
            "a cache that was saved with the weights: every request starts its own",
        ),
    )
)
"""The list. ``ownpath inspect --list`` prints it."""


def needless_reason(key: str) -> str | None:
    """Returns why nothing needs to read a tensor of this native name, or ``None`` if it is not on the list."""
    return next((kind.reason for kind in NEEDLESS if kind.pattern.fullmatch(key)), None)


def may_stay_unread(key: str) -> bool:
    """Returns True if a tensor is on the list or a drafter's, so that a checkpoint without it is complete."""
    return DRAFT_KEY.fullmatch(key) is not None or needless_reason(key) is not None
