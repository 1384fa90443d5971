"""``tools`` and ``tool_choice`` of ``/v1/responses``.

Functions are offered as they are. A custom tool, whose input is one text, is a function with one parameter. Functions
in a namespace have both names in one. Tools that OpenAI's own server runs are left out beside others.
"""

import json

from ownpath.server.counts import MAX_TOOLS
from ownpath.server.errors import ApiError, bad_request, shorten
from ownpath.server.fields import TOOL_LABELS, FieldTable, Neutral
from ownpath.server.given import GivenObject
from ownpath.server.offers import Offer, ToolKey, choice_of, not_run_here
from ownpath.server.sse import JsonObject

_HOSTED = ("file_search", "code_interpreter", "image_generation", "mcp", "tool_search", "programmatic_tool_calling")
_OF_CLIENTS = ("local_shell", "shell", "apply_patch", "computer", "computer_use_preview")
TOOL_TYPES = ("function", "custom", "namespace")

_LABELS = (*TOOL_LABELS, "defer_loading")
_NEUTRAL: Neutral = {"async": (False,), "allowed_callers": (["direct"],), "output_schema": ()}
_FUNCTION_FIELDS = ("name", "description", "parameters", "strict")
_FUNCTION = FieldTable(("type", *_FUNCTION_FIELDS), _NEUTRAL, _LABELS)
_CUSTOM = FieldTable(("type", "name", "description", "format"), _NEUTRAL, _LABELS)
_NAMESPACE = FieldTable(("type", "name", "tools"), {}, (*_LABELS, "description"))
_NO_GRAMMAR = "a grammar is not enforced inside a call yet; leave format out"
_INPUT = "input"
_CUSTOM_PARAMETERS = {"type": "object", "properties": {_INPUT: {"type": "string"}}, "required": [_INPUT]}
_CHOICE_WORDS = ("none", "auto", "required")
_KNOWN_CHOICES = "none, auto, required, or an object of type function, custom or allowed_tools"


def is_hosted(kind: str) -> bool:
    """True for a tool that OpenAI's own server runs."""
    return kind in _HOSTED or kind.startswith("web_search")


def read_offer(request: GivenObject) -> Offer:
    """Reads ``tools``. Errors: ApiError 400 naming the tool and the field."""
    offer = Offer()
    for tool in request.objects("tools", MAX_TOOLS):
        kind = tool.type_name()
        if is_hosted(kind):
            offer.leave_out(tool)
        else:
            _add(offer, tool, kind)
            offer.told.append(dict(tool.value))
    offer.check()
    return offer


def _add(offer: Offer, tool: GivenObject, kind: str) -> None:
    if kind in _OF_CLIENTS:
        raise not_run_here(tool, kind)
    if kind not in TOOL_TYPES:
        raise tool.unknown_type("function, custom and namespace are")
    if kind == "namespace":
        space = tool.keep(_NAMESPACE)
        for function in space.objects("tools", MAX_TOOLS):
            if function.type_name() != "function":
                raise function.unknown_type("a namespace has functions")
            _add_function(offer, function, space.text("name"))
    elif kind == "custom":
        _add_custom(offer, tool.keep(_CUSTOM))
    else:
        _add_function(offer, tool, "")


def _add_function(offer: Offer, tool: GivenObject, namespace: str) -> None:
    kept = tool.keep(_FUNCTION)
    key = ToolKey("function", kept.text("name"), namespace)
    offer.add(kept, key, {name: kept.value[name] for name in _FUNCTION_FIELDS if name in kept.value})


def _add_custom(offer: Offer, tool: GivenObject) -> None:
    wanted = tool.maybe_object("format")
    if wanted is not None and wanted.type_name() != "text":
        raise tool.refusal("format", _NO_GRAMMAR, "unsupported_value")
    about = {} if tool.maybe_text("description") is None else {"description": tool.text("description")}
    key = ToolKey("custom", tool.text("name"))
    offer.add(tool, key, {"name": key.name, **about, "parameters": _CUSTOM_PARAMETERS})


def arguments_of_input(text: str) -> str:
    """Returns the arguments of a custom tool's function for its input."""
    return json.dumps({_INPUT: text}, ensure_ascii=False)


def input_of_arguments(arguments: str) -> str:
    """Returns a custom tool's input from the arguments that the model wrote; others than the one as they are."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    is_input = isinstance(value, dict) and isinstance(value.get(_INPUT), str) and len(value) == 1
    return str(value[_INPUT]) if is_input else arguments


def read_choice(value: object, offer: Offer) -> tuple[object, list[JsonObject]]:
    """Reads ``tool_choice``. Returns chat's, and the functions that the model may call. Errors: ApiError 400."""
    if isinstance(value, str) or value is None:
        if value not in (None, *_CHOICE_WORDS):
            raise _wrong_choice(f"{shorten(value)} is none of {_KNOWN_CHOICES}")
        return value or "auto", offer.functions
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(kind, str):
        raise _wrong_choice(f"must be {_KNOWN_CHOICES}")
    if kind in ("function", "custom"):
        return choice_of(_named(value, offer)), offer.functions
    if kind != "allowed_tools":
        raise _wrong_choice(f"{shorten(kind)} is not supported yet; it is {_KNOWN_CHOICES}")
    mode, tools = value.get("mode", "auto"), value.get("tools")
    if mode not in ("auto", "required") or not isinstance(tools, list) or not all(isinstance(it, dict) for it in tools):
        raise _wrong_choice("allowed_tools have a mode, auto or required, and a list of tools")
    return mode, offer.only([_named(tool, offer) for tool in tools if not is_hosted(str(tool.get("type")))])


def _named(tool: JsonObject, offer: Offer) -> str:
    name, space = tool.get("name"), tool.get("namespace") or ""
    if not isinstance(name, str) or not isinstance(space, str):
        raise _wrong_choice("a tool is chosen by its type and its name")
    return offer.find(ToolKey(str(tool.get("type", "function")), name, space), "tool_choice")


def _wrong_choice(text: str) -> ApiError:
    return bad_request(f"tool_choice: {text}", "tool_choice", "invalid_value")
