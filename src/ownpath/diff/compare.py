"""Compares two sets of log-probs of the same tokens: the distance, and the first divergence. Pure.

Shapes: P = positions scored, V = vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ownpath.diff.responses import ScoredPosition, SequenceReading

TOLERANCE_NATS = 0.25
"""Four roundings of a BF16 logit: between 16 and 32 its steps are 1/8 apart, so one rounding is at most 1/16."""

_FLOOR = 2.0**-20
"""Least probability outside a list. A smaller one is the rounding of float32 sums, up to 8 steps, and counts as
this."""


@dataclass(frozen=True)
class PositionComparison:
    """One token as both sides scored it.

    idx: its index in the sequence.
    gap: by how much our likeliest token beats theirs, in our log-probs; None without a whole list.
    kl: lower bound of the divergence of theirs from ours; None without a list. outside: the probability outside their
    list.
    """

    idx: int
    token_id: int
    ours: float
    theirs: float | None
    gap: float | None = None
    kl: float | None = None
    outside: float | None = None

    def diverges(self, tolerance: float) -> bool:
        """True if log-probs within ``tolerance`` of ours cannot look like this. A value that is not finite diverges."""
        is_near = self.theirs is not None and abs(self.ours - self.theirs) <= tolerance
        # Each of two tokens may have moved by the tolerance before their order is reversed.
        return not is_near or (self.gap is not None and self.gap > 2 * tolerance)


@dataclass(frozen=True)
class PromptComparison:
    """The comparison of one sequence. prompt_idx: the prompt that it belongs to."""

    prompt_idx: int
    positions: tuple[PositionComparison, ...]

    def first_divergence(self, tolerance: float) -> PositionComparison | None:
        return next((position for position in self.positions if position.diverges(tolerance)), None)


def compare(prompt_idx: int, reading: SequenceReading, logprobs_PV: torch.Tensor) -> PromptComparison:
    """Compares one sequence. Shapes: logprobs_PV [P, V], ours, row n for ``reading.scored[n]``."""
    assert len(logprobs_PV) == len(reading.scored)
    rows = zip(reading.scored, reading.scored_ids, logprobs_PV, strict=True)
    return PromptComparison(
        prompt_idx,
        tuple(_position(reading.start + n, token_id, scored, row) for n, (scored, token_id, row) in enumerate(rows)),
    )


def _position(idx: int, token_id: int, scored: ScoredPosition, row_V: torch.Tensor) -> PositionComparison:
    ours = float(row_V[token_id])
    if not scored.top:
        return PositionComparison(idx, token_id, ours, scored.logprob)
    best_id = max(scored.top, key=lambda i: scored.top[i])
    # An unnamed entry may be the likeliest, or several tokens that the server itself writes as one.
    gap = float(row_V.max() - row_V[best_id]) if scored.is_whole else None
    kl, outside = kl_at_least(row_V, list(scored.top), list(scored.top.values()))
    return PositionComparison(idx, token_id, ours, scored.logprob, gap, kl, outside)


def kl_at_least(ours_V: torch.Tensor, ids: Sequence[int], theirs: Sequence[float]) -> tuple[float, float]:
    """Bounds KL(ours || theirs) in nats from below, and returns theirs' probability outside the list with it.

    All tokens outside the list count as one outcome. Merging outcomes never adds divergence, so this is a lower bound.
    """
    p_log = ours_V[list(ids)].double()
    q_log = torch.tensor(list(theirs), dtype=torch.float64)
    p_outside, q_outside = (max(1.0 - float(log.exp().sum()), _FLOOR) for log in (p_log, q_log))
    listed = float((p_log.exp() * (p_log - q_log)).sum())
    rest = p_outside * (math.log(p_outside) - math.log(q_outside))
    return max(listed + rest, 0.0), max(1.0 - float(q_log.exp().sum()), 0.0)


@dataclass(frozen=True)
class AnswerDivergence:
    """The place where two answers to one request differ. far: in nats; infinite where a token is not listed."""

    idx: int
    far: float


def answer_divergence(first: SequenceReading, second: SequenceReading) -> AnswerDivergence | None:
    """Returns the largest difference between two answers, up to the token in which they differ; None for no common
    token.

    A token that the other answer does not have counts by how far the first answer preferred its own to it, halved:
    each of the two log-probs may have moved.
    """
    worst: AnswerDivergence | None = None
    for n, (a, b) in enumerate(zip(first.all_rows, second.all_rows, strict=False)):
        is_same = a.token_id == b.token_id
        far = _logprob_gap(a, b) if is_same else _preference(a, b)
        if worst is None or far > worst.far:
            worst = AnswerDivergence(first.start + n, far)
        if not is_same:
            return worst
    if len(first.all_rows) != len(second.all_rows):
        return AnswerDivergence(first.start + min(len(first.all_rows), len(second.all_rows)), math.inf)
    return worst


def _logprob_gap(a: ScoredPosition, b: ScoredPosition) -> float:
    if a.logprob is None or b.logprob is None:
        return 0.0 if a.logprob is b.logprob else math.inf
    apart = [abs(a.logprob - b.logprob), *(abs(a.top[i] - b.top[i]) for i in a.top.keys() & b.top.keys())]
    # max() would lose a NaN that is not in front.
    return math.inf if any(map(math.isnan, apart)) else max(apart)


def _preference(a: ScoredPosition, b: ScoredPosition) -> float:
    if a.logprob is None or b.token_id is None or b.token_id not in a.top:
        return math.inf
    preference = (a.logprob - a.top[b.token_id]) / 2
    return math.inf if math.isnan(preference) else preference
