"""Messages of a conversation: the input of the encoder."""

from dataclasses import dataclass


class ChatFormatError(ValueError):
    """Messages that the format cannot express; the message names which one."""


@dataclass(frozen=True)
class ToolCall:
    """A tool call of an answer. arguments: text, a JSON object unless it broke. call_id: what its result refers to."""

    name: str
    arguments: str
    call_id: str = ""


@dataclass(frozen=True)
class Message:
    """One message.

    role: system, developer, user, assistant, tool or latest_reminder.
    reasoning: the thinking part of an assistant's answer, without its delimiters.
    tool_call_id: of a tool's result, the call that it answers.
    task: a short job for the model about this message: "title" behind an answer, the other ones behind a user's message
    (see ``markers.TASKS``).
    url: the page that the task "read_url" is about.
    """

    role: str
    content: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    task: str = ""
    url: str = ""
