"""Conversations as training documents. Every prompt is what ownpath's own encoder writes, so serving matches training.

A document is a list of pieces, each a special token or plain text, with a flag for what the model must learn to say.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ownpath.chat.encode import PLAIN, Setting, encode_messages
from ownpath.chat.markers import Segment, Special
from ownpath.chat.messages import Message


@dataclass(frozen=True)
class Piece:
    """Part of a document. ``special``: ``text`` is one special token. ``answer``: the model learns to produce it."""

    text: str
    special: bool = False
    answer: bool = False


Document = list[Piece]


@dataclass(frozen=True)
class Conversation:
    """Messages, the last of which is the answer to learn, and their setting."""

    messages: tuple[Message, ...]
    setting: Setting = PLAIN

    @property
    def answer(self) -> Message:
        return self.messages[-1]

    @property
    def prompt(self) -> list[Segment]:
        """The text that a server encodes to get the last answer."""
        return encode_messages(self.messages[:-1], self.setting)


def conversation_document(conversation: Conversation, last_only: bool = False) -> Document:
    """Returns the whole conversation; answers are learnt where a server would prompt for them with exactly this text.

    An earlier answer of a thinking conversation without tools is not learnt: its reasoning has been removed, so its
    prompt would differ. last_only: learn only the last answer.
    """
    messages, setting = conversation.messages, conversation.setting
    whole = encode_messages(messages, setting)
    learnt: set[int] = set()
    for index, message in enumerate(messages):
        if message.role == "assistant" and (not last_only or index + 1 == len(messages)):
            prompt = encode_messages(messages[:index], setting)
            if whole[: len(prompt)] == prompt:
                learnt |= set(range(len(prompt), len(encode_messages(messages[: index + 1], setting))))
    return [_piece(segment, place in learnt) for place, segment in enumerate(whole)]


def _piece(segment: Segment, answer: bool) -> Piece:
    if isinstance(segment, Special):
        return Piece(segment.text, special=True, answer=answer)
    return Piece(segment, answer=answer)


def with_system(system: str, messages: Sequence[Message]) -> tuple[Message, ...]:
    """Puts the system text, if there is one, in front of the messages."""
    return (*([Message("system", system)] if system else []), *messages)
