"""``POST /v1/messages`` and ``/v1/messages/count_tokens`` as types, and their translation into a chat request."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, WithJsonSchema

from ownpath.server.conversation import Strict
from ownpath.server.counts import MAX_MESSAGES, MAX_PARTS, MAX_TOOLS
from ownpath.server.errors import bad_request
from ownpath.server.fields import LABELS, THINKING_LABELS, FieldTable, Neutral
from ownpath.server.given import GivenObject
from ownpath.server.labels import Labels
from ownpath.server.messages.blocks import MESSAGE_ROLES, read_conversation_of
from ownpath.server.messages.tools import HOSTED, read_tool_choice, read_tools
from ownpath.server.passed import PASSED_EVERYWHERE
from ownpath.server.protocol import ChatRequest
from ownpath.server.reading import read_chat_request
from ownpath.server.renaming import renaming
from ownpath.server.sse import JsonObject
from ownpath.server.transcript import Transcript
from ownpath.server.validation import validate

_TEXT_BLOCK = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_TEXT_OR_LIST = {"type": ["string", "array", "null"]}
_MAYBE_TEXT = {"type": ["string", "null"]}
_NAME = {"type": "string", "pattern": '^[^"]+$'}


def _of_type(kind: str, required: dict[str, object], others: dict[str, object]) -> dict[str, object]:
    """The schema of a block of one type."""
    properties = {"type": {"const": kind}, **required, **others}
    return {"type": "object", "properties": properties, "required": ["type", *required]}


_BLOCK = {
    "anyOf": [
        _TEXT_BLOCK,
        _of_type("tool_use", {"id": {"type": "string"}, "name": _NAME}, {}),
        _of_type(
            "tool_result",
            {"tool_use_id": {"type": "string"}},
            {"content": _TEXT_OR_LIST, "is_error": {"enum": [True, False, None]}},
        ),
        _of_type("thinking", {"thinking": {"type": "string"}}, {"signature": _MAYBE_TEXT}),
        _of_type("redacted_thinking", {}, {}),
    ]
}
_SYSTEM_SCHEMA = {
    "anyOf": [{"type": "string"}, {"type": "array", "maxItems": MAX_PARTS, "items": _TEXT_BLOCK}],
}
_MESSAGES_SCHEMA = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "properties": {
            "role": {"enum": MESSAGE_ROLES},
            "content": {"anyOf": [{"type": "string"}, {"type": "array", "maxItems": MAX_PARTS, "items": _BLOCK}]},
        },
        "required": ["role", "content"],
    },
}
_TOOLS_SCHEMA = {
    "type": "array",
    "maxItems": MAX_TOOLS,
    "items": {
        "anyOf": [
            {
                "type": "object",
                "properties": {
                    "type": {"enum": ["custom", None]},
                    "name": _NAME,
                    "description": _MAYBE_TEXT,
                    "input_schema": {"type": "object"},
                },
                "required": ["name", "input_schema"],
            },
            {
                "type": "object",
                "description": "left out beside others",
                "properties": {"type": {"type": "string", "pattern": f"^({'|'.join(HOSTED)})"}},
                "required": ["type"],
            },
        ]
    },
}
_CHOICE_SCHEMA = {
    "type": "object",
    "properties": {"type": {"enum": ["auto", "any", "tool", "none"]}, "name": _MAYBE_TEXT},
    "required": ["type"],
}
_FORMAT_SCHEMA = {
    "type": "object",
    "properties": {"type": {"const": "json_schema"}, "schema": {"type": "object"}},
    "required": ["type", "schema"],
}
_WantedFormat = Annotated[dict[str, object], WithJsonSchema(_FORMAT_SCHEMA)]


class ThinkingOptions(Strict):
    """Turns reasoning on or off; adaptive is on. display: omitted leaves its text out, and the signature carries it."""

    type: Literal["enabled", "adaptive", "disabled"]
    display: Literal["summarized", "omitted"] | None = None


class OutputOptions(Strict):
    """Options of the output. effort: of the reasoning, if it is on."""

    effort: str | None = None
    format: _WantedFormat | None = None


class CountTokensRequest(Strict):
    """``POST /v1/messages/count_tokens``: a request whose prompt is counted and not answered."""

    messages: Annotated[object, WithJsonSchema(_MESSAGES_SCHEMA)] = Field(
        description=f"at most {MAX_MESSAGES}; blocks: text, tool_use, tool_result, thinking and redacted_thinking; a "
        "last message of the assistant goes on"
    )
    system: Annotated[object, WithJsonSchema(_SYSTEM_SCHEMA)] = Field(None, description="a text or text blocks")
    max_tokens: int | None = Field(
        None, ge=1, description="limit on the answer's tokens; clamped to what max_model_len leaves"
    )
    tools: Annotated[object, WithJsonSchema(_TOOLS_SCHEMA)] = Field(
        None,
        description="with an input_schema; beside them tools that a vendor runs are left out and named, alone they "
        "are 400",
    )
    tool_choice: Annotated[object, WithJsonSchema(_CHOICE_SCHEMA)] = Field(
        None, description="auto or none, with disable_parallel_tool_use; any and tool are what chat's required is"
    )
    thinking: ThinkingOptions | None = Field(None, description="whether the answer opens with reasoning; left out: no")
    output_config: OutputOptions = Field(OutputOptions(), description="effort, and format as chat's strict json_schema")
    output_format: _WantedFormat | None = Field(None, description="the older name of output_config.format")
    stop_sequences: list[str] = Field(default_factory=list, description="as chat's stop")
    stream: bool = Field(False, description="server-sent events with names")
    context_management: dict[str, object] | None = Field(
        None, description="edits nothing, and the answer's applied_edits say so"
    )


class MessagesRequest(CountTokensRequest):
    """``POST /v1/messages``: the fields that have a meaning of their own here."""

    max_tokens: int = Field(ge=1, description="limit on the answer's tokens; clamped to what max_model_len leaves")


MESSAGES_NEUTRAL: Neutral = {
    "container": (),
    "mcp_servers": ([],),
    "thread": (),
    "compaction": (),
    "fallbacks": ([],),
}
OWN_LABELS = (
    *("speed", "inference_geo", "diagnostics", "billing_policy", "fallback_credit_token", "user_profile_id"),
    *("workspace_id", "anthropic_version", "anthropic_beta", "betas"),
)
MESSAGES_LABELS = tuple(sorted({*LABELS, *OWN_LABELS} - {*PASSED_EVERYWHERE}))
THINKING_OPTIONS_LABELS = (*THINKING_LABELS, "block_binding")
OUTPUT_LABELS = ("task_budget",)

_OWN = tuple(MessagesRequest.model_fields)
_TABLE = FieldTable((*_OWN, *PASSED_EVERYWHERE), MESSAGES_NEUTRAL, MESSAGES_LABELS)
_NESTED = {
    "thinking": FieldTable(ThinkingOptions.model_fields.keys(), {}, THINKING_OPTIONS_LABELS),
    "output_config": FieldTable(OutputOptions.model_fields.keys(), {}, OUTPUT_LABELS),
}
_NAMES = {
    "messages": "messages",
    "stop": "stop_sequences",
    "reasoning_effort": "output_config.effort",
    "response_format": "output_config.format",
    "response_format.json_schema": "output_config.format",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
}


@dataclass(frozen=True)
class AskedMessage:
    """A request and its translation. names: chat's fields -> the request's, for errors and adjustments."""

    own: CountTokensRequest
    chat: ChatRequest
    names: dict[str, str]

    @property
    def omits_reasoning(self) -> bool:
        """True if the reasoning's text is to be left out."""
        return self.own.thinking is not None and self.own.thinking.display == "omitted"


