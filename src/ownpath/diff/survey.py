"""Asks a server everything that the comparison and the signatures need; first answers are asked for first.

Each prompt alone, then the same again, then all at once several times, then their own tokens scored, then one chat.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from ownpath.diff.client import CannotAsk
from ownpath.diff.compare import TOLERANCE_NATS, PromptComparison, compare
from ownpath.diff.local_model import LocalModel
from ownpath.diff.prompts import SurveyPrompt
from ownpath.diff.responses import ChatReading, SequenceReading
from ownpath.diff.server import CHAT, RemoteServer
from ownpath.diff.signatures import Observations, all_checks
from ownpath.finding import Finding, failed


@dataclass(frozen=True)
class SurveySize:
    """max_tokens: of each answer. num_together: requests per prompt, all at once."""

    max_tokens: int = 16
    num_together: int = 2
    tolerance: float = TOLERANCE_NATS


@dataclass(frozen=True)
class Difference:
    """The result of a survey. checks: every signature's finding."""

    comparisons: tuple[PromptComparison, ...]
    checks: tuple[Finding, ...]
    tolerance: float

    @property
    def found(self) -> tuple[Finding, ...]:
        return tuple(failed(self.checks))

    @property
    def num_positions(self) -> int:
        return sum(len(comparison.positions) for comparison in self.comparisons)

    @property
    def num_divergent(self) -> int:
        return sum(p.diverges(self.tolerance) for comparison in self.comparisons for p in comparison.positions)

    @property
    def agrees(self) -> bool:
        """True if no signature was found and no position diverges."""
        return not self.found and self.num_divergent == 0


def survey(server: RemoteServer, ours: LocalModel, prompts: Sequence[SurveyPrompt], effort: SurveySize) -> Difference:
    """Runs the survey. Errors: CannotAsk; ValueError when our own model cannot score what came back."""
    generated = tuple(server.generate(prompt, effort.max_tokens) for prompt in prompts)
    cached = tuple(server.generate(prompt, effort.max_tokens) for prompt in prompts)
    together = _ask_together(server, prompts, effort)
    rows = tuple(ours.logprobs(reading) for reading in generated)
    if server.form == "generated":
        scored, scored_rows = generated, tuple(r[: len(g.scored)] for r, g in zip(rows, generated, strict=True))
    else:
        scored = tuple(server.score(prompt) for prompt in prompts)
        scored_rows = tuple(ours.logprobs(reading) for reading in scored)
    if not any(reading.scored for reading in scored) and any(reading.unnamed for reading in generated):
        raise CannotAsk(f"{server.client.root}: no token of its answers can be told apart by name, and it tells no ids")
    special = frozenset(i for i in range(ours.tokenizer.num_tokens) if ours.is_special(i))
    seen = Observations(
        generated=generated,
        generated_rows=rows,
        cached=cached,
        together=together,
        scored=scored,
        scored_rows=scored_rows,
        chat=_ask_chat(server, prompts[0], effort),
        chat_ids=prompts[0].chat_ids,
        text_ids=_text_ids(server, prompts[0]),
        special_ids=special,
        tolerance=effort.tolerance,
    )
    pairs = enumerate(zip(scored, scored_rows, strict=True))
    comparisons = tuple(compare(n, reading, rows_PV) for n, (reading, rows_PV) in pairs)
    return Difference(comparisons, all_checks(seen), effort.tolerance)


def _ask_together(
    server: RemoteServer, prompts: Sequence[SurveyPrompt], effort: SurveySize
) -> tuple[tuple[SequenceReading, ...], ...]:
    """Sends every prompt several times, all in flight at once."""
    num_requests = len(prompts) * effort.num_together
    if not num_requests:
        return ((),) * len(prompts)
    with ThreadPoolExecutor(num_requests) as pool:
        asked = [*prompts] * effort.num_together
        answers = list(pool.map(lambda prompt: server.generate(prompt, effort.max_tokens), asked))
    return tuple(tuple(answers[n :: len(prompts)]) for n in range(len(prompts)))


def _ask_chat(server: RemoteServer, prompt: SurveyPrompt, effort: SurveySize) -> ChatReading | None:
    """Sends the chat prompt; None where the server has no chat."""
    try:
        chat = server.chat(prompt, effort.max_tokens)
    except CannotAsk:
        return None  # the report says "not asked" for what needs it
    return chat if chat.prompt_ids is not None else replace(chat, prompt_ids=server.chat_prompt_ids(prompt))


def _text_ids(server: RemoteServer, prompt: SurveyPrompt) -> tuple[tuple[int, ...] | None, tuple[int, ...]] | None:
    if server.request_form.sends_ids or server.request_form.path == CHAT:
        return None
    return server.text_ids(prompt), prompt.ids
