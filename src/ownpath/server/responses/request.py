"""``POST /v1/responses`` as types, and its translation into a chat request."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, WithJsonSchema

from ownpath.engine.limits import MAX_TOP_LOGPROBS
from ownpath.server.conversation import Strict
from ownpath.server.counts import MAX_MESSAGES, MAX_TOOLS
from ownpath.server.errors import bad_request, shorten
from ownpath.server.fields import LABELS, STREAM_OPTIONS, FieldTable, Neutral
from ownpath.server.given import GivenObject
from ownpath.server.labels import Labels
from ownpath.server.offers import Offer
from ownpath.server.passed import PASSED_EVERYWHERE
from ownpath.server.protocol import ChatRequest
from ownpath.server.reading import read_chat_request
from ownpath.server.renaming import renaming
from ownpath.server.responses.items import INPUT_ROLES, ITEM_TYPES, check_end, read_input
from ownpath.server.responses.tools import TOOL_TYPES, read_choice, read_offer
from ownpath.server.sse import JsonObject
from ownpath.server.validation import validate

ENCRYPTED, LOGPROBS = "reasoning.encrypted_content", "message.output_text.logprobs"
_OF_HOSTED_TOOLS = (
    *("web_search_call.results", "web_search_call.action.sources", "file_search_call.results"),
    *("code_interpreter_call.outputs", "computer_call_output.output.image_url", "message.input_image.image_url"),
)
"""Names of data of tools and inputs that there are none of here."""
_INCLUDABLE = (ENCRYPTED, LOGPROBS, *_OF_HOSTED_TOOLS)
_Summary = Literal["auto", "concise", "detailed"]
_TEXT_OR_LIST = {"type": ["string", "array", "null"]}
_CALLED: dict[str, object] = {"call_id": {"type": "string"}, "name": {"type": "string", "pattern": '^[^"]+$'}}


def _item(kinds: tuple[str | None, ...], required: dict[str, object], others: dict[str, object]) -> dict[str, object]:
    """The schema of an item of some types; ``None``: it may be left out."""
    properties = {"type": {"enum": kinds}, **required, **others}
    return {"type": "object", "properties": properties, "required": [*(["type"] * (None not in kinds)), *required]}


_ITEMS_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "minItems": 1,
            "items": {
                "anyOf": [
                    _item(("message", None), {"role": {"enum": INPUT_ROLES}}, {"content": _TEXT_OR_LIST}),
                    _item(("function_call",), _CALLED, {"arguments": {"type": ["string", "null"]}}),
                    _item(("custom_tool_call",), {**_CALLED, "input": {"type": "string"}}, {}),
                    _item(
                        ("function_call_output", "custom_tool_call_output"),
                        {"call_id": {"type": "string"}},
                        {"output": _TEXT_OR_LIST},
                    ),
                    _item(("reasoning",), {}, {"encrypted_content": {"type": ["string", "null"]}}),
                ]
            },
        },
    ]
}
_TOOLS_SCHEMA = {
    "type": "array",
    "maxItems": MAX_TOOLS,
    "items": {
        "type": "object",
        "description": ", ".join(TOOL_TYPES),
        "properties": {"type": {"type": "string"}},
        "required": ["type"],
    },
}
_CHOICE_SCHEMA = {
    "anyOf": [
        {"enum": ["none", "auto", "required"]},
        {
            "type": "object",
            "properties": {"type": {"enum": ["function", "custom"]}, "name": {"type": "string"}},
            "required": ["type", "name"],
        },
        {"type": "object", "properties": {"type": {"const": "allowed_tools"}}, "required": ["type"]},
    ]
}
_STREAM_SCHEMA = {
    "type": "object",
    "properties": {name: {"enum": [*values, None]} for name, values in STREAM_OPTIONS.items()},
    "additionalProperties": False,
}
_AnyValue = Annotated[object, WithJsonSchema(_CHOICE_SCHEMA)]

PASSED = (*PASSED_EVERYWHERE, "parallel_tool_calls", "stop", "thinking", "chat_template_kwargs")
"""Fields that mean here what they mean in chat, whose request checks them; most are not OpenAI's."""


class ReasoningOptions(Strict):
    """Options of reasoning. generate_summary: the older name of summary."""

    effort: str | None = None
    summary: _Summary | None = None
    generate_summary: _Summary | None = None


class TextOptions(Strict):
    """Options of the answer's text. format: ``text``, ``json_object``, or ``json_schema`` with its fields beside it."""

    format: dict[str, object] | None = None


