"""The prompts to send: a few sentences, each opened by a number of this run, so that no server has them in its
cache."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ownpath.chat.encode import encode_messages
from ownpath.chat.messages import Message
from ownpath.chat.tokenizer import Tokenizer

_SENTENCES = (
    "The capital of France is Paris, and the capital of Italy is Rome. The capital of Spain is",
    "Water boils at one hundred degrees, unless the kettle stands on a high mountain, where it boils",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 3))  # prints",
    "She counted: one, two, three, four, five, six, seven, eight, nine,",
)


@dataclass(frozen=True)
class SurveyPrompt:
    """One text; ids: its tokens; chat_ids: those of the conversation that opens with it, in this model's format."""

    text: str
    ids: tuple[int, ...]
    chat_ids: tuple[int, ...]


def make_prompts(tokenizer: Tokenizer, seed: int, texts: Sequence[str] = ()) -> list[SurveyPrompt]:
    """Returns the given texts, or ours after a number from ``seed``. Errors: ValueError for a text of fewer than 2
    tokens."""
    draw = random.Random(seed)
    chosen = texts or [f"{draw.randrange(10**7, 10**8)}. {sentence}" for sentence in _SENTENCES]
    return [_prompt(tokenizer, text) for text in chosen]


def probe_prompt(tokenizer: Tokenizer) -> SurveyPrompt:
    """Returns the prompt that finds the server's request form; it shares no cached prefix with the other prompts."""
    return _prompt(tokenizer, "How do you say this?")


def _prompt(tokenizer: Tokenizer, text: str) -> SurveyPrompt:
    ids = tokenizer.encode_raw(text)
    if len(ids) < 2:
        raise ValueError(f"--prompt {text!r}: at least 2 tokens are needed, found {len(ids)}")
    chat_ids = tokenizer.encode_segments(encode_messages([Message("user", text)]))
    return SurveyPrompt(text, tuple(ids), tuple(chat_ids))
