"""Bounds on the messages, tools, parts and prompts of a request, checked before anything else looks at them."""

from collections.abc import Iterable

from ownpath.server.errors import bad_request
from ownpath.server.json_shape import CONVERSATION, check_shape

MAX_MESSAGES = 8192
MAX_TOOLS = 1024
MAX_PARTS = 1024
"""Of one message: parts of its content, and tool calls."""
MAX_PROMPTS = 64


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
