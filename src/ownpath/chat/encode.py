"""DeepSeek-V4's chat format: messages -> segments.

The format has no separators of its own. A conversation is one string:

    BOS system-text <｜User｜>text<｜Assistant｜></think>answer EOS <｜User｜>text<｜Assistant｜></think>

``</think>`` straight after ``<｜Assistant｜>`` says "answer without thinking"; ``<think>`` there opens a
reasoning block. The result is a list of segments, not a string: a marker that the format puts there is a
``Special``, everything that a person wrote is text and stays text, even when it spells a marker.

Source: the format's public description and reference encoder, ``encoding/`` in the DeepSeek-V4 model
    repositories.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK_START = "<think>"
THINK_END = "</think>"
SPECIALS = (BOS, EOS, USER, ASSISTANT, THINK_START, THINK_END)

# How the format joins several pieces of content inside one user turn.
PART_SEPARATOR = "\n\n"


class ChatFormatError(ValueError):
    """Messages that the format cannot express; the message names which one."""


@dataclass(frozen=True)
class Message:
    """One turn. ``reasoning`` is the thinking part of an assistant's answer, without its delimiters."""

    role: str
    content: str
    reasoning: str = ""


@dataclass(frozen=True)
class Special:
    """A marker of the format: always one token, looked up by id, never tokenised as text."""

    text: str


Segment = Special | str


def encode_messages(messages: Sequence[Message], thinking: bool = False) -> list[Segment]:
    """The segments of a conversation, ending where the next turn is to be written.

    A last user turn is followed by the opening of the assistant's answer: ``</think>``, or ``<think>`` with
    ``thinking``. Reasoning is written only for answers after the last user turn; that of earlier answers is
    dropped.
    Errors: ChatFormatError for a role other than system, user and assistant.
    """
    for index, message in enumerate(messages):
        if message.role not in ("system", "user", "assistant"):
            raise ChatFormatError(f"messages[{index}]: role {message.role!r} is not supported")
    turns = _merge_user_turns(messages)
    last_user_idx = max((i for i, turn in enumerate(turns) if turn.role == "user"), default=-1)
    segments: list[Segment] = [Special(BOS)]
    for index, turn in enumerate(turns):
        next_role = turns[index + 1].role if index + 1 < len(turns) else None
        thinks = thinking and index >= last_user_idx
        segments += _encode_turn(turn, next_role, thinks)
    return _join_text(segments)


def _encode_turn(turn: Message, next_role: str | None, thinks: bool) -> list[Segment]:
    if turn.role == "system":
        return [turn.content]
    if turn.role == "assistant":
        reasoning: list[Segment] = [turn.reasoning, Special(THINK_END)] if thinks else []
        return [*reasoning, turn.content, Special(EOS)]
    opening: list[Segment] = []
    if next_role in (None, "assistant"):
        opening = [Special(ASSISTANT), Special(THINK_START if thinks else THINK_END)]
    return [Special(USER), turn.content, *opening]


def _merge_user_turns(messages: Sequence[Message]) -> list[Message]:
    """User messages in a row are one turn of the format."""
    turns: list[Message] = []
    for message in messages:
        if turns and message.role == turns[-1].role == "user":
            turns[-1] = replace(turns[-1], content=turns[-1].content + PART_SEPARATOR + message.content)
        else:
            turns.append(message)
    return turns


def _join_text(segments: list[Segment]) -> list[Segment]:
    """Neighbouring text becomes one segment (it is tokenised as a whole); empty text disappears."""
    joined: list[Segment] = []
    for segment in segments:
        if isinstance(segment, str) and joined and isinstance(joined[-1], str):
            joined[-1] += segment
        elif segment != "":
            joined.append(segment)
    return joined
