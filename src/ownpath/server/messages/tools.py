"""``tools`` and ``tool_choice`` of ``/v1/messages``.

Tools with a schema of their own are functions. Tools that Anthropic's own server runs are left out beside others.
"""

from ownpath.server.counts import MAX_TOOLS
from ownpath.server.fields import TOOL_LABELS, FieldTable, Neutral
from ownpath.server.given import GivenObject
from ownpath.server.offers import Offer, ToolKey, choice_of, not_run_here
from ownpath.server.sse import JsonObject

HOSTED = ("web_search_", "web_fetch_", "code_execution_", "tool_search_tool_", "mcp_toolset")
_OF_CLIENTS = ("bash_", "text_editor_", "computer_", "memory_", "browser_")
"""Beginnings of their types."""

_LABELS = (*TOOL_LABELS, "defer_loading", "eager_input_streaming")
_NEUTRAL: Neutral = {"allowed_callers": (["direct"],)}
_TOOL = FieldTable(("type", "name", "description", "input_schema", "strict", "input_examples"), _NEUTRAL, _LABELS)
_CHOICE = FieldTable(("type", "name", "disable_parallel_tool_use"), {})
_CHOICE_WORDS = {"auto": "auto", "any": "required", "none": "none"}


def read_tools(request: GivenObject) -> Offer:
    """Reads ``tools``. Errors: ApiError 400 naming the tool and the field."""
    offer = Offer()
    for tool in request.objects("tools", MAX_TOOLS):
        kind = tool.type_name("custom")
        if kind.startswith(HOSTED):
            offer.leave_out(tool)
        elif kind.startswith(_OF_CLIENTS):
            raise not_run_here(tool, kind)
        elif kind != "custom":
            raise tool.unknown_type("tools with an input_schema are")
        else:
            kept = tool.keep(_TOOL)
            offer.add(kept, ToolKey("custom", kept.text("name")), _function(kept))
    offer.check()
    return offer


def _function(tool: GivenObject) -> JsonObject:
    """Returns a tool as chat's function. Examples of its input are JSON schema's own ``examples``."""
    schema = tool.maybe_object("input_schema")
    if schema is None:
        raise tool.refusal("input_schema", "Field required")
    examples = [dict(example.value) for example in tool.objects("input_examples")]
    function: JsonObject = {"name": tool.text("name")}
    function |= {name: tool.value[name] for name in ("description", "strict") if name in tool.value}
    return function | {"parameters": dict(schema.value) | ({"examples": examples} if examples else {})}


def read_tool_choice(request: GivenObject, offer: Offer) -> JsonObject:
    """Returns chat's fields for ``tool_choice``. Errors: ApiError 400."""
    given = request.maybe_object("tool_choice")
    if given is None:
        return {}
    choice = given.keep(_CHOICE)
    kind, at_most_one = choice.type_name(), choice.value.get("disable_parallel_tool_use", False)
    choice.maybe_text("name")
    if not isinstance(at_most_one, bool):
        raise choice.refusal("disable_parallel_tool_use", "must be true or false")
    fields: JsonObject = {"parallel_tool_calls": not at_most_one}
    if kind == "tool":
        flat_name = offer.find(ToolKey("custom", choice.text("name")), f"{choice.place}name")
        return fields | {"tool_choice": choice_of(flat_name)}
    if kind not in _CHOICE_WORDS:
        raise choice.unknown_type("auto, any, tool and none are")
    return fields | {"tool_choice": _CHOICE_WORDS[kind]}
