"""Turns the answers to the fixed prompts into findings. Every threshold is here, with its reason."""

from collections.abc import Collection
from dataclasses import dataclass

import torch

from ownpath.engine.request import FinishReason
from ownpath.finding import Finding, Verdict
from ownpath.selftest import signatures
from ownpath.selftest.probe import ProbeAnswers, PromptOutput

MAX_REPEATS = 16
"""Running text has no 17 positions in a row with one likeliest continuation; a model that ignores it has them all."""

MAX_FROZEN = 4
"""Twenty float32 log-probabilities equal to the last bit after different tokens are no accident even once; four leave
room for a text that repeats itself in a narrow dtype."""

SAME_NATS = 1e-3
"""Distances below this count as equal: float32's noise through these models stays below 1e-4 nats (the forward is
compared with another implementation of it, at 640 positions), and a different text changes them by order 1."""

MIN_NATS = 0.01
"""A model that is certain to this at most positions of a text that it cannot know, or that never prefers a token by
more, does not tell likely from unlikely. (The median for certainty: however large the logits, two may tie.) Untrained
weights are far from both: logits of standard deviation s prefer their best by about s * sqrt(2 ln V), and s is 0.16 for
64 inputs initialised at 0.02, larger for wider models."""

MAX_SPECIAL_SHARE = 0.5
"""Inside running text a trained model hardly ever expects a special token, and an untrained one about as often as they
are in its vocabulary, a few in a hundred."""

MAX_CHANGED_SHARE = 1 / 16
"""Of decided positions. A router or index at a tie may fall the other way in a step of another shape, and take a
position with it; a cache that is handed on wrongly changes most."""

MARGIN_NATS = {torch.float32: SAME_NATS}
WIDE_MARGIN_NATS = 1.0
"""A position is decided if its best token leads by more than arithmetic can move it. In float32 that is noise; in
bfloat16, half a unit in the last place (2^-9) of logits up to 32, in a random walk over two roundings for each of 61
layers and both directions: 2^-4 * sqrt(122) = 0.7."""


@dataclass(frozen=True)
class ModelFacts:
    """The model's facts that the checks need.

    special_ids: tokens that answers do not show, EOS among them.
    golden: whether the expected text was in the answer, which ended by itself; None where no answer is known.
    """

    num_vocab: int
    special_ids: Collection[int]
    dtype: torch.dtype
    golden: bool | None


REMEDIES = {
    "S01-answers": "the engine's own error is in the log; run the same request with --device cpu",
    "S01-repeatable": "a kernel reads memory that it did not write, or a cache outlives its request; compare two runs",
    "S01-decode": "reading a token alone and within a prompt must agree: look at the caches and at one-token kernels",
    "S01-chunked": "a prompt read in two steps must be what it is in one: look at what the caches hand on",
    "S01-golden": "the weights or scales are not this model's: run ownpath inspect, then compare with --device cpu",
    "S02-special": "no text would be shown: look at the prompt format, the head and the runner of the last layers",
    "S02-repeat": "one token drowns all others: look at the head, and at scales applied twice or not at all",
    "S02-frozen": "logits do not change from token to token: look at the step's metadata and the kernels' outputs",
    "S02-input": "logits do not depend on the text: look at the embedding and at outputs that nobody writes",
    "S02-context": "only the last token counts: look at attention, its caches and its output projection",
    "S02-certain": "logits are far too large: look for a scale applied twice, or a divisor taken for a multiplier",
    "S02-uniform": "logits are all alike: the head or the last hidden state is zero; look for unwritten outputs",
    "S03-finite": "a scale is missing, zero or inverted, or padding is read: run ownpath inspect on the folder",
}


def judge(evidence: ProbeAnswers, facts: ModelFacts) -> list[Finding]:
    """Runs every check, in the order of their ids."""
    everything = evidence.all()
    num_non_finite = sum(seen.is_non_finite for seen in everything)
    num_unanswered = sum(
        seen.finish_reason in (None, FinishReason.ERROR) and not seen.is_non_finite for seen in everything
    )
    return [
        _at_most("S01-answers", "prompts without an answer", num_unanswered, 0),
        *_consistency(evidence, facts),
        *_signatures(evidence, facts),
        _at_most("S03-finite", "prompts with logits or index scores that are not finite", num_non_finite, 0),
    ]


