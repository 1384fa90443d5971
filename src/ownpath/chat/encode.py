"""DeepSeek-V4's chat format: messages -> segments.

The format has no separators of its own. A conversation is one string:

    BOS system-text <｜User｜>text<｜Assistant｜></think>answer EOS <｜User｜>text<｜Assistant｜></think>

``</think>`` straight after ``<｜Assistant｜>`` says "answer without thinking"; ``<think>`` there opens a
reasoning block. Tools and the wanted format of the answer are described behind the system text. The result is a list
of segments, not a string: a marker that the format puts there is a ``Special``, everything that a person wrote is
text and stays text, even when it spells a marker. A developer's message is written like a user's, in a turn of its own.

Source: the format's public description and reference encoder, ``encoding/`` in the DeepSeek-V4 model
    repositories.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ownpath.chat.dsml import offer_tools, write_calls, write_json
from ownpath.chat.markers import (
    ASSISTANT,
    BOS,
    EOS,
    EXTRACTED_URL,
    LATEST_REMINDER,
    TASKS,
    THINK_END,
    THINK_START,
    USER,
    Segment,
    Special,
    join_text,
)
from ownpath.chat.messages import ChatFormatError, Message
from ownpath.chat.turns import merge_turns

_FORMAT_REQUEST = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"


class Ending(Enum):
    """The end of a prompt: an answer's opening; nothing behind whole messages; a message that is to go on."""

    ANSWER = "answer"
    NOTHING = "nothing"
    REST = "rest"


@dataclass(frozen=True)
class Setting:
    """The options of a conversation beside its messages.

    thinking: whether the next answer opens with reasoning.
    effort_text: stands before everything when thinking; see ``effort.RELEASES``.
    functions: tools on offer, each an object with a name, and usually a description and parameters.
    response_schema: the schema that the answer should adhere to, a JSON value; None asks for nothing.
    ending: what follows the last message.
    """

    thinking: bool = False
    effort_text: str = ""
    functions: tuple[Mapping[str, Any], ...] = ()
    response_schema: Any = None
    ending: Ending = Ending.ANSWER


PLAIN = Setting()


def encode_messages(messages: Sequence[Message], setting: Setting = PLAIN) -> list[Segment]:
    """Encodes a conversation as segments, ending where the next turn is to be written.

    A last user's or developer's turn is followed by the opening of the assistant's answer: ``</think>``, or ``<think>``
    with ``thinking``. Reasoning is written only for answers after the last of these turns; that of earlier answers is
    dropped, unless tools are on offer. Unlike the reference encoder, it keeps earlier messages of a developer then.
    With the ending REST the last message is an assistant's, written without its EOS: with ``thinking`` behind its
    reasoning, which is closed even if it is empty, as the reference encoder writes such a message (``wo_eos``).
    Errors: ChatFormatError for what the format has no way to write, naming the message or the call.
    """
    turns = _with_requests(merge_turns(messages), setting)
    if setting.ending is Ending.REST and (turns[-1].role != "assistant" or turns[-1].tool_calls):
        raise ChatFormatError(f"messages[{len(messages) - 1}]: only an assistant's message without calls goes on")
    last_user_idx = max((i for i, turn in enumerate(turns) if turn.role in ("user", "developer")), default=-1)
    segments: list[Segment] = [Special(BOS), setting.effort_text if setting.thinking else ""]
    for index, turn in enumerate(turns):
        is_last = index + 1 == len(turns)
        is_answered = setting.ending is Ending.ANSWER if is_last else turns[index + 1].role == "assistant"
        thinks = setting.thinking and (index >= last_user_idx or bool(setting.functions))
        is_task_result = index > 0 and turns[index - 1].task != ""
        if turn.role == "system":
            segments += [turn.content, *(_requests(setting) if index == 0 else [])]
        elif turn.role == "latest_reminder":
            segments += [Special(LATEST_REMINDER), turn.content]
        elif turn.role == "assistant":
            is_open = is_last and setting.ending is Ending.REST
            segments += _answer(turn, thinks and not is_task_result, is_open)
        else:
            segments += [Special(USER), turn.content]
            segments += _opening(turn, thinks, setting.thinking) if is_answered else []
    return join_text(segments)


def _with_requests(turns: list[Message], setting: Setting) -> list[Message]:
    """Puts tools and response format behind the first system text; without one, behind an empty one."""
    is_needed = bool(setting.functions) or setting.response_schema is not None
    if is_needed and (not turns or turns[0].role != "system"):
        return [Message("system", ""), *turns]
    return turns


def _requests(setting: Setting) -> list[Segment]:
    """Writes what follows the system text: the tools, then the format of the answer."""
    segments: list[Segment] = []
    if setting.functions:
        segments += ["\n\n", *offer_tools(setting.functions)]
    if setting.response_schema is not None:
        segments += ["\n\n", _FORMAT_REQUEST, write_json(setting.response_schema)]
    return segments


def _answer(turn: Message, thinks: bool, is_open: bool) -> list[Segment]:
    segments: list[Segment] = [turn.reasoning, Special(THINK_END)] if thinks else []
    if is_open:
        return [*segments, turn.content]
    segments += [turn.content, *(write_calls(turn.tool_calls) if turn.tool_calls else []), Special(EOS)]
    return [*segments, Special(TASKS["title"])] if turn.task == "title" else segments


def _opening(turn: Message, thinks: bool, thinking: bool) -> list[Segment]:
    """Writes what asks for the answer to a user turn: the assistant's marker, a task's, or both."""
    if turn.task == "action":
        return [Special(ASSISTANT), Special(THINK_START if thinking else THINK_END), Special(TASKS["action"])]
    if turn.task == "read_url":
        return [Special(EXTRACTED_URL), turn.url, Special(TASKS["read_url"])]
    if turn.task:
        return [Special(TASKS[turn.task])]
    return [Special(ASSISTANT), Special(THINK_START if thinks else THINK_END)]
