"""The parts of a chat request that shape the prompt: messages, tools, reasoning, and the answer's format."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from ownpath.chat.dsml import write_json
from ownpath.chat.messages import Message, ToolCall
from ownpath.server.errors import bad_request, shorten

ROLES = ("system", "developer", "user", "assistant", "tool", "latest_reminder")
_SPEECHLESS_ROLES = ("assistant", "tool")
"""They may have nothing to say: an answer of calls alone, a tool without a result."""


@dataclass
class FirstFailure:
    """The context of one validation. is_found: a field was wrong, so that the others need no look any more."""

    is_found: bool = False


class Strict(BaseModel):
    """Strict types (no "1" for 1, no true for 1), finite numbers, no unnamed fields.

    With a FirstFailure as context, fields after the first wrong one are not looked at, at whatever depth. The errors of
    a request are then that one, and for each object around it one unnamed field and the required fields that are left
    out: fewer than ten, whatever it sends.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _keep_one_unnamed(cls, value: object) -> object:
        named = {field.alias or name for name, field in cls.model_fields.items()}
        if not isinstance(value, dict) or value.keys() <= named:
            return value
        unnamed = next(name for name in value if name not in named)
        return {name: item for name, item in value.items() if name in named or name is unnamed}

    @field_validator("*", mode="wrap")
    @classmethod
    def _look_until_one_is_wrong(
        cls, value: object, look: ValidatorFunctionWrapHandler, info: ValidationInfo[FirstFailure | None]
    ) -> object:
        if info.context is None:
            return look(value)
        if info.context.is_found:
            return value
        try:
            return look(value)
        except ValueError:
            info.context.is_found = True
            raise


def _arguments(value: object) -> str:
    """Returns the text of arguments, which some clients send as the value that it spells."""
    return value if isinstance(value, str) else write_json(value)


class CalledFunction(Strict):
    """The function that an earlier answer called. arguments: as in that answer, broken or not; left out: null."""

    name: str
    arguments: Annotated[
        str, BeforeValidator(_arguments), WithJsonSchema({"description": "text, or the value that it spells"})
    ] = "null"


class CallInMessage(Strict):
    """A tool call of an earlier answer. id: left out, no result can name the call."""

    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Strict):
    """One message of the conversation; ``history`` has made one text of its parts.

    reasoning: another name of reasoning_content. refusal: what an assistant said instead of content. prefix: the
    answer goes on where this last message ends.
    """

    role: Annotated[str, WithJsonSchema({"enum": ROLES})]
    content: str | None = None
    reasoning_content: str = ""
    reasoning: str = ""
    refusal: str = ""
    tool_calls: Annotated[list[CallInMessage], FailFast()] = []
    tool_call_id: str | None = None
    prefix: bool = False

    def check(self, param: str) -> None:
        """Refuses a field that is missing, or that this role does not have. Errors: ApiError 400."""
        if self.role not in ROLES:
            raise bad_request(
                f"{param}role: {shorten(self.role)} is not supported yet", f"{param}role", "unsupported_value"
            )
        if self.content is None and self.role not in _SPEECHLESS_ROLES:
            raise bad_request(f"{param}content: Field required", f"{param}content")
        if self.role == "tool" and self.tool_call_id is None:
            raise bad_request(f"{param}tool_call_id: Field required", f"{param}tool_call_id")
        misplaced = {"tool_call_id": self.role != "tool" and self.tool_call_id is not None}
        if self.role != "assistant":
            own = ("tool_calls", "reasoning_content", "reasoning", "refusal")
            misplaced |= {name: bool(getattr(self, name)) for name in own}
        for name in (name for name, is_given in misplaced.items() if is_given):
            raise bad_request(f"{param}{name}: a message of role {self.role!r} has none", f"{param}{name}")
        if self.reasoning and self.reasoning_content not in ("", self.reasoning):
            text = f"{param}reasoning: it contradicts reasoning_content, whose other name it is"
            raise bad_request(text, f"{param}reasoning")

    def as_message(self) -> Message:
        """Converts the message for the encoder."""
        calls = tuple(ToolCall(call.function.name, call.function.arguments, call.id) for call in self.tool_calls)
        content = "\n\n".join(text for text in (self.content, self.refusal) if text)
        reasoning = self.reasoning_content or self.reasoning
        return Message(self.role, content, reasoning, calls, self.tool_call_id or "")


