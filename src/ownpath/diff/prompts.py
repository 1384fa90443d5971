"""The prompts to send: a few sentences, each opened by a number of this run, so that no server has them in its
cache."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ownpath.chat.tokenizer import Tokenizer
from ownpath.diff.modes import ChatMode, modes_of

_SENTENCES = (
    "The capital of France is Paris, and the capital of Italy is Rome. The capital of Spain is",
    "Water boils at one hundred degrees, unless the kettle stands on a high mountain, where it boils",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 3))  # prints",
    "She counted: one, two, three, four, five, six, seven, eight, nine,",
)


@dataclass(frozen=True)
class SurveyPrompt:
    """One text; ids: its tokens; modes: the conversation that opens with it, in every mode of this model's format."""

    text: str
    ids: tuple[int, ...]
    modes: tuple[ChatMode, ...]


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a survey. spare: as many again that no cache knows, to confirm a suspicion; none where the user
    chose the prompts."""

    prompts: tuple[SurveyPrompt, ...]
    spare: tuple[SurveyPrompt, ...] = ()


def make_prompts(tokenizer: Tokenizer, seed: int, texts: Sequence[str] = ()) -> PromptSet:
    """Returns the given texts, or ours after numbers from ``seed``. Errors: ValueError for a text of fewer than 2
    tokens."""
    if texts:
        return PromptSet(tuple(_prompt(tokenizer, text) for text in texts))
    draw = random.Random(seed)
    drawn = [tuple(_prompt(tokenizer, f"{draw.randrange(10**7, 10**8)}. {it}") for it in _SENTENCES) for _ in range(2)]
    return PromptSet(drawn[0], drawn[1])


def probe_prompt(tokenizer: Tokenizer) -> SurveyPrompt:
    """Returns the prompt that finds the server's request form; it shares no cached prefix with the other prompts."""
    return _prompt(tokenizer, "How do you say this?")


def _prompt(tokenizer: Tokenizer, text: str) -> SurveyPrompt:
    ids = tokenizer.encode_raw(text)
    if len(ids) < 2:
        raise ValueError(f"--prompt {text!r}: at least 2 tokens are needed, found {len(ids)}")
    return SurveyPrompt(text, tuple(ids), modes_of(tokenizer, text))