def all_checks() -> list[Finding]:
    """Returns the checks of ``judge`` without evidence: ids, what is measured, what is allowed and the remedies."""
    nothing = PromptOutput(())
    return judge(ProbeAnswers((), nothing, None, nothing, None, None, None), ModelFacts(1, (), torch.float32, None))


def _consistency(evidence: ProbeAnswers, facts: ModelFacts) -> list[Finding]:
    first = evidence.first
    margin = MARGIN_NATS.get(facts.dtype, WIDE_MARGIN_NATS)
    parted = replayed = chunked = None
    if first.rows and evidence.repeated.rows:
        parted = signatures.diverges_when_decided(first.answer_rows, evidence.repeated.answer_rows, margin)
    whole = _rows(evidence.replayed)
    if first.rows and whole:
        decoded, start = first.rows[len(first.prompt_ids) :], len(first.prompt_ids)
        replayed = signatures.changed_share(whole[start:], decoded, margin)
    if whole and _rows(evidence.chunked):
        chunked = signatures.changed_share(whole, _rows(evidence.chunked), margin)
    wrong = None if facts.golden is None else int(not facts.golden)
    return [
        _at_most("S01-repeatable", "answers to a repeated prompt that differ", parted, 0),
        _at_most("S01-decode", "tokens that change when read within a prompt, share", replayed, MAX_CHANGED_SHARE),
        _at_most("S01-chunked", "tokens that change when a prompt is cut, share", chunked, MAX_CHANGED_SHARE),
        _at_most("S01-golden", "known questions answered wrongly", wrong, 0),
    ]


def _signatures(evidence: ProbeAnswers, facts: ModelFacts) -> list[Finding]:
    texts = [seen.prompt_rows for seen in (evidence.first, evidence.other) if seen is not None and seen.answer_ids]
    rows = [row for text in texts for row in text]
    pair = texts if len(texts) == 2 else None
    special = signatures.special_share(rows, facts.special_ids) if rows else None
    repeat = max(map(signatures.longest_repeat, texts)) if texts else None
    frozen = max(map(signatures.longest_frozen, texts)) if texts else None
    between = signatures.largest_distance(pair[0][:-1], pair[1][:-1]) if pair else None
    behind = signatures.distance(pair[0][-1], pair[1][-1]) if pair else None
    entropy = signatures.median_entropy(rows, facts.num_vocab) if rows else None
    preference = signatures.largest_preference(rows, facts.num_vocab) if rows else None
    return [
        _at_most("S02-special", "positions that expect a special token, share", special, MAX_SPECIAL_SHARE),
        _at_most("S02-repeat", "positions in a row that expect the same token", repeat, MAX_REPEATS),
        _at_most("S02-frozen", "positions in a row with equal logits", frozen, MAX_FROZEN),
        _above("S02-input", "what another text changes, nats", between, SAME_NATS),
        _above("S02-context", "what another text before the same token changes, nats", behind, SAME_NATS),
        _above("S02-certain", "median entropy, nats", entropy, MIN_NATS),
        _above("S02-uniform", "largest preference over chance, nats", preference, MIN_NATS),
    ]


def _rows(seen: PromptOutput | None) -> tuple[signatures.Distribution, ...]:
    return () if seen is None else seen.rows


def _at_most(name: str, what: str, number: float | None, limit: float) -> Finding:
    return _check(name, what, number, number is not None and number <= limit, f"at most {limit:g}")


def _above(name: str, what: str, number: float | None, limit: float) -> Finding:
    return _check(name, what, number, number is not None and number > limit, f"above {limit:g}")


def _check(name: str, what: str, number: float | None, holds: bool, allowed: str) -> Finding:
    verdict = Verdict.SKIPPED if number is None else Verdict.PASS if holds else Verdict.FAIL
    return Finding(name, "", verdict, what, number, allowed, REMEDIES[name])
