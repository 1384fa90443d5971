"""Reads requests: which fields count, what they may say together, and the refusal of everything else."""

from typing import TypeVar

from ownpath.chat.encode import Ending
from ownpath.server import fields
from ownpath.server.conversation import (
    NamedTool,
    TemplateOptions,
    Thinking,
    Tool,
)
from ownpath.server.counts import check_answers, check_counts
from ownpath.server.errors import bad_request, shorten
from ownpath.server.fields import FieldTable
from ownpath.server.history import plain_messages
from ownpath.server.labels import Labels
from ownpath.server.protocol import (
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    StreamOptions,
)
from ownpath.server.structured_fields import StructuredOutputs
from ownpath.server.validation import validate

Conversing = TypeVar("Conversing", bound=ChatRequest)

_COMPLETION = FieldTable(CompletionRequest.model_fields.keys(), fields.COMPLETION, fields.LABELS)
_NESTED = {
    "stream_options": FieldTable(StreamOptions.model_fields.keys(), fields.STREAM_OPTIONS),
    "thinking": FieldTable(Thinking.model_fields.keys(), {}, fields.THINKING_LABELS),
    "structured_outputs": FieldTable(
        [field.alias or name for name, field in StructuredOutputs.model_fields.items()], fields.STRUCTURED_OUTPUTS
    ),
    "chat_template_kwargs": FieldTable(TemplateOptions.model_fields.keys(), fields.TEMPLATE),
}
_TOOL = FieldTable(Tool.model_fields.keys(), {}, fields.TOOL_LABELS)


def read_chat_request(body: dict[str, object], labels: Labels | None = None) -> ChatRequest:
    """Validates a chat request, and notes its labels. Errors: ApiError 400 naming the field."""
    request = read_conversation(ChatRequest, body, labels or Labels())
    if request.thinks and request.ending is Ending.NOTHING:
        text = "add_generation_prompt: false opens no answer, so none can begin with reasoning; turn thinking off"
        raise bad_request(text, "add_generation_prompt")
    return request


def read_conversation(model: type[Conversing], body: dict[str, object], labels: Labels) -> Conversing:
    """Validates a request that holds a conversation as chat requests do, and notes its labels.

    Errors: ApiError 400 naming the field.
    """
    check_counts(body)
    table = FieldTable(model.model_fields.keys(), fields.CHAT, fields.LABELS)
    body = known_fields(body, table, labels)
    body = body | {"messages": plain_messages(body.get("messages"), labels)} if "messages" in body else body
    tools = body.get("tools")
    if isinstance(tools, list):
        body = body | {"tools": [_known_tool(tool, index, labels) for index, tool in enumerate(tools)]}
    request = validate(model, body)
    _check_chat(request)
    return request


def read_completion_request(body: dict[str, object], labels: Labels | None = None) -> CompletionRequest:
    """Validates a completions request, and notes its labels. Errors: ApiError 400 naming the field."""
    check_counts(body)
    request = validate(CompletionRequest, known_fields(body, _COMPLETION, labels or Labels()))
    _check_stream_options(request)
    _check_bound(request)
    request.check_minimum(*request.wanted_tokens)
    check_answers(request.n, request.best_of, len(request.prompt))
    if request.max_tokens == 0 and not request.echo and request.prompt_logprobs is None:
        raise bad_request("max_tokens: 0 generates nothing; it needs echo or prompt_logprobs", "max_tokens")
    return request


def _check_chat(request: ChatRequest) -> None:
    _check_stream_options(request)
    request.check_minimum(*request.wanted_tokens)
    check_answers(request.n, request.best_of)
    for index, message in enumerate(request.messages):
        message.check(f"messages.{index}.")
    _check_thinking(request)
    _check_ending(request)
    _check_bound(request)
    _check_tool_choice(request)
    if request.top_logprobs and not request.logprobs:
        raise bad_request("top_logprobs: needs logprobs to be true", "top_logprobs")
    if 0 in (request.max_tokens, request.max_completion_tokens):
        name = "max_tokens" if request.max_tokens == 0 else "max_completion_tokens"
        raise bad_request(f"{name}: 0 generates nothing; an answer needs 1 or more, or -1", name, "invalid_value")
    given = (request.max_tokens, request.max_completion_tokens)
    if None not in given and given[0] != given[1]:
        raise bad_request("max_tokens and max_completion_tokens contradict each other", "max_tokens")


