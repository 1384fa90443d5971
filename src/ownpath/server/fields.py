"""The fields that clients send and this server does not implement, with the values that ask for nothing.

Clients send many fields at their defaults. A default asks for what happens anyway, so it is accepted; any
other value would change the answer, so it is refused by name. ``null`` is always "not sent". A field in no
table is refused too.
"""

Neutral = dict[str, tuple[object, ...]]

_COMMON: Neutral = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "top_k": (0, -1),
    "min_p": (0,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "priority": (0,),
    "cache_salt": (),
}

CHAT: Neutral = _COMMON | {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "reasoning": (),
    "chat_template": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "verbosity": (),
    "web_search_options": (),
    "store": (False,),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
    "prompt_cache_key": (),
    "safety_identifier": (),
}

COMPLETION: Neutral = _COMMON | {
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "add_special_tokens": (),
    "prompt_embeds": (),
}

MESSAGE: Neutral = {
    "name": (),
    "function_call": (),
    "refusal": (),
    "audio": (),
    "annotations": ([],),
    "reasoning": ("",),
}

STREAM_OPTIONS: Neutral = {"continuous_usage_stats": (False,), "include_obfuscation": (False,)}


def asks_for_something(value: object, neutral: tuple[object, ...]) -> bool:
    """True if a value differs from every neutral one. ``true`` is not 1 and ``false`` is not 0."""
    return not any(isinstance(value, bool) == isinstance(other, bool) and value == other for other in neutral)
