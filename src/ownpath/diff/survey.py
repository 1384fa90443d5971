"""Asks a server everything that the comparison and the checks need; first answers are asked for first.

Each prompt alone, then the same twice more, then all at once several times, then their own tokens scored, then a
conversation, as it comes and with thinking switched off. Where answers to one request differ, all of them are asked for
again with fresh prompts: a fault of a cache or a batch comes back, the chance of others' requests does not.
"""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from ownpath.diff.checks import all_checks
from ownpath.diff.client import CannotAsk
from ownpath.diff.compare import TOLERANCE_NATS, Distances, PromptComparison, compare
from ownpath.diff.local_model import LocalModel
from ownpath.diff.modes import WISHES, ModeMatch, match_count, match_ids
from ownpath.diff.observations import AskRound, Conversation, Observations, Readings
from ownpath.diff.prompts import PromptSet, SurveyPrompt
from ownpath.diff.responses import ChatReading
from ownpath.diff.server import CHAT, RemoteServer
from ownpath.finding import Finding, failed

_BETWEEN_ANSWERS = ("unrepeatable", "cold-cached", "batch-dependent")


@dataclass(frozen=True)
class SurveySize:
    """max_tokens: of each answer. num_together: requests per prompt, all at once."""

    max_tokens: int = 16
    num_together: int = 2
    tolerance: float = TOLERANCE_NATS


@dataclass(frozen=True)
class Difference:
    """The result of a survey. checks: every check's finding. num_rounds: 2 where a suspicion was asked again."""

    comparisons: tuple[PromptComparison, ...]
    distances: Distances
    checks: tuple[Finding, ...]
    tolerance: float
    num_rounds: int

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
        """True if no check found anything."""
        return not self.found


def survey(server: RemoteServer, ours: LocalModel, prompts: PromptSet, effort: SurveySize) -> Difference:
    """Runs the survey. Errors: CannotAsk; ValueError when our own model cannot score what came back."""
    asked = prompts.prompts
    seen = _observe(server, ours, asked, effort)
    checks = all_checks(seen)
    if any(it.id in _BETWEEN_ANSWERS for it in failed(checks)):
        fresh = prompts.spare or asked
        seen = replace(seen, rounds=(*seen.rounds, _ask_round(server, fresh, effort, is_cold=bool(prompts.spare))))
        checks = all_checks(seen)
    return Difference(seen.comparisons, seen.distances, checks, effort.tolerance, len(seen.rounds))


def _observe(
    server: RemoteServer, ours: LocalModel, prompts: Sequence[SurveyPrompt], effort: SurveySize
) -> Observations:
    first_round = _ask_round(server, prompts, effort, is_cold=True)
    generated = first_round.first
    rows = tuple(ours.logprobs(reading) for reading in generated)
    if server.form == "generated":
        scored, scored_rows = generated, tuple(r[: len(g.scored)] for r, g in zip(rows, generated, strict=True))
    else:
        scored = tuple(server.score(prompt) for prompt in prompts)
        scored_rows = tuple(ours.logprobs(reading) for reading in scored)
    if not any(reading.scored for reading in scored) and any(reading.unnamed for reading in generated):
        raise CannotAsk(f"{server.client.root}: no token of its answers can be told apart by name, and it tells no ids")
    pairs = enumerate(zip(scored, scored_rows, strict=True))
    return Observations(
        rounds=(first_round,),
        generated_rows=rows,
        scored=scored,
        scored_rows=scored_rows,
        comparisons=tuple(compare(n, reading, rows_PV) for n, (reading, rows_PV) in pairs),
        conversations=_ask_conversations(server, ours, prompts[0], effort),
        text_ids=_text_ids(server, prompts[0]),
        special_ids=frozenset(i for i in range(ours.tokenizer.num_tokens) if ours.is_special(i)),
        tolerance=effort.tolerance,
    )


def _ask_round(server: RemoteServer, prompts: Sequence[SurveyPrompt], effort: SurveySize, is_cold: bool) -> AskRound:
    first, again, once_more = (tuple(server.generate(p, effort.max_tokens) for p in prompts) for _ in range(3))
    return AskRound(first, again, once_more, _ask_together(server, prompts, effort), is_cold)


def _ask_together(server: RemoteServer, prompts: Sequence[SurveyPrompt], effort: SurveySize) -> tuple[Readings, ...]:
    """Sends every prompt several times, all in flight at once."""
    num_requests = len(prompts) * effort.num_together
    if not num_requests:
        return ((),) * len(prompts)
    with ThreadPoolExecutor(num_requests) as pool:
        asked = [*prompts] * effort.num_together
        answers = list(pool.map(lambda prompt: server.generate(prompt, effort.max_tokens), asked))
    return tuple(tuple(answers[n :: len(prompts)]) for n in range(len(prompts)))


def _ask_conversations(
    server: RemoteServer, ours: LocalModel, prompt: SurveyPrompt, effort: SurveySize
) -> tuple[Conversation, ...]:
    """Sends the chat prompt as it is; if the server then thinks, or may, also with each wish until one is obeyed."""
    asked: list[Conversation] = []
    for wish in ({}, *WISHES):
        try:
            asked.append(_ask_conversation(server, ours, prompt, effort.max_tokens, wish))
        except CannotAsk:
            if not wish:
                return ()  # no chat; the report says "not asked" for what needs it
            continue  # not this field
        mode = asked[-1].mode
        if mode is not None and not mode.thinks:
            break
    return tuple(asked)


def _ask_conversation(
    server: RemoteServer, ours: LocalModel, prompt: SurveyPrompt, max_tokens: int, wish: Mapping[str, object]
) -> Conversation:
    chat = server.chat(prompt, max_tokens, wish)
    match = _match(chat, prompt, ours)
    text = None if chat.ids is None else ours.shown_text(chat.ids)
    return Conversation(json.dumps(wish) if wish else "", chat, match, text)


def _match(chat: ChatReading, prompt: SurveyPrompt, ours: LocalModel) -> ModeMatch | None:
    """Matches a conversation with the modes; where only its length is told, by which of them makes the answer
    likeliest."""
    if chat.prompt_ids is not None:
        return match_ids(chat.prompt_ids, prompt.modes)
    if chat.num_prompt_tokens is None:
        return None
    match = match_count(chat.num_prompt_tokens, prompt.modes)
    if len(match.candidates) < 2 or not chat.ids:
        return match
    ids = chat.ids
    return replace(match, candidates=(max(match.candidates, key=lambda mode: ours.likelihood(mode.ids, ids)),))


def _text_ids(server: RemoteServer, prompt: SurveyPrompt) -> tuple[tuple[int, ...] | None, tuple[int, ...]] | None:
    if server.request_form.sends_ids or server.request_form.path == CHAT:
        return None
    return server.text_ids(prompt), prompt.ids
