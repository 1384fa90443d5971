"""Bounds on the messages, tools, parts and prompts of a request, checked before anything else looks at them."""

from collections.abc import Iterable

from ownpath.server.errors import bad_request
from ownpath.server.json_shape import CONVERSATION, check_shape

MAX_MESSAGES = 8192
MAX_TOOLS = 1024
MAX_PARTS = 1024
"""Of one message: parts of its content, and tool calls."""
MAX_PROMPTS = 64
MAX_ANSWERS = MAX_PROMPTS
"""Of all prompts of a body together: each runs as one more prompt would."""
MAX_REPEATED_TOKENS = 2**20
"""Prompts' tokens that several answers of a body repeat: no more than a body without ``n`` can make."""


def check_counts(body: dict[str, object]) -> None:
    """Refuses a request that nobody has: each message, part and prompt costs time to check. Errors: ApiError 400."""
    _check("messages", body.get("messages"), MAX_MESSAGES)
    _check("tools", body.get("tools"), MAX_TOOLS)
    prompt = body.get("prompt")
    if isinstance(prompt, list) and not isinstance(next(iter(prompt), 0), int):  # else the token ids of one prompt
        _check("prompt", prompt, MAX_PROMPTS)
    messages = body.get("messages")
    for index, message in enumerate(messages if isinstance(messages, list) else ()):
        if isinstance(message, dict):
            for name in ("content", "tool_calls"):
                _check(f"messages.{index}.{name}", message.get(name), MAX_PARTS)


def check_answers(num_each: int, best_of: int | None, num_prompts: int = 1) -> None:
    """Refuses more answers than prompts might have been sent. Errors: ApiError 400 naming ``n`` or ``best_of``."""
    if best_of not in (None, num_each):
        text = f"best_of is not supported yet, except with the number that n has, {num_each}"
        raise bad_request(text, "best_of", "unsupported_parameter")
    if num_each * num_prompts > MAX_ANSWERS:
        text = f"n: {num_each} answers of {num_prompts} prompts are more than {MAX_ANSWERS} together"
        raise bad_request(text, "n", "invalid_value")


def check_repeated(num_each: int, num_prompt_tokens: int) -> None:
    """Refuses answers that would repeat long prompts many times. Errors: ApiError 400 naming ``n``."""
    if num_each > 1 and num_each * num_prompt_tokens > MAX_REPEATED_TOKENS:
        text = (
            f"n: {num_each} answers that repeat {num_prompt_tokens} prompt tokens hold more than {MAX_REPEATED_TOKENS} "
            "of them; leave out echo and return_token_ids, or ask for fewer answers"
        )
        raise bad_request(text, "n", "invalid_value")


def check_arguments(arguments: Iterable[str]) -> None:
    """Refuses arguments of earlier calls that would make too many values, all together: they are read as JSON once
    more. Errors: ApiError 400."""
    try:
        check_shape([text.encode() for text in arguments], CONVERSATION)
    except ValueError as error:
        raise bad_request(f"messages: the arguments of their calls have {error}", "messages", "invalid_value") from None


def _check(param: str, value: object, limit: int) -> None:
    if isinstance(value, list) and len(value) > limit:
        raise bad_request(f"{param}: {len(value)} entries; at most {limit} are allowed", param, "invalid_value")