class ResponsesRequest(Strict):
    """The fields of ``POST /v1/responses`` that have a meaning of their own here."""

    input: Annotated[object, WithJsonSchema(_ITEMS_SCHEMA)] = Field(
        description=f"a text, or up to {MAX_MESSAGES} items: {', '.join(ITEM_TYPES)}; the whole conversation, since "
        "nothing is kept"
    )
    instructions: str | None = Field(None, description="the system's text, before the input")
    max_output_tokens: int | None = Field(
        None, ge=1, description="limit on the answer's tokens; clamped to what max_model_len leaves"
    )
    tools: Annotated[object, WithJsonSchema(_TOOLS_SCHEMA)] = Field(
        None,
        description="of type function, custom (without a grammar) or namespace; beside them tools that a vendor runs "
        "are left out and named, alone they are 400",
    )
    tool_choice: _AnyValue = Field(
        "auto", description="none, auto, or allowed_tools with mode auto; what forces a call is as in chat"
    )
    reasoning: ReasoningOptions = Field(
        ReasoningOptions(),
        description="effort turns reasoning on (none: off); summary gives it as a summary, which is the whole of it",
    )
    text: TextOptions = Field(TextOptions(), description="format: what chat's response_format is")
    include: list[str] = Field(
        default_factory=list,
        description=f"{ENCRYPTED}, {LOGPROBS}; names of what hosted tools would give include nothing",
    )
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS, description=f"likeliest tokens, with {LOGPROBS}")
    stream: bool = Field(False, description="server-sent events with names, each with a sequence_number")
    stream_options: Annotated[dict[str, object] | None, WithJsonSchema(_STREAM_SCHEMA)] = Field(
        None, description="include_obfuscation: false"
    )
    metadata: dict[str, object] = Field(default_factory=dict, description="comes back in the answer")
    truncation: Literal["auto", "disabled"] = Field("disabled", description="what does not fit is 400 either way")
    prompt_cache_key: str | None = Field(None, description="comes back in the answer")
    safety_identifier: str | None = Field(None, description="comes back in the answer")
    user: str | None = Field(None, description="comes back in the answer")

    @property
    def summarizes(self) -> bool:
        """True if the reasoning is to be given as a summary."""
        return self.reasoning.summary is not None or self.reasoning.generate_summary is not None

    @property
    def wants_logprobs(self) -> bool:
        """True if tokens of the text are to have their log-probabilities."""
        return LOGPROBS in self.include or bool(self.top_logprobs)


STATEFUL = ("previous_response_id", "conversation", "prompt")
"""Fields that name what an earlier request left with the server."""
NEUTRAL: Neutral = {
    **dict.fromkeys(STATEFUL, ()),
    "background": (False,),
    "background_options": ({},),
    "context_management": ([],),
    "moderation": (),
    "access_programs": ({},),
    "image": ({},),
}
RESPONSES_LABELS = tuple(sorted({*LABELS, "max_tool_calls"} - {*ResponsesRequest.model_fields, *PASSED}))
REASONING_NEUTRAL: Neutral = {"context": ("auto",), "mode": ("standard",)}
TEXT_NEUTRAL: Neutral = {"verbosity": ("medium",)}

_TABLE = FieldTable((*ResponsesRequest.model_fields, *PASSED), NEUTRAL, RESPONSES_LABELS)
_NESTED = {
    "reasoning": FieldTable(ReasoningOptions.model_fields.keys(), REASONING_NEUTRAL),
    "text": FieldTable(TextOptions.model_fields.keys(), TEXT_NEUTRAL),
    "stream_options": FieldTable((), STREAM_OPTIONS),
}
_NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
    "response_format.json_schema": "text.format",
}


@dataclass(frozen=True)
class AskedResponse:
    """A request and its translation. names: chat's fields -> the request's, for errors and adjustments."""

    own: ResponsesRequest
    chat: ChatRequest
    offer: Offer
    names: dict[str, str]


def read_responses_request(body: dict[str, object], labels: Labels | None = None) -> AskedResponse:
    """Validates a request and translates it, and notes its labels. Errors: ApiError 400 naming the field."""
    labels = labels or Labels()
    for name in STATEFUL:
        if body.get(name) is not None:
            text = f"{name}: this server keeps nothing of earlier requests; send the whole conversation as input"
            raise bad_request(text, name, "unsupported_parameter")
    kept = _known_fields(body, labels)
    passed = {name: kept.pop(name) for name in PASSED if name in kept}
    own = validate(ResponsesRequest, kept)
    for name in own.include:
        if name not in _INCLUDABLE:
            raise bad_request(f"include: {shorten(name)} is none of {', '.join(_INCLUDABLE)}", "include")
    request = GivenObject(kept, "", "", labels)
    transcript, offer = read_input(request, own.instructions), read_offer(request)
    check_end(transcript)
    choice, functions = read_choice(own.tool_choice, offer)
    fields = passed | {"messages": transcript.whole(), "tool_choice": choice, **_translated(own, request)}
    names = _NAMES | offer.names(functions)
    with renaming(names):
        return AskedResponse(own, read_chat_request(fields | {"tools": functions}, labels), offer, names)


def _known_fields(body: dict[str, object], labels: Labels) -> dict[str, object]:
    kept = labels.keep_fields(body, _TABLE)
    for name, table in _NESTED.items():
        value = kept.get(name)
        if isinstance(value, dict):
            kept[name] = labels.keep_fields(value, table, f"{name}.", f"{name}.")
    return kept


def _translated(own: ResponsesRequest, request: GivenObject) -> JsonObject:
    """Returns chat's fields for those that have other names there."""
    fields: JsonObject = {
        "max_completion_tokens": own.max_output_tokens,
        "reasoning_effort": own.reasoning.effort,
        # With log-probabilities each token has to come with its text: the answer is read as a stream is.
        "stream": own.stream or own.wants_logprobs,
    }
    text = request.maybe_object("text")
    wanted = None if text is None else text.maybe_object("format")
    if wanted is not None:
        fields["response_format"] = _format(wanted)
    if own.wants_logprobs:
        fields |= {"logprobs": True, "top_logprobs": own.top_logprobs or 0}
    return fields


_FORMAT = FieldTable(("type", "name", "schema", "strict", "description"), {})


def _format(given: GivenObject) -> JsonObject:
    """Translates ``text.format``: a schema stands beside its type here, and its description may be apart."""
    kept = given.keep(_FORMAT)
    if kept.type_name() != "json_schema":
        return dict(kept.value)
    schema = kept.maybe_object("schema")
    if schema is None:
        raise kept.refusal("schema", "Field required")
    about = kept.maybe_text("description")
    value = dict(schema.value) if about is None else {"description": about, **schema.value}
    inner = {name: kept.value[name] for name in ("name", "strict") if name in kept.value}
    return {"type": "json_schema", "json_schema": inner | {"schema": value}}
