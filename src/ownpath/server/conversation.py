"""The parts of a chat request that shape the prompt: messages, tools, reasoning, and the answer's format."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from ownpath.chat.messages import Message, ToolCall
from ownpath.server.errors import bad_request, shorten

ROLES = ("system", "user", "assistant", "tool", "latest_reminder")


class Strict(BaseModel):
    """Strict types (no "1" for 1, no true for 1), finite numbers, no unnamed fields."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


def _content(value: object) -> str:
    """Returns text; text parts are joined as the format joins the parts of a turn."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string or a non-empty list of text parts")
    for index, part in enumerate(value):
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise ValueError(f"part {index} must be an object with a type")
        if part["type"] != "text":
            raise ValueError(f"part {index} is of type {shorten(part['type'])}; only text is supported yet")
        if not isinstance(part.get("text"), str) or len(part) != 2:
            raise ValueError(f"part {index} must have exactly the fields type and text")
    return "\n\n".join(part["text"] for part in value)


def _name(value: str) -> str:
    if not value or '"' in value:
        raise ValueError("must be a name, without quotation marks")
    return value


Name = Annotated[str, AfterValidator(_name)]


class CalledFunction(Strict):
    """The function that an earlier answer called. arguments: the text of a JSON object, as in that answer."""

    name: Name
    arguments: str


class CallInMessage(Strict):
    """A tool call of an earlier answer."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Strict):
    """One message of the conversation; a list of text parts has become one text."""

    role: str
    content: Annotated[str, BeforeValidator(_content)] | None = None
    reasoning_content: str = ""
    tool_calls: list[CallInMessage] = []
    tool_call_id: str | None = None

    def check(self, param: str) -> None:
        """Refuses a field that is missing, or that this role does not have. Errors: ApiError 400."""
        if self.role not in ROLES:
            raise bad_request(
                f"{param}role: {shorten(self.role)} is not supported yet", f"{param}role", "unsupported_value"
            )
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise bad_request(f"{param}content: Field required", f"{param}content")
        if self.role == "tool" and self.tool_call_id is None:
            raise bad_request(f"{param}tool_call_id: Field required", f"{param}tool_call_id")
        misplaced = {
            "tool_call_id": self.role != "tool" and self.tool_call_id is not None,
            "tool_calls": self.role != "assistant" and bool(self.tool_calls),
            "reasoning_content": self.role != "assistant" and self.reasoning_content != "",
        }
        for name in (name for name, is_given in misplaced.items() if is_given):
            raise bad_request(f"{param}{name}: a message of role {self.role!r} has none", f"{param}{name}")

    def as_message(self) -> Message:
        """Converts the message for the encoder."""
        calls = tuple(ToolCall(call.function.name, call.function.arguments, call.id) for call in self.tool_calls)
        return Message(self.role, self.content or "", self.reasoning_content, calls, self.tool_call_id or "")


def _function(value: object) -> dict[str, object]:
    """Returns a function's own object, which the model reads as it was sent; null is not sent."""
    if not isinstance(value, dict):
        raise ValueError("must be an object")
    function = {key: item for key, item in value.items() if item is not None}
    types = {"name": str, "description": str, "parameters": dict, "strict": bool}
    for key, item in function.items():
        if key not in types:
            raise ValueError(f"unknown field {shorten(key)}")
        if not isinstance(item, types[key]):
            raise ValueError(f"{key} is of the wrong type")
    if function.get("strict"):
        raise ValueError("strict cannot be promised: the model is told about the parameters, not bound to them")
    _name(function.get("name", ""))
    return function


class Tool(Strict):
    """A tool on offer."""

    type: Literal["function"]
    function: Annotated[dict[str, object], BeforeValidator(_function)]


def _tools(tools: list[Tool]) -> list[Tool]:
    names = [tool.function["name"] for tool in tools]
    if len(set(names)) != len(names):
        raise ValueError("two tools have the same name")
    return tools


Tools = Annotated[list[Tool], AfterValidator(_tools)]


def _tool_choice(value: object) -> str:
    if value not in ("none", "auto"):
        raise ValueError("only 'none' and 'auto' are supported yet: a call can be asked for, not promised")
    return str(value)


ToolChoice = Annotated[str, BeforeValidator(_tool_choice)]


class Thinking(Strict):
    """Turns reasoning on or off."""

    type: Literal["enabled", "disabled"]


class TemplateOptions(Strict):
    """The same options under the names that other servers' clients use."""

    thinking: bool | None = None
    enable_thinking: bool | None = None
    reasoning_effort: str | None = None


class JsonSchema(Strict):
    """A schema for the answer. name: a label for the client's own use."""

    name: str | None = None
    # The name "schema" is taken by the base class.
    value: dict[str, object] = Field(alias="schema")
    strict: Literal[False] | None = None


class ResponseFormat(Strict):
    """The format that the answer should have."""

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