def read_messages_request(body: dict[str, object], labels: Labels | None = None) -> AskedMessage:
    """Validates a request and translates it, and notes its labels. Errors: ApiError 400 naming the field."""
    return _read(MessagesRequest, body, labels or Labels())


def read_count_request(body: dict[str, object], labels: Labels | None = None) -> AskedMessage:
    """The same for a request whose tokens are counted. Errors: ApiError 400 naming the field."""
    return _read(CountTokensRequest, body, labels or Labels())


def _read(model: type[CountTokensRequest], body: dict[str, object], labels: Labels) -> AskedMessage:
    kept = labels.keep_fields(body, _TABLE)
    for name, table in _NESTED.items():
        value = kept.get(name)
        if isinstance(value, dict):
            kept[name] = labels.keep_fields(value, table, f"{name}.", f"{name}.")
    passed = {name: kept.pop(name) for name in PASSED_EVERYWHERE if name in kept}
    own = validate(model, kept)
    if own.context_management is not None:
        labels.accept("context_management", "context_management")
    request = GivenObject(kept, "", "", labels)
    transcript, offer = read_conversation_of(request), read_tools(request)
    fields = passed | _translated(own, transcript, labels) | read_tool_choice(request, offer)
    names = _NAMES | offer.names(offer.functions)
    with renaming(names):
        return AskedMessage(own, read_chat_request(fields | {"tools": offer.functions}, labels), names)


def _translated(own: CountTokensRequest, transcript: Transcript, labels: Labels) -> JsonObject:
    """Returns chat's fields for those that have other names or values there."""
    messages = transcript.whole()
    if messages[-1]["role"] == "system":
        raise bad_request("messages: at least one message of a user is needed", "messages")
    fields: JsonObject = {"messages": messages, "max_tokens": own.max_tokens, "stream": own.stream}
    fields["stop"] = own.stop_sequences
    if messages[-1]["role"] == "assistant":
        fields["continue_final_message"] = True
    wanted = own.output_format if own.output_config.format is None else own.output_config.format
    if wanted is not None:
        fields["response_format"] = _format(wanted)
    return fields | _reasoning(own, labels)


def _reasoning(own: CountTokensRequest, labels: Labels) -> JsonObject:
    thinks = own.thinking is not None and own.thinking.type != "disabled"
    effort = own.output_config.effort
    if effort is not None and not thinks:
        labels.accept("output_config.effort", "output_config.effort")
    return {"thinking": {"type": "enabled" if thinks else "disabled"}, "reasoning_effort": effort if thinks else None}


def _format(wanted: dict[str, object]) -> JsonObject:
    """Translates a format, whose schema the answer has to keep to."""
    if wanted.get("type") != "json_schema" or not isinstance(wanted.get("schema"), dict) or len(wanted) > 2:
        text = "output_config.format: must have the type json_schema and a schema, and nothing else"
        raise bad_request(text, "output_config.format", "invalid_value")
    return {"type": "json_schema", "json_schema": {"schema": wanted["schema"], "strict": True}}
