"""Reads the messages of a conversation as clients send them back: with fields of their own, empty, in parts.

What the model reads of them is what DeepSeek's reference encoder writes; the rest is noted as labels.
"""

from ownpath.server.conversation import CalledFunction, CallInMessage, ChatMessage
from ownpath.server.errors import bad_request, shorten
from ownpath.server.fields import MESSAGE, FieldTable
from ownpath.server.labels import Labels

_MESSAGE = FieldTable(ChatMessage.model_fields.keys(), MESSAGE, None)
_CALL = FieldTable(CallInMessage.model_fields.keys(), {}, None)
_FUNCTION = FieldTable(CalledFunction.model_fields.keys(), {}, None)

TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Type of a part of content -> the field that holds its text."""

_SEPARATOR = "\n\n"
"""Text parts are joined as the format joins the parts of a turn."""


def plain_messages(messages: object, labels: Labels) -> object:
    """Returns the messages with the fields that the model reads; what is no list of objects stays for validation.

    Errors: ApiError 400 naming the message and the field.
    """
    if not isinstance(messages, list):
        return messages
    return [
        _message(message, f"messages.{index}.", labels) if isinstance(message, dict) else message
        for index, message in enumerate(messages)
    ]


def _message(message: dict[str, object], place: str, labels: Labels) -> dict[str, object]:
    kept = labels.keep_fields(message, _MESSAGE, place, "messages.")
    if "content" in message:
        kept["content"] = _text(message["content"], place, labels)
    calls = kept.get("tool_calls")
    if isinstance(calls, list):
        kept["tool_calls"] = [
            _call(call, f"{place}tool_calls.{index}.", labels) if isinstance(call, dict) else call
            for index, call in enumerate(calls)
        ]
    return kept


def _call(call: dict[str, object], place: str, labels: Labels) -> dict[str, object]:
    kept = labels.keep_fields(call, _CALL, place, "messages.tool_calls.")
    function = kept.get("function")
    if isinstance(function, dict):
        kept["function"] = labels.keep_fields(function, _FUNCTION, f"{place}function.", "messages.tool_calls.function.")
    return kept


def _text(content: object, place: str, labels: Labels) -> str:
    """Returns the text of content: a string, a list of text parts and strings, or nothing."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_request(f"{place}content: must be a string or a list of text parts", f"{place}content")
    return _SEPARATOR.join(_part_text(part, index, place, labels) for index, part in enumerate(content))


def _part_text(part: object, index: int, place: str, labels: Labels) -> str:
    if isinstance(part, str):
        return part
    problem = _problem_of_part(part)
    if problem is not None:
        raise bad_request(f"{place}content: part {index} {problem}", f"{place}content", "invalid_value")
    assert isinstance(part, dict)
    field = TEXT_PARTS[part["type"]]
    table = FieldTable(("type", field), {}, None)
    return str(labels.keep_fields(part, table, f"{place}content.{index}.", "messages.content.").get(field, ""))


def _problem_of_part(part: object) -> str | None:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        return "must be a string or an object with a type"
    kind = part["type"]
    if kind not in TEXT_PARTS:
        return f"is of type {shorten(kind)}; only text is supported yet"
    if TEXT_PARTS[kind] not in part or not isinstance(part[TEXT_PARTS[kind]], str | None):
        return f"must have a text in its field {TEXT_PARTS[kind]}"
    return None
