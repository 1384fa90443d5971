"""Fields that mean on every surface what they mean in chat, whose request checks them.

A name that chat's request does not have is none here either.
"""

from ownpath.server.protocol import ChatRequest

PASSED_EVERYWHERE = tuple(
    name
    for name in (
        *("model", "temperature", "top_p", "top_k", "min_p", "seed", "stop_token_ids", "ignore_eos", "min_tokens"),
        *("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "include_stop_str_in_output"),
        *("skip_special_tokens", "structured_outputs", "cache_salt", "priority"),
    )
    if name in ChatRequest.model_fields
)
