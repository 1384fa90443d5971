"""Tensors that exporters write and this model needs nothing of: a short list, each with its reason.

Whatever is neither read nor on this list, nor a draft's that was not asked for, is an error.
"""

import re

DRAFT_KEY = re.compile(r"mtp\.(\d+)\.(.+)")
"""The name of a drafter's tensor."""

_NEEDLESS = tuple(
    (re.compile(pattern), reason)
    for pattern, reason in (
        (
            r".*\.(?:[qkv]|kv|qkv|prob)(?:_cache)?_(?:rcp_)?(?:scale|zero_point|scaling_factor)"
            r"|.*\.(?:[kv]_proj|wkv)\.output_scale|.*\.[qkv]_bmm_quantizer\._(?:amax|scale)",
            "scale of a quantised KV cache: keys and values are kept unquantised here",
        ),
        (
            r".*\.(?:input_scale|input_global_scale|input_scale_inv|activation_scale)",
            "scale of an input: no planned kernel reads it",
        ),
        (r".*\._extra_state", "Transformer Engine's own bookkeeping, no weight"),
        (
            r"(?:.*\.)?(?:inv_freq|original_inv_freq|\w*_inv_freq|freqs_cis|rope_freqs(?:\.weight)?|rope\.freqs"
            r"|(?:cos|sin)_cache[d]?|cos_sin_cache|rotary(?:_pos)?_emb\.(?:cos|sin))",
            "table of rotary angles: computed from config.json",
        ),
        (
            r".*\.attn\.(?:.+\.)?(?:kv_cache|k_cache|v_cache|kv_state|score_state)",
            "a cache that was saved with the weights: every request starts its own",
        ),
    )
)


def needless_reason(key: str) -> str | None:
    """Returns why nothing needs to read a tensor of this native name, or ``None`` if it is not on the list."""
    return next((reason for pattern, reason in _NEEDLESS if pattern.fullmatch(key)), None)


def may_stay_unread(key: str) -> bool:
    """Returns True if a tensor is on the list or a drafter's, so that a checkpoint without it is complete."""
    return DRAFT_KEY.fullmatch(key) is not None or needless_reason(key) is not None