def _check_ending(request: ChatRequest) -> None:
    *earlier, last = request.messages
    for index, message in enumerate(earlier):
        if message.prefix:
            param = f"messages.{index}.prefix"
            raise bad_request(f"{param}: only the last message is continued", param)
    place = f"messages.{len(earlier)}"
    name = f"{place}.prefix" if last.prefix else "continue_final_message"
    if request.ending is Ending.REST and request.add_generation_prompt:
        raise bad_request(f"{name} and add_generation_prompt: true contradict each other", name)
    if request.ending is Ending.REST and last.role != "assistant":
        raise bad_request(f"{name}: {place} is of role {last.role!r}; only an assistant's is continued", name)
    if request.ending is Ending.REST and last.tool_calls:
        raise bad_request(f"{name}: {place} has tool_calls, and nothing follows calls in a message", name)
    if request.ending is Ending.ANSWER and last.role not in ("user", "developer", "tool"):
        raise bad_request(
            "messages: the last message must be the user's, a developer's or a tool's; continue_final_message: true "
            "goes on with an assistant's",
            "messages",
        )


def _check_bound(request: GenerationRequest) -> None:
    if request.response_format is not None:
        request.response_format.check()
    request.bound_by()


def _check_tool_choice(request: ChatRequest) -> None:
    choice = request.tool_choice
    if choice == "required" and not request.tools:
        raise bad_request("tool_choice: 'required' needs tools", "tool_choice", "invalid_value")
    if isinstance(choice, NamedTool) and all(tool.function["name"] != choice.function.name for tool in request.tools):
        text = f"tool_choice: there is no tool {shorten(choice.function.name)} in tools"
        raise bad_request(text, "tool_choice.function.name", "invalid_value")


def _check_thinking(request: ChatRequest) -> None:
    if request.thinking_values() >= {True, False}:
        raise bad_request("thinking, reasoning_effort and chat_template_kwargs contradict each other", "thinking")
    if request.chat_template_kwargs.reasoning_effort not in (None, request.effort):
        text = "reasoning_effort and chat_template_kwargs.reasoning_effort contradict each other"
        raise bad_request(text, "reasoning_effort")


def _check_stream_options(request: GenerationRequest) -> None:
    request.check_scoring(stream=request.stream)
    if request.stream_options is not None and not request.stream:
        raise bad_request("stream_options: needs stream to be true", "stream_options")
    options = request.stream_options
    if options is not None and options.continuous_usage_stats and not options.include_usage:
        param = "stream_options.continuous_usage_stats"
        raise bad_request(f"{param}: needs include_usage to be true", param)


def known_fields(body: dict[str, object], table: FieldTable, labels: Labels) -> dict[str, object]:
    """Keeps the fields that are implemented, of the request and of the objects in it; notes the labels.

    Errors: ApiError 400 naming the field.
    """
    kept = labels.keep_fields(body, table)
    for name, nested in _NESTED.items():
        value = kept.get(name)
        if isinstance(value, dict):
            kept[name] = labels.keep_fields(value, nested, f"{name}.", f"{name}.")
    return kept


def _known_tool(tool: object, index: int, labels: Labels) -> object:
    if not isinstance(tool, dict):
        return tool
    kept = labels.keep_fields(tool, _TOOL, f"tools.{index}.", "tools.")
    function = kept.get("function")
    if isinstance(function, dict):
        own = FieldTable(function.keys() - set(fields.TOOL_LABELS), {}, fields.TOOL_LABELS)
        kept["function"] = labels.keep_fields(function, own, f"tools.{index}.function.", "tools.function.")
    return kept
