"""Signatures of broken models, as numbers computed from next-token distributions; pure functions.

A distribution is what the engine reports of one: its likeliest tokens with their natural log-probabilities, best first.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise
from statistics import median

Distribution = tuple[tuple[int, float], ...]
"""At most 20 (token id, log-probability), best first."""


def longest_repeat(rows: Sequence[Distribution]) -> int:
    """Returns the most consecutive positions with the same likeliest token."""
    return _longest_run(first[0][0] == second[0][0] for first, second in pairwise(rows)) if rows else 0


def longest_frozen(rows: Sequence[Distribution]) -> int:
    """Returns the most consecutive positions whose distributions are the same to the last bit."""
    return _longest_run(first == second for first, second in pairwise(rows)) if rows else 0


def _longest_run(joins: Iterable[bool]) -> int:
    longest = current = 1
    for joined in joins:
        current = current + 1 if joined else 1
        longest = max(longest, current)
    return longest


def distance(first: Distribution, second: Distribution) -> float:
    """Returns the distance of two distributions in nats: the largest difference among the tokens that both list.

    Infinite if they share less than half of their tokens.
    """
    logprobs = dict(second)
    differences = [abs(logprob - logprobs[token_id]) for token_id, logprob in first if token_id in logprobs]
    if not differences or 2 * len(differences) < len(first):
        return math.inf
    return max(differences)


def largest_distance(rows: Sequence[Distribution], others: Sequence[Distribution]) -> float:
    """Returns the largest distance between distributions at the same position."""
    return max(distance(first, second) for first, second in zip(rows, others, strict=True))


def special_share(rows: Sequence[Distribution], special_ids: Collection[int]) -> float:
    """Returns the share of positions whose likeliest token is a special one."""
    return sum(row[0][0] in special_ids for row in rows) / len(rows)


def median_entropy(rows: Sequence[Distribution], num_vocab: int) -> float:
    """Returns the median of the positions' entropies, in nats, each bounded from above by what its best token
    leaves."""
    return median(_entropy_bound(row[0][1], num_vocab) for row in rows)


def _entropy_bound(best_logprob: float, num_vocab: int) -> float:
    """Returns -p ln p plus the entropy of the rest spread evenly: no distribution with this best token has more."""
    rest = -math.expm1(min(best_logprob, 0.0))
    if rest <= 0.0:
        return 0.0
    return -math.exp(best_logprob) * best_logprob + rest * (math.log(max(num_vocab - 1, 1)) - math.log(rest))


def largest_preference(rows: Sequence[Distribution], num_vocab: int) -> float:
    """Returns by how much the best token of any position is likelier than by chance, in nats.

    The entropy is at least -ln(p of the best), so that it is within this of ln V at every position.
    """
    return max(math.log(num_vocab) + row[0][1] for row in rows)


def lead(row: Distribution) -> float:
    """Returns by how much the likeliest token is ahead of the second, in nats; infinite if there is only one."""
    return row[0][1] - row[1][1] if len(row) > 1 else math.inf


def changed_share(rows: Sequence[Distribution], again: Sequence[Distribution], margin_nats: float) -> float:
    """Returns the share of decided positions (best token ahead by more than the margin) with another likeliest
    token."""
    decided = [(row, other) for row, other in zip(rows, again, strict=True) if lead(row) > margin_nats]
    return sum(row[0][0] != other[0][0] for row, other in decided) / max(len(decided), 1)


def diverges_when_decided(rows: Sequence[Distribution], again: Sequence[Distribution], margin_nats: float) -> int:
    """Returns 1 if two greedy answers differ first at a decided position, else 0. What follows cannot be compared."""
    for row, other in zip(rows, again, strict=False):
        if row[0][0] != other[0][0]:
            return int(lead(row) > margin_nats)
    return 0
