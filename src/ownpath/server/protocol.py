"""Requests as types: the fields that are read, their ranges, and the refusal of everything else."""

from typing import Annotated, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from ownpath.engine.limits import MAX_TEMPERATURE, MAX_TOP_LOGPROBS, SEED_LIMIT
from ownpath.server import fields
from ownpath.server.conversation import (
    ROLES,
    ChatMessage,
    ResponseFormat,
    Strict,
    TemplateOptions,
    Thinking,
    ToolChoice,
    Tools,
)
from ownpath.server.errors import ApiError, bad_request, shorten

MAX_STOPS = 16
MAX_STOP_CHARS = 256
_MAX_INT = 2**31 - 1


def _stops(value: object) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("must be a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise ValueError(f"lists {len(stops)} strings; at most {MAX_STOPS} are allowed")
    if not all(1 <= len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise ValueError(f"each string must have 1 to {MAX_STOP_CHARS} characters")
    return stops


def _prompts(value: object) -> list[str] | list[list[int]]:
    """Reads all four forms of a prompt as a list of prompts, texts or token ids."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return value
        if _is_token_ids(value):
            return [value]
        if all(isinstance(item, list) and _is_token_ids(item) for item in value):
            return value
    raise ValueError("must be a string, a list of strings, a list of token ids, or a list of such lists; not empty")


def _is_token_ids(value: list[object]) -> bool:
    return bool(value) and all(type(item) is int and 0 <= item <= _MAX_INT for item in value)


class StreamOptions(Strict):
    """Options of a stream."""

    include_usage: bool = False


class _GenerationRequest(Strict):
    model: str | None = Field(None, description="the served name; another name is 404")
    max_tokens: int | None = Field(
        None, ge=0, le=_MAX_INT, description="must fit max_model_len with the prompt; left out: 16. 0 needs echo"
    )
    temperature: float = Field(1.0, ge=0, le=MAX_TEMPERATURE, description="0 takes the likeliest token")
    top_p: float = Field(1.0, gt=0, le=1, description="samples from the fewest tokens that reach this probability")
    seed: int | None = Field(
        None, ge=-SEED_LIMIT, lt=SEED_LIMIT, description="the same seed, prompt and parameters draw the same numbers"
    )
    stop: Annotated[list[str], BeforeValidator(_stops)] = Field(
        default_factory=list,
        description=f"the answer ends before it; a string or up to {MAX_STOPS}, of 1 to {MAX_STOP_CHARS} characters",
    )
    stream: bool = Field(False, description="server-sent events, then [DONE]")
    stream_options: StreamOptions | None = Field(
        None, description="include_usage: a last event with usage and no choices; needs stream"
    )
    return_token_ids: bool = Field(
        False, description="adds prompt_token_ids and token_ids to the answer (ownpath's own)"
    )
    user: str | None = Field(None, description="a label of the caller; changes nothing")


class ChatRequest(_GenerationRequest):
    """``POST /v1/chat/completions``."""

    messages: list[ChatMessage] = Field(min_length=1, description=f"roles {', '.join(ROLES)}; ends with user or tool")
    max_tokens: int | None = Field(
        None, ge=1, le=_MAX_INT, description="must fit max_model_len with the prompt; left out: all the room there is"
    )
    max_completion_tokens: int | None = Field(
        None, ge=1, le=_MAX_INT, description="the newer name of max_tokens; both may be sent if they agree"
    )
    logprobs: bool = Field(False, description="one entry for each generated token")
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_TOP_LOGPROBS, description="likeliest tokens in each entry; needs logprobs"
    )
    tools: Tools = Field(
        default_factory=list, description="functions, names all different; strict: true is refused, nothing enforces it"
    )
    tool_choice: ToolChoice = Field(
        "auto", description='auto or none; "required" and a named function are refused: a call cannot be promised'
    )
    parallel_tool_calls: bool = Field(True, description="false is accepted only without tools")
    thinking: Thinking | None = Field(None, description="whether the answer opens with reasoning; left out: no")
    reasoning_effort: str | None = Field(
        None, description='"none" (no thinking) or a word of the model\'s release, which turns thinking on'
    )
    chat_template_kwargs: TemplateOptions = Field(
        TemplateOptions(), description="thinking, enable_thinking, reasoning_effort; must not contradict the others"
    )
    response_format: ResponseFormat | None = Field(
        None, description="asks the model for JSON and does not check the answer; strict: true is refused"
    )

    @property
    def functions(self) -> tuple[dict[str, object], ...]:
        """The functions to tell the model about: none with ``tool_choice`` "none"."""
        return () if self.tool_choice == "none" else tuple(tool.function for tool in self.tools)

    @property
    def effort(self) -> str | None:
        """The word for the reasoning effort, "none" included; None without one."""
        return self.reasoning_effort or self.chat_template_kwargs.reasoning_effort

    @property
    def thinks(self) -> bool:
        """True if the answer should open with reasoning: only if a field asks for it."""
        return True in self.thinking_values()

    def thinking_values(self) -> set[bool | None]:
        """The values that the fields give to thinking, each for itself; None says nothing."""
        options = self.chat_template_kwargs
        by_type = None if self.thinking is None else self.thinking.type == "enabled"
        words = (self.reasoning_effort, options.reasoning_effort)
        by_word = [None if word is None else word != "none" for word in words]
        return {by_type, options.thinking, options.enable_thinking, *by_word}


class CompletionRequest(_GenerationRequest):
    """``POST /v1/completions``. ``prompt`` holds texts or lists of token ids."""

    prompt: Annotated[list[str] | list[list[int]], BeforeValidator(_prompts)] = Field(
        description="a text, a list of texts, token ids, or a list of such lists; each prompt is a choice"
    )
    logprobs: int | None = Field(
        None, ge=0, le=MAX_TOP_LOGPROBS, description="likeliest tokens at each token; with echo of the prompt's too"
    )
    echo: bool = Field(False, description="the text begins with the prompt")


def read_chat_request(body: dict[str, object]) -> ChatRequest:
    """Validates a chat request. Errors: ApiError 400 naming the field."""
    body = _known_fields(body, fields.CHAT, ChatRequest)
    body = _known_nested(body)
    messages = body.get("messages")
    if isinstance(messages, list):
        body["messages"] = [
            _known_fields(message, fields.MESSAGE, ChatMessage, f"messages.{index}.")
            if isinstance(message, dict)
            else message
            for index, message in enumerate(messages)
        ]
    request = _validate(ChatRequest, body)
    _check_chat(request)
    return request


def read_completion_request(body: dict[str, object]) -> CompletionRequest:
    """Validates a completions request. Errors: ApiError 400 naming the field."""
    body = _known_nested(_known_fields(body, fields.COMPLETION, CompletionRequest))
    request = _validate(CompletionRequest, body)
    _check_stream_options(request)
    if request.max_tokens == 0 and not request.echo:
        raise bad_request("max_tokens: 0 generates nothing; it needs echo", "max_tokens")
    return request


def _check_chat(request: ChatRequest) -> None:
    _check_stream_options(request)
    for index, message in enumerate(request.messages):
        message.check(f"messages.{index}.")
    if request.messages[-1].role not in ("user", "tool"):
        raise bad_request("messages: the last message must be the user's or a tool's", "messages")
    _check_thinking(request)
    if request.response_format is not None:
        request.response_format.check()
    if request.functions and not request.parallel_tool_calls:
        text = "parallel_tool_calls: false cannot be promised: the model may call several tools"
        raise bad_request(text, "parallel_tool_calls", "unsupported_value")
    if request.top_logprobs is not None and not request.logprobs:
        raise bad_request("top_logprobs: needs logprobs to be true", "top_logprobs")
    given = (request.max_tokens, request.max_completion_tokens)
    if None not in given and given[0] != given[1]:
        raise bad_request("max_tokens and max_completion_tokens contradict each other", "max_tokens")


def _check_thinking(request: ChatRequest) -> None:
    if request.thinking_values() >= {True, False}:
        raise bad_request("thinking, reasoning_effort and chat_template_kwargs contradict each other", "thinking")
    if request.chat_template_kwargs.reasoning_effort not in (None, request.effort):
        text = "reasoning_effort and chat_template_kwargs.reasoning_effort contradict each other"
        raise bad_request(text, "reasoning_effort")


def _check_stream_options(request: _GenerationRequest) -> None:
    if request.stream_options is not None and not request.stream:
        raise bad_request("stream_options: needs stream to be true", "stream_options")


def _known_nested(body: dict[str, object]) -> dict[str, object]:
    options = body.get("stream_options")
    if not isinstance(options, dict):
        return body
    return body | {"stream_options": _known_fields(options, fields.STREAM_OPTIONS, StreamOptions, "stream_options.")}


def _known_fields(
    body: dict[str, object], unsupported: fields.Neutral, model: type[BaseModel], prefix: str = ""
) -> dict[str, object]:
    """Keeps the fields that are implemented; drops neutral values of the others, refuses everything else."""
    known = {}
    for name, value in body.items():
        if value is None:
            continue
        if name in model.model_fields:
            known[name] = value
        elif name not in unsupported:
            param = prefix + name
            raise bad_request(f"unknown field {shorten(param)}", param[:100], "unknown_parameter")
        elif fields.asks_for_something(value, unsupported[name]):
            param = prefix + name
            raise bad_request(f"{param} is not supported yet", param, "unsupported_parameter")
    return known


RequestModel = TypeVar("RequestModel", bound=BaseModel)


def _validate(model: type[RequestModel], body: dict[str, object]) -> RequestModel:
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise _first_error(error) from None


def _first_error(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = ".".join(str(part) for part in first["loc"])[:100]
    return bad_request(f"{param}: {first['msg'].removeprefix('Value error, ')}", param, "invalid_value")
