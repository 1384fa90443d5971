"""Two sets of log-probs of the same tokens: how far apart, and where first. Pure.

Shapes: P = positions scored, V = vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ownpath.diff.readings import Reading, Scored

TOLERANCE_NATS = 0.25
"""Four roundings of a BF16 logit: between 16 and 32 its steps are 1/8 apart, so one rounding is at most 1/16."""

_FLOOR = 2.0**-20
"""Less probability than this outside a list is the rounding of its float32 sums, up to 8 steps; it counts as this."""


@dataclass(frozen=True)
class Position:
    """One token by both.

    idx: in the sequence.
    gap: by how much our likeliest token beats theirs, in our log-probs; None without a whole list.
    kl: of theirs from ours, at least; None without a list. outside: the probability that their list leaves out.
    """

    idx: int
    token_id: int
    ours: float
    theirs: float | None
    gap: float | None = None
    kl: float | None = None
    outside: float | None = None

    def diverges(self, tolerance: float) -> bool:
        """Whether log-probs within ``tolerance`` of ours cannot look like this. What is not finite diverges."""
        is_near = self.theirs is not None and abs(self.ours - self.theirs) <= tolerance
        # Each of two tokens may have moved by the tolerance before their order turns round.
        return not is_near or (self.gap is not None and self.gap > 2 * tolerance)


@dataclass(frozen=True)
class PromptComparison:
    """One sequence. prompt_idx: which prompt it came of."""

    prompt_idx: int
    positions: tuple[Position, ...]

    def first_divergence(self, tolerance: float) -> Position | None:
        return next((position for position in self.positions if position.diverges(tolerance)), None)


def compare(prompt_idx: int, reading: Reading, logprobs_PV: torch.Tensor) -> PromptComparison:
    """Shapes: logprobs_PV [P, V], ours, row n for ``reading.scored[n]``."""
    assert len(logprobs_PV) == len(reading.scored)
    rows = zip(reading.scored, reading.scored_ids, logprobs_PV, strict=True)
    return PromptComparison(
        prompt_idx,
        tuple(_position(reading.start + n, token_id, scored, row) for n, (scored, token_id, row) in enumerate(rows)),
    )


def _position(idx: int, token_id: int, scored: Scored, row_V: torch.Tensor) -> Position:
    ours = float(row_V[token_id])
    if not scored.top:
        return Position(idx, token_id, ours, scored.logprob)
    best_id = max(scored.top, key=lambda i: scored.top[i])
    # A nameless entry may be the likeliest, or several tokens that the server itself writes as one.
    gap = float(row_V.max() - row_V[best_id]) if scored.is_whole else None
    kl, outside = kl_at_least(row_V, list(scored.top), list(scored.top.values()))
    return Position(idx, token_id, ours, scored.logprob, gap, kl, outside)


def kl_at_least(ours_V: torch.Tensor, ids: Sequence[int], theirs: Sequence[float]) -> tuple[float, float]:
    """KL(ours || theirs) in nats with all tokens outside the list taken as one, and theirs' probability outside.

    Taking outcomes together never adds divergence, so this is a lower bound of the whole one.
    """
    p_log = ours_V[list(ids)].double()
    q_log = torch.tensor(list(theirs), dtype=torch.float64)
    p_outside, q_outside = (max(1.0 - float(log.exp().sum()), _FLOOR) for log in (p_log, q_log))
    listed = float((p_log.exp() * (p_log - q_log)).sum())
    rest = p_outside * (math.log(p_outside) - math.log(q_outside))
    return max(listed + rest, 0.0), max(1.0 - float(q_log.exp().sum()), 0.0)


@dataclass(frozen=True)
class Parting:
    """Where two answers of one server to one request part. far: in nats; infinite where a token is not listed."""

    idx: int
    far: float


def part(first: Reading, second: Reading) -> Parting | None:
    """The largest difference between two answers, up to the token in which they differ; None for no common token.

    A token that the other answer does not have counts by how far the first answer preferred its own to it, halved:
    each of the two log-probs may have moved.
    """
    worst: Parting | None = None
    for n, (a, b) in enumerate(zip(first.all_rows, second.all_rows, strict=False)):
        is_same = a.token_id == b.token_id
        far = _apart(a, b) if is_same else _preference(a, b)
        if worst is None or far > worst.far:
            worst = Parting(first.start + n, far)
        if not is_same:
            return worst
    if len(first.all_rows) != len(second.all_rows):
        return Parting(first.start + min(len(first.all_rows), len(second.all_rows)), math.inf)
    return worst


def _apart(a: Scored, b: Scored) -> float:
    if a.logprob is None or b.logprob is None:
        return 0.0 if a.logprob is b.logprob else math.inf
    apart = [abs(a.logprob - b.logprob), *(abs(a.top[i] - b.top[i]) for i in a.top.keys() & b.top.keys())]
    # max() would lose a NaN that is not in front.
    return math.inf if any(map(math.isnan, apart)) else max(apart)


def _preference(a: Scored, b: Scored) -> float:
    if a.logprob is None or b.token_id is None or b.token_id not in a.top:
        return math.inf
    preference = (a.logprob - a.top[b.token_id]) / 2
    return math.inf if math.isnan(preference) else preference
