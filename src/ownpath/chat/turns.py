"""Merges messages into the turns of the format: tools have no turn of their own, their results are part of a user's.

Messages of users and tools in a row are one user turn, joined by blank lines; the results of several calls stand in the
order of the calls, whatever order they came in. A developer's message is a turn of its own, written like a user's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count

from ownpath.chat.markers import TASKS
from ownpath.chat.messages import ChatFormatError, Message

ROLES = ("system", "developer", "user", "assistant", "tool", "latest_reminder")

# The separator between several pieces of content inside one user turn.
PART_SEPARATOR = "\n\n"


@dataclass(frozen=True)
class _Part:
    """A piece of a user turn. call_idx: for a tool result, the place of its call among all calls; None for text."""

    text: str
    call_idx: int | None = None


def merge_turns(messages: Sequence[Message]) -> list[Message]:
    """Returns the turns of a conversation; their roles are system, developer, user, assistant and latest_reminder.

    Errors: ChatFormatError naming the message.
    """
    turns: list[Message] = []
    parts: list[_Part] = []
    calls: dict[str, int] = {}
    places = count()
    for index, message in enumerate(messages):
        _check(index, messages)
        if message.role in ("user", "tool"):
            parts.append(_part(index, message, calls))
            if index + 1 == len(messages) or messages[index + 1].role not in ("user", "tool"):
                turns.append(replace(message, role="user", content=_join(parts)))
                parts = []
            continue
        for call in message.tool_calls:
            calls[call.call_id] = next(places)
        turns.append(message)
    return turns


def _part(index: int, message: Message, calls: dict[str, int]) -> _Part:
    if message.role == "user":
        return _Part(message.content)
    if message.tool_call_id not in calls:
        text = f"messages[{index}]: tool_call_id {message.tool_call_id!r} names no call of an earlier answer"
        raise ChatFormatError(text)
    return _Part(f"<tool_result>{message.content}</tool_result>", calls[message.tool_call_id])


def _join(parts: Sequence[_Part]) -> str:
    """Joins pieces: tool results in the order of their calls, in the places that results took; texts stay where they
    are."""
    results = iter(sorted((p for p in parts if p.call_idx is not None), key=lambda part: part.call_idx or 0))
    return PART_SEPARATOR.join(part.text if part.call_idx is None else next(results).text for part in parts)


def _check(index: int, messages: Sequence[Message]) -> None:
    message = messages[index]
    following = messages[index + 1].role if index + 1 < len(messages) else None
    if message.role not in ROLES:
        raise ChatFormatError(f"messages[{index}]: role {message.role!r} is not supported")
    if message.role in ("user", "developer", "tool") and following == "latest_reminder":
        raise ChatFormatError(f"messages[{index + 1}]: a latest_reminder stands before a user's message, not after it")
    if message.tool_calls and message.role != "assistant":
        raise ChatFormatError(f"messages[{index}]: only an assistant's message can have tool_calls")
    if not message.task:
        return
    if message.task not in TASKS:
        raise ChatFormatError(f"messages[{index}]: task {message.task!r} is none of {', '.join(TASKS)}")
    role = "assistant" if message.task == "title" else "user"
    if message.role != role:
        raise ChatFormatError(f"messages[{index}]: the task {message.task!r} belongs to a message of role {role!r}")
    if following not in (None, "assistant"):
        raise ChatFormatError(f"messages[{index}]: a task is answered next, not followed by role {following!r}")
