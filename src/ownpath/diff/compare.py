"""Compares two sets of log-probs of the same tokens: each position, and their distribution. Pure.

Shapes: P = positions scored, V = vocabulary.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ownpath.diff.responses import ScoredPosition, SequenceReading

TOLERANCE_NATS = 0.25
"""Four roundings of a BF16 logit: between 16 and 32 its steps are 1/8 apart, so one rounding is at most 1/16."""

_MANY_LISTED = 5
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

    @property
    def far(self) -> float | None:
        """|ours - theirs| in nats; None where theirs is missing or not finite."""
        return abs(self.ours - self.theirs) if self.theirs is not None and math.isfinite(self.theirs) else None

    def diverges(self, tolerance: float) -> bool:
        """True if log-probs within ``tolerance`` of ours cannot look like this. A value that is not finite diverges."""
        is_near = self.far is not None and self.far <= tolerance
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
class Distances:
    """Summary of the differences over all positions. Units: nats; None where nothing finite was given.

    num_compared: positions whose two log-probs are finite. share_far: of these, the part beyond the tolerance.
    median_kl: over the positions with a finite list. The mean of KL is no measure: one position at which rounding
    turned a router's choice weighs as much as a fault everywhere.
    """

    num_compared: int
    mean_delta: float | None
    median_delta: float | None
    max_delta: float | None
    share_far: float | None
    mean_kl: float | None
    median_kl: float | None
    max_kl: float | None


def distances_of(positions: Iterable[PositionComparison], tolerance: float) -> Distances:
    """Summarises positions; those without finite log-probs are left out."""
    compared = [p for p in positions if p.far is not None]
    far = [p.far for p in compared if p.far is not None]
    kl = [p.kl for p in compared if p.kl is not None and math.isfinite(p.kl)]
    return Distances(
        len(far),
        statistics.fmean(far) if far else None,
        statistics.median(far) if far else None,
        max(far, default=None),
        sum(it > tolerance for it in far) / len(far) if far else None,
        statistics.fmean(kl) if kl else None,
        statistics.median(kl) if kl else None,
        max(kl, default=None),
    )


@dataclass(frozen=True)
class AnswerDistance:
    """The distance of two answers to one request, in nats. same: of each token that both have, up to the one in which
    they part. parting: of that one; None where they do not part. NaN counts as infinity."""

    same: tuple[float, ...]
    parting: float | None

    @property
    def nats(self) -> float | None:
        """The distance at which they part, or by which half of the tokens moved; a few that moved are rounding's, where
        it turned a router's choice. None without log-probs."""
        known = [statistics.median(self.same)] if self.same else []
        return max(known + ([] if self.parting is None else [self.parting]), default=None)


def answer_distance(first: SequenceReading, second: SequenceReading) -> AnswerDistance:
    """Measures how far apart two answers to one request are.

    Only the tokens that were generated count, never the rest of a list: the log-prob of an unlikely token moves by
    nats when logits are rounded otherwise. A token that the other answer does not have counts by how far the first
    answer preferred its own to it, halved, since each of the two log-probs may have moved, and infinitely where it is
    not among the 5 likeliest: rounding does not make such a token the likeliest. In shorter lists, the probability
    outside bounds the preference. An answer that ends earlier counts by how far the other preferred to go on.
    Positions without log-probs say nothing.
    """
    same: list[float] = []
    for a, b in zip(first.all_rows, second.all_rows, strict=False):
        if a.token_id != b.token_id:
            return AnswerDistance(tuple(same), _preference(a, b))
        far = _apart(a.logprob, b.logprob)
        same += [] if far is None else [far]
    longer = max(first.all_rows, second.all_rows, key=len)
    more = longer[min(len(first.all_rows), len(second.all_rows)) :]
    goes_on = _will_to_go_on(more[0].logprob) if more and more[0].logprob is not None else None
    return AnswerDistance(tuple(same), goes_on)


def _will_to_go_on(logprob: float) -> float:
    """Returns by how much a token is preferred to all others, halved; 0 for one that is not."""
    probability = math.exp(min(logprob, 0.0)) if not math.isnan(logprob) else 1.0
    if probability >= 1.0 - 2.0**-24:
        return math.inf
    return max(math.log(max(probability, 2.0**-60)) - math.log1p(-probability), 0.0) / 2


def _apart(a: float | None, b: float | None) -> float | None:
    if a is None or b is None:
        return None if a is b else math.inf
    return math.inf if math.isnan(a - b) else abs(a - b)


def _preference(a: ScoredPosition, b: ScoredPosition) -> float | None:
    if a.logprob is None:
        return None if b.logprob is None else math.inf
    other = a.top.get(b.token_id) if b.token_id is not None else None
    if other is None:
        outside = 1.0 - sum(map(math.exp, a.top.values()))
        is_known = b.token_id is not None or a.is_whole  # else it may be one of the list that has no name
        is_unlikely = is_known and len(a.top) + a.num_unnamed >= _MANY_LISTED
        other = -math.inf if is_unlikely or not outside > 0 else min(math.log(outside), a.logprob)
    far = _apart(a.logprob, other)
    return None if far is None else far / 2
