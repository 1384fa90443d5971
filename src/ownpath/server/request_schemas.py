"""JSON schemas of request bodies, made from the types and tables that validate them."""

from collections.abc import Collection, Iterator
from typing import Any

from pydantic.json_schema import models_json_schema

from ownpath.server import fields
from ownpath.server.conversation import Strict
from ownpath.server.counts import MAX_PARTS, MAX_TOOLS
from ownpath.server.fields import Neutral
from ownpath.server.history import TEXT_PARTS
from ownpath.server.messages import request as of_messages
from ownpath.server.passed import PASSED_EVERYWHERE
from ownpath.server.protocol import ChatRequest, CompletionRequest
from ownpath.server.responses import request as of_responses
from ownpath.server.token_api import DetokenizeRequest, TokenizeChatRequest, TokenizeTextRequest

Schema = dict[str, Any]

_REF = "#/components/schemas/{model}"
_TABLES: dict[str, tuple[Neutral, Collection[str] | None]] = {
    "ChatRequest": (fields.CHAT, fields.LABELS),
    "TokenizeChatRequest": (fields.CHAT, fields.LABELS),
    "CompletionRequest": (fields.COMPLETION, fields.LABELS),
    "TokenizeTextRequest": ({}, fields.TOKEN_LABELS),
    "DetokenizeRequest": ({}, fields.TOKEN_LABELS),
    "ResponsesRequest": (of_responses.NEUTRAL, of_responses.RESPONSES_LABELS),
    "ReasoningOptions": (of_responses.REASONING_NEUTRAL, ()),
    "TextOptions": (of_responses.TEXT_NEUTRAL, ()),
    "MessagesRequest": (of_messages.MESSAGES_NEUTRAL, of_messages.MESSAGES_LABELS),
    "CountTokensRequest": (of_messages.MESSAGES_NEUTRAL, of_messages.MESSAGES_LABELS),
    "ThinkingOptions": ({}, of_messages.THINKING_OPTIONS_LABELS),
    "OutputOptions": ({}, of_messages.OUTPUT_LABELS),
    "StreamOptions": (fields.STREAM_OPTIONS, ()),
    "Thinking": ({}, fields.THINKING_LABELS),
    "TemplateOptions": (fields.TEMPLATE, ()),
    "StructuredOutputs": (fields.STRUCTURED_OUTPUTS, ()),
    "Tool": ({}, fields.TOOL_LABELS),
    "ChatMessage": (fields.MESSAGE, None),
    "CallInMessage": ({}, None),
    "CalledFunction": ({}, None),
}
"""Type -> the fields that are accepted beside its own: neutral ones, and labels (None: any other field)."""
_PASSED = {
    "ResponsesRequest": of_responses.PASSED,
    "MessagesRequest": PASSED_EVERYWHERE,
    "CountTokensRequest": PASSED_EVERYWHERE,
}
"""Type -> the fields that it takes from a chat request."""
_LIMITS = {"tools": MAX_TOOLS, "tool_calls": MAX_PARTS}
"""Field -> the most entries that it has. That of ``messages`` is none of these: so many may not fit a body (413)."""
_RECORDING: Schema = {
    "type": "object",
    "properties": {"recording": {"type": "boolean"}},
    "required": ["recording"],
    "additionalProperties": False,
}


def request_schemas() -> dict[str, Schema]:
    """Returns the schema of every request, and of the types in them, by name."""
    types: tuple[type[Strict], ...] = (
        *(ChatRequest, CompletionRequest, TokenizeTextRequest, TokenizeChatRequest, DetokenizeRequest),
        *(of_responses.ResponsesRequest, of_messages.MessagesRequest, of_messages.CountTokensRequest),
    )
    _, made = models_json_schema([(it, "validation") for it in types], ref_template=_REF)
    schemas: dict[str, Schema] = made["$defs"]
    for name, passed in _PASSED.items():
        of_chat = schemas["ChatRequest"]["properties"]
        schemas[name]["properties"] |= {it: of_chat[it] for it in passed}
    for name, (neutral, labels) in _TABLES.items():
        schemas[name] = _opened(schemas[name], neutral, labels)
    content = {"anyOf": [{"type": "string"}, {"type": "null"}, _parts()]}
    schemas["ChatMessage"]["properties"]["content"] = content
    return schemas | {"RecordingRequest": _RECORDING}


def _opened(schema: Schema, neutral: Neutral, labels: Collection[str] | None) -> Schema:
    """Adds what is accepted beside a type's own fields; null is a field that is not sent."""
    required = schema.get("required", [])
    properties = {
        name: _limited(name, field if name in required else _or_null(field))
        for name, field in schema["properties"].items()
    }
    for name, values in neutral.items():
        properties[name] = {"enum": [*values, None], "description": "not supported: another value is 400"}
    for name in labels or ():
        properties[name] = {"description": "changes nothing"}
    return schema | {"properties": properties, "additionalProperties": labels is None}


def _or_null(field: Schema) -> Schema:
    if "enum" in field:
        others = {name: value for name, value in field.items() if name != "type"}
        return others | {"enum": [*(value for value in field["enum"] if value is not None), None]}
    inner = {name: value for name, value in field.items() if name not in ("description", "default", "title")}
    if not inner:  # anything
        return field
    options = inner.get("anyOf", [inner])
    null = [] if {"type": "null"} in options else [{"type": "null"}]
    return {name: value for name, value in field.items() if name not in inner} | {"anyOf": [*options, *null]}


def _limited(name: str, field: Schema) -> Schema:
    for option in (field, *field.get("anyOf", ())):
        if name in _LIMITS and option.get("type") == "array":
            option["maxItems"] = _LIMITS[name]
    return field


def _parts() -> Schema:
    """The forms of content in parts."""
    return {"type": "array", "items": {"anyOf": [{"type": "string"}, *_part_forms()]}, "maxItems": MAX_PARTS}


def _part_forms() -> Iterator[Schema]:
    for kind, field in TEXT_PARTS.items():
        properties = {"type": {"const": kind}, field: {"type": ["string", "null"]}}
        yield {"type": "object", "properties": properties, "required": ["type", field]}
