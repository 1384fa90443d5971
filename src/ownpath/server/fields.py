"""What becomes of every field that a client may send: the fields that are honoured are those of the request types.

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

LABELS: dict[str, str] = {
    "user": "a name of the caller",
    "user_id": "likewise",
    "safety_identifier": "likewise",
    "metadata": "for the caller's own lists",
    "tags": "likewise",
    "store": "whether the provider keeps the answer; nothing is kept here",
    "service_tier": "a class of service; there is one",
    "priority": "a place in the queue; there is one queue",
    "prompt_cache_key": "a hint for a cache of prompts",
    "prompt_cache_retention": "likewise",
    "prompt_cache_options": "likewise",
    "cache_control": "likewise",
    "cache_prompt": "likewise",
    "cache_salt": "likewise",
    "id_slot": "likewise",
    "prediction": "a guess at the answer, to be faster",
    "usage": "a provider's switch for usage, which is always told",
    "request_id": "an id of the caller's",
    "rid": "likewise",
    "session_id": "likewise",
    "conversation_id": "likewise",
    "thread_id": "likewise",
    "run_id": "likewise",
    "trace_id": "likewise",
    "trace": "likewise",
    "client_metadata": "likewise",
}
"""Label of a request -> what it is for."""

_COMMON: Neutral = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "logit_bias": ({}, []),
    "top_k": (0, -1),
    "min_p": (0,),
    "typical_p": (1,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "detokenize": (True,),
    "prompt_logprobs": (),
    "return_tokens_as_token_ids": (False,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "logits_processors": ([],),
    "vllm_xargs": ({},),
    "kv_transfer_params": (),
    "lora_path": (),
    "return_hidden_states": (False,),
}

CHAT: Neutral = _COMMON | {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "reasoning": ({},),
    "include_reasoning": (True,),
    "separate_reasoning": (True,),
    "stream_reasoning": (True,),
    "thinking_token_budget": (),
    "chat_template": (),
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "continue_final_message": (False,),
    "documents": ([],),
    "mm_processor_kwargs": ({},),
    "echo": (False,),
    "modalities": (["text"],),
    "audio": (),
    "verbosity": ("medium",),
    "web_search_options": (),
}

COMPLETION: Neutral = _COMMON | {
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "add_special_tokens": (),
    "prompt_embeds": (),
}

MESSAGE: Neutral = {
    "function_call": (),
    "audio": (),
    "images": ([],),
    "prefix": (False,),
    "partial": (False,),
    "wo_eos": (False,),
    "task": (),
    "tools": ([],),
    "response_format": (),
    "content_blocks": ([],),
}
"""Fields that would change what a message says. Any other is a label."""

STREAM_OPTIONS: Neutral = {"include_obfuscation": (False,)}
TEMPLATE: Neutral = {"drop_thinking": (True,)}

THINKING_LABELS = ("budget_tokens",)
"""DeepSeek's own API takes no notice of it."""
TOOL_LABELS = ("cache_control",)


@dataclass(frozen=True)
class FieldTable:
    """What becomes of the fields of one kind of object. labels: None where every other field is one."""

    honoured: Collection[str]
    neutral: Neutral
    labels: Collection[str] | None = ()

    def is_label(self, name: str) -> bool:
        """True for a field that is neither honoured nor would change the answer."""
        return self.labels is None or name in self.labels


def asks_for_something(value: object, neutral: tuple[object, ...]) -> bool:
    """True if a value differs from every neutral one. ``true`` is not 1 and ``false`` is not 0."""
    return not any(isinstance(value, bool) == isinstance(other, bool) and value == other for other in neutral)
