"""Tools in DeepSeek-V4's markup: the block that offers them, and calls as an answer writes them.

    <｜DSML｜tool_calls>
    <｜DSML｜invoke name="NAME">
    <｜DSML｜parameter name="KEY" string="true">text as it is</｜DSML｜parameter>
    <｜DSML｜parameter name="KEY" string="false">any other JSON value</｜DSML｜parameter>
    </｜DSML｜invoke>
    </｜DSML｜tool_calls>

``｜DSML｜`` is one token. There is no escape for a quotation mark in a name; in an earlier call it is written as it is.
Arguments that are no JSON object are one parameter named ``arguments``: the text itself where it is no JSON.

Source: the format's public description and reference encoder, ``encoding/`` in the DeepSeek-V4 model repositories.
"""

import json
from collections.abc import Mapping, Sequence

from ownpath.chat.markers import Segment, segments_of
from ownpath.chat.messages import ChatFormatError, ToolCall

MAX_DIGITS = 640
"""Digits of a whole number that is read as one; arguments with a longer one are text."""

_OFFER = segments_of("""\
## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a \
"<｜DSML｜tool_calls>" block like the following:

<｜DSML｜tool_calls>
<｜DSML｜invoke name="$TOOL_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$TOOL_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, arrays, \
objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside <think>...</think> \
BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

""")
_OFFER_END = "\n\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.\n"


_CALLS, _CALLS_END = segments_of("\n\n<｜DSML｜tool_calls>\n"), segments_of("</｜DSML｜tool_calls>")
_INVOKE, _INVOKE_END = segments_of('<｜DSML｜invoke name="'), segments_of("\n</｜DSML｜invoke>\n")
_PARAMETER, _PARAMETER_END = segments_of('<｜DSML｜parameter name="'), segments_of("</｜DSML｜parameter>")


def write_json(value: object) -> str:
    """Writes a value as JSON in the format's style: on one line, non-ASCII characters unescaped.

    Errors: ChatFormatError for what JSON lacks.
    """
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError as error:  # infinite, or an integer too long to write
        raise ChatFormatError(f"a value cannot be written as JSON ({error})") from None


def offer_tools(functions: Sequence[Mapping[str, object]]) -> list[Segment]:
    """Writes the block that offers tools to the model: each function's object is one line of JSON."""
    return [*_OFFER, "\n".join(write_json(function) for function in functions), _OFFER_END]


def write_calls(calls: Sequence[ToolCall]) -> list[Segment]:
    """Writes the block of calls that follows an answer's content."""
    segments = list(_CALLS)
    for call in calls:
        segments += [*_INVOKE, call.name, '">\n']
        parameters = _parameters(call.arguments)
        for index, (name, kind, text) in enumerate(parameters):
            segments += [*(["\n"] if index else []), *_PARAMETER, name, f'" string="{kind}">', text, *_PARAMETER_END]
        segments += _INVOKE_END
    return segments + _CALLS_END


def _parameters(arguments: str) -> list[tuple[str, str, str]]:
    """Reads the arguments of an earlier call: for each the name, whether it is a string, and the text to write.

    They may be broken: then they are one parameter.
    """
    try:
        value = json.loads(arguments, parse_int=_whole_number)
        named = value if isinstance(value, dict) else {"arguments": value}
        return [_parameter(name, item) for name, item in named.items()]
    except (ValueError, RecursionError):
        return [("arguments", "true", arguments)]


def _whole_number(digits: str) -> int:
    """Reads a number. Errors: ValueError for one of very many digits, whose reading costs their square."""
    if len(digits.removeprefix("-")) > MAX_DIGITS:
        raise ValueError
    return int(digits)


def _parameter(name: str, value: object) -> tuple[str, str, str]:
    """Writes one parameter. Errors: ValueError for NaN and Infinity, which are Python's and not JSON's, and for half a
    surrogate pair, which is no text."""
    kind, text = ("true", value) if isinstance(value, str) else ("false", write_json(value))
    f"{name}{text}".encode()
    return name, kind, text
