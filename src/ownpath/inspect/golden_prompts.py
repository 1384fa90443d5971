"""Prompts written by hand from the chat format's description, to compare an encoder and a tokenizer with.

Source: the format's public description and its tests, ``encoding/`` in the DeepSeek-V4 model repositories.
"""

from dataclasses import dataclass

from ownpath.chat.encode import PLAIN, Setting
from ownpath.chat.messages import Message, ToolCall


@dataclass(frozen=True)
class GoldenPrompt:
    """A conversation, and the prompt that the format gives it."""

    name: str
    messages: tuple[Message, ...]
    prompt: str
    setting: Setting = PLAIN


_TOOLS = """## Tools

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

{"name": "now"}

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""

GOLDEN_PROMPTS = (
    GoldenPrompt(
        "chat",
        (Message("user", "What is 2+2?"),),
        "<｜begin▁of▁sentence｜><｜User｜>What is 2+2?<｜Assistant｜></think>",
    ),
    GoldenPrompt(
        "thinking",
        (Message("system", "You are a helpful assistant."), Message("user", "What is 2+2?")),
        "<｜begin▁of▁sentence｜>You are a helpful assistant.<｜User｜>What is 2+2?<｜Assistant｜><think>",
        Setting(thinking=True),
    ),
    GoldenPrompt(
        "several turns",
        (
            Message("system", "You are a helpful assistant."),
            Message("user", "Hello"),
            Message("assistant", "Hi there!", reasoning="A greeting."),
            Message("user", "What is the capital of France?"),
        ),
        "<｜begin▁of▁sentence｜>You are a helpful assistant.<｜User｜>Hello<｜Assistant｜></think>Hi there!"
        "<｜end▁of▁sentence｜><｜User｜>What is the capital of France?<｜Assistant｜><think>",
        Setting(thinking=True),
    ),
    GoldenPrompt(
        "tools",
        (
            Message("user", "What time is it?"),
            Message("assistant", "", tool_calls=(ToolCall("now", '{"zone": "UTC", "digits": 2}', "a"),)),
            Message("tool", "noon", tool_call_id="a"),
        ),
        f"<｜begin▁of▁sentence｜>\n\n{_TOOLS}<｜User｜>What time is it?<｜Assistant｜></think>\n\n"
        '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="now">\n'
        '<｜DSML｜parameter name="zone" string="true">UTC</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="digits" string="false">2</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜tool_calls><｜end▁of▁sentence｜>"
        "<｜User｜><tool_result>noon</tool_result><｜Assistant｜></think>",
        Setting(functions=({"name": "now"},)),
    ),
)
"""A chat, thinking, several turns (reasoning of earlier ones is dropped), tools with a call and its result."""

ROUND_TRIPS = (
    "The quick brown fox jumps over the lazy dog.",
    "  two spaces,\ta tab\r\n\nand lines  ",
    "0123456789 3.14159 1e-6 0x7F",
    'def f(x: int) -> str:\n    return f"{x:>8}"  # code\n',
    "深度求索：模型是怎样工作的？",
    "Zażółć gęślą jaźń, naïve façade, Ελληνικά, русский, עברית, العربية",
    "e\u0301 is not é; \u200d joins 👩\u200d🔬",
    "\x00\x01\x7f",
)
"""Texts of every kind that a byte-level vocabulary must give back as they are."""