def _name(value: str) -> str:
    if not value or '"' in value:
        raise ValueError("must be a name, without quotation marks")
    return value


Name = Annotated[str, AfterValidator(_name)]


_FUNCTION_TYPES = {"name": str, "description": str, "parameters": dict, "strict": bool}
FUNCTION_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": '^[^"]+$'},
        "description": {"type": ["string", "null"]},
        "parameters": {"type": ["object", "null"]},
        "strict": {"type": ["boolean", "null"]},
    },
    "required": ["name"],
}
"""The values that ``_function`` takes."""


def _function(value: object) -> dict[str, object]:
    """Returns a function's own object, which the model reads as it was sent; null is not sent."""
    if not isinstance(value, dict):
        raise ValueError("must be an object")
    function = {key: item for key, item in value.items() if item is not None}
    for key, item in function.items():
        if key not in _FUNCTION_TYPES:
            raise ValueError(f"unknown field {shorten(key)}")
        if not isinstance(item, _FUNCTION_TYPES[key]):
            raise ValueError(f"{key} is of the wrong type")
    _name(function.get("name", ""))
    return function


class Tool(Strict):
    """A tool on offer."""

    type: Literal["function"]
    function: Annotated[dict[str, object], BeforeValidator(_function), WithJsonSchema(FUNCTION_SCHEMA)]


def _tools(tools: list[Tool]) -> list[Tool]:
    names = [tool.function["name"] for tool in tools]
    if len(set(names)) != len(names):
        raise ValueError("two tools have the same name")
    return tools


Tools = Annotated[list[Tool], FailFast(), AfterValidator(_tools)]


class ChosenFunction(Strict):
    """The function that must be called."""

    name: Name


class NamedTool(Strict):
    """A choice of one tool."""

    type: Literal["function"]
    function: ChosenFunction


_CHOICES = ("none", "auto", "required")
TOOL_CHOICE_SCHEMA = {
    "anyOf": [
        {"enum": list(_CHOICES)},
        {
            "type": "object",
            "properties": {
                "type": {"const": "function"},
                "function": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
            },
            "required": ["type", "function"],
        },
    ]
}
"""The values that ``_tool_choice`` takes."""


def _tool_choice(value: object) -> object:
    """Reads a word, or the object that names a function. Errors: ValueError."""
    if isinstance(value, str) and value in _CHOICES:
        return value
    try:
        return NamedTool.model_validate(value)
    except ValidationError:
        raise ValueError(
            'must be "none", "auto", "required", or {"type": "function", "function": {"name": NAME}}'
        ) from None


ToolChoice = Annotated[str | NamedTool, BeforeValidator(_tool_choice), WithJsonSchema(TOOL_CHOICE_SCHEMA)]


class Thinking(Strict):
    """Turns reasoning on or off."""

    type: Literal["enabled", "disabled"]


class TemplateOptions(Strict):
    """The same options under the names that other servers' clients use."""

    thinking: bool | None = None
    enable_thinking: bool | None = None
    reasoning_effort: str | None = None


class JsonSchema(Strict):
    """A schema for the answer. name: a label for the client's own use. strict: changes nothing, it binds anyway."""

    name: str | None = None
    # The name "schema" is taken by the base class.
    value: dict[str, object] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """The format that the answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def check(self) -> None:
        """Refuses contradicting fields. Errors: ApiError 400."""
        if (self.json_schema is not None) != (self.type == "json_schema"):
            text = "response_format: json_schema goes with the type 'json_schema', and only with it"
            raise bad_request(text, "response_format.json_schema")

    def schema_for_model(self) -> object:
        """Returns the schema that the prompt asks for; None for none."""
        if self.json_schema is not None:
            return self.json_schema.value
        return {"type": "json_object"} if self.type == "json_object" else None
