"""Every field that a client may send, and its treatment: the fields that are honoured are those of the request types.

- A label (an id, a hint for a cache, metadata) lets no known server change the answer. It is accepted, named in a
  header of the answer and once in the log; with ``--strict-fields`` it is refused.
- A field that would change the answer and is not implemented is refused by name, except with a value that asks for
  what happens anyway: clients send many fields at their defaults.
- Any other field is refused too, except in messages: clients keep fields of their own there.

``null`` is always "not sent".
"""

from collections.abc import Collection
from dataclasses import dataclass

Neutral = dict[str, tuple[object, ...]]
"""Field that is not implemented -> the values that ask for nothing."""

LABEL_KINDS: dict[str, tuple[str, ...]] = {
    "names of the caller": ("user", "user_id", "safety_identifier"),
    "for the caller's own lists": ("metadata", "client_metadata", "tags", "trace"),
    "ids of the caller's": (
        *("request_id", "rid", "session_id", "conversation_id", "thread_id", "run_id", "trace_id"),
    ),
    "hints for caches": (
        *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "cache_control", "cache_prompt"),
        "id_slot",
    ),
    "what is the same for everyone here": ("store", "service_tier", "usage"),
    "a guess at the answer, to be faster": ("prediction",),
}
LABELS = tuple(name for names in LABEL_KINDS.values() for name in names)
TOKEN_LABELS = (*LABELS, "priority")
"""Of a text or tokens that only become the other."""

_COMMON: Neutral = {
    "length_penalty": (1,),
    "typical_p": (1,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "spaces_between_special_tokens": (True,),
    "detokenize": (True,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "logits_processors": ([],),
    "vllm_xargs": ({},),
    "kv_transfer_params": (),
    "lora_path": (),
    "return_hidden_states": (False,),
    "thinking_token_budget": (),
    "truncation_side": (),
    "logprob_token_ids": ([],),
    "return_token_offsets": (False,),
    "return_weight_versions": (False,),
    "routed_experts_prompt_start": (0,),
    "repetition_detection": (),
    "stream_interval": (1,),
    "watermarking": (False,),
    "ec_transfer_params": (),
    "mm_payload": ("tensors",),
    "return_mm_kwargs": (False,),
}

CHAT: Neutral = _COMMON | {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "reasoning": ({},),
    "include_reasoning": (True,),
    "separate_reasoning": (True,),
    "stream_reasoning": (True,),
    "chat_template": (),
    "add_special_tokens": (False,),
    "documents": ([],),
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
    "return_prompt_text": (False,),
    "moderation": (),
    "echo": (False,),
    "modalities": (["text"],),
    "audio": (),
    "verbosity": ("medium",),
    "web_search_options": (),
}

COMPLETION: Neutral = _COMMON | {
    "suffix": ("",),
    "add_special_tokens": (),
    "prompt_embeds": (),
}

MESSAGE: Neutral = {
    "function_call": (),
    "audio": (),
    "images": ([],),
    "partial": (False,),
    "wo_eos": (False,),
    "task": (),
    "tools": ([],),
    "response_format": (),
    "content_blocks": ([],),
}
"""Fields that would change what a message says. Any other is a label."""

STREAM_OPTIONS: Neutral = {"include_obfuscation": (False,)}
STRUCTURED_OUTPUTS: Neutral = {
    "disable_fallback": (True, False),
    "disable_any_whitespace": (False,),
    "disable_additional_properties": (False,),
    "whitespace_pattern": (),
    "structural_tag": (),
}
TEMPLATE: Neutral = {"drop_thinking": (True,)}

THINKING_LABELS = ("budget_tokens",)
"""DeepSeek's own API takes no notice of it."""
TOOL_LABELS = ("cache_control",)


@dataclass(frozen=True)
class FieldTable:
    """The fields of one kind of object. labels: None where every other field is one."""

    honoured: Collection[str]
    neutral: Neutral
    labels: Collection[str] | None = ()

    def is_label(self, name: str) -> bool:
        """True for a field that is neither honoured nor would change the answer."""
        return self.labels is None or name in self.labels


def asks_for_something(value: object, neutral: tuple[object, ...]) -> bool:
    """True if a value differs from every neutral one.

    ``true`` is not 1 and ``false`` is not 0. What is null in an object is not sent.
    """
    if isinstance(value, dict):
        value = {name: item for name, item in value.items() if item is not None}
    return not any(isinstance(value, bool) == isinstance(other, bool) and value == other for other in neutral)
