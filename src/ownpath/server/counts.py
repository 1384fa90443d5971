"""Bounds on the messages, tools and parts of a chat request, checked before anything else looks at them."""

from ownpath.server.errors import bad_request

MAX_MESSAGES = 8192
MAX_TOOLS = 1024
MAX_PARTS = 1024
"""Of one message: parts of its content, and tool calls."""


def check_counts(body: dict[str, object]) -> None:
    """Refuses a conversation that nobody has: each message and part costs time to check. Errors: ApiError 400."""
    _check("messages", body.get("messages"), MAX_MESSAGES)
    _check("tools", body.get("tools"), MAX_TOOLS)
    messages = body.get("messages")
    for index, message in enumerate(messages if isinstance(messages, list) else ()):
        if isinstance(message, dict):
            for name in ("content", "tool_calls"):
                _check(f"messages.{index}.{name}", message.get(name), MAX_PARTS)


def _check(param: str, value: object, limit: int) -> None:
    if isinstance(value, list) and len(value) > limit:
        raise bad_request(f"{param}: {len(value)} entries; at most {limit} are allowed", param, "invalid_value")
