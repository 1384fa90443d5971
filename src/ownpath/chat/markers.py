"""The markers of DeepSeek-V4's chat format, and the segments of an encoded conversation.

Source: the format's public description, ``encoding/README.md`` in the DeepSeek-V4 model repositories.
"""

import re
from dataclasses import dataclass

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK_START = "<think>"
THINK_END = "</think>"
DSML = "｜DSML｜"
LATEST_REMINDER = "<｜latest_reminder｜>"
EXTRACTED_URL = "<｜extracted_url｜>"
TASKS = {
    "action": "<｜action｜>",
    "query": "<｜query｜>",
    "authority": "<｜authority｜>",
    "domain": "<｜domain｜>",
    "title": "<｜title｜>",
    "read_url": "<｜read_url｜>",
}
SPECIALS = (
    BOS, EOS, USER, ASSISTANT, THINK_START, THINK_END, DSML, LATEST_REMINDER, EXTRACTED_URL, *TASKS.values(),
)  # fmt: skip


@dataclass(frozen=True)
class Special:
    """A marker of the format: always one token, looked up by id, never tokenised as text."""

    text: str


Segment = Special | str

_ANY_MARKER = re.compile("(" + "|".join(re.escape(marker) for marker in SPECIALS) + ")")


def segments_of(literal: str) -> list[Segment]:
    """Splits a text of the format itself into segments; markers in it are markers. Never use it on a person's text."""
    pieces = _ANY_MARKER.split(literal)
    return [Special(piece) if piece in SPECIALS else piece for piece in pieces if piece]


def join_text(segments: list[Segment]) -> list[Segment]:
    """Joins neighbouring text into one segment (it is tokenised as a whole) and drops empty text."""
    joined: list[Segment] = []
    text: list[str] = []
    for segment in [*segments, None]:
        if isinstance(segment, str):
            text.append(segment)
            continue
        if any(text):
            joined.append("".join(text))
        text = []
        if segment is not None:
            joined.append(segment)
    return joined
