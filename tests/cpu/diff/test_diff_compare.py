"""The arithmetic of the comparison, on distributions whose divergence is known."""

import itertools
import math

import pytest
import torch

from ownpath.diff.compare import PositionComparison, answer_distance, compare, distances_of, kl_at_least
from ownpath.diff.responses import ScoredPosition, SequenceReading

P = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
Q = torch.tensor([0.25, 0.25, 0.25, 0.25]).log()
# 64-bit sums of numbers that float32 rounded.
EPS = 16 * 2**-23


def test_kl_of_a_whole_list_is_the_divergence() -> None:
    """1/2 ln 2 - 2 * 1/8 ln 2 = 1/4 ln 2; nothing lies outside."""
    kl, outside = kl_at_least(P, [0, 1, 2, 3], Q.tolist())
    assert kl == pytest.approx(math.log(2) / 4, abs=EPS)
    assert outside == pytest.approx(0, abs=EPS)


def test_kl_of_a_short_list_is_a_lower_bound_that_says_what_it_leaves_out() -> None:
    """Listed: 1/2 ln 2. The rest as one: 1/2 ln(1/2 / 3/4)."""
    kl, outside = kl_at_least(P, [0], Q[:1].tolist())
    assert kl == pytest.approx((math.log(2) + math.log(2 / 3)) / 2, abs=EPS)
    assert kl < math.log(2) / 4
    assert outside == pytest.approx(0.75, abs=EPS)


@pytest.mark.parametrize("seed", range(5))
def test_kl_grows_with_the_list_and_ends_at_the_divergence(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # float64: rounded to float32, probabilities add up to 1 only within 2^-23, and a rest of 2^-10 is off by 2^-13.
    p, q = (torch.randn(50, generator=generator, dtype=torch.float64).mul(3).log_softmax(-1) for _ in range(2))
    order = q.argsort(descending=True).tolist()
    bounds = [kl_at_least(p, order[:k], q[order[:k]].tolist())[0] for k in range(1, 51)]
    whole = float((p.exp() * (p - q)).sum())
    assert bounds[-1] == pytest.approx(whole, abs=50 * 2**-20)
    assert max(bounds) <= whole + 50 * 2**-20
    # Where less is left out than counts, the bound is still one, but need not grow.
    num_clear = int((q[order].exp().cumsum(-1) < 1 - 2**-10).sum())
    for shorter, longer in itertools.pairwise(bounds[:num_clear]):
        assert shorter <= longer + 50 * 2**-20


def test_a_position_diverges_by_its_own_logprob_or_by_the_likeliest() -> None:
    near, tie, far = (
        PositionComparison(0, 0, -1.0, -1.0 - d, gap) for d, gap in ((0.25, 0.5), (0.0, 0.5), (0.26, 0.0))
    )
    assert not near.diverges(0.25)
    assert not tie.diverges(0.25)
    assert far.diverges(0.25)
    assert PositionComparison(0, 0, -1.0, -1.0, 0.51).diverges(0.25)
    assert PositionComparison(0, 0, -1.0, math.nan).diverges(0.25)
    assert PositionComparison(0, 0, -1.0, None).diverges(0.25)


def test_compare_takes_each_row_for_its_own_token() -> None:
    rows = torch.stack([P, Q])
    scored = (ScoredPosition(2, -3.0, {}), ScoredPosition(1, math.log(0.25), {1: math.log(0.25), 3: -5.0}))
    result = compare(7, SequenceReading((0, 2, 1), 1, scored), rows)
    assert result.prompt_idx == 7
    first, second = result.positions
    assert (first.idx, first.token_id, first.theirs, first.gap, first.kl) == (1, 2, -3.0, None, None)
    assert first.ours == pytest.approx(math.log(0.125), abs=EPS)
    assert (second.idx, second.gap) == (2, 0)


def reading(*rows: tuple[int, float, dict[int, float]]) -> SequenceReading:
    scored = tuple(ScoredPosition(token_id, logprob, top) for token_id, logprob, top in rows)
    return SequenceReading((9, *(row[0] for row in rows)), 1, scored)


def apart(first: SequenceReading, second: SequenceReading) -> tuple[list[float], float | None]:
    it = answer_distance(first, second)
    return list(it.same), it.parting


def test_answers_are_apart_by_their_own_tokens_alone() -> None:
    a = reading((1, -1.0, {1: -1.0, 2: -1.5}), (2, -2.0, {2: -2.0, 3: -2.25}), (4, -3.0, {}))
    assert apart(a, a) == ([0, 0, 0], None)
    moved = reading((1, -1.0, {1: -1.0, 2: -9.0}), (2, -2.5, {2: -2.5, 3: -2.25}), (4, -3.0, {}))
    assert apart(a, moved) == ([0, 0.5, 0], None), "the rest of a list says nothing"
    turned = reading((1, -1.0, {1: -1.0}), (3, -2.2, {}), (1, -9.0, {}))
    assert apart(a, turned) == ([0], 0.125), "half of what they were apart; what follows has another context"
    alone = reading((1, math.log(0.8), {1: math.log(0.8)}))
    assert apart(alone, reading((3, -1.0, {})))[1] == pytest.approx(math.log(4) / 2), "outside is 0.2"
    many = reading((1, -1.5, {n: -1.5 - n for n in range(5)}))
    assert apart(many, reading((8, -1.0, {}))) == ([], math.inf), "rounding makes no such token the likeliest"
    lost = apart(a, reading((1, math.nan, {}), (2, -2.0, {}), (4, -3.0, {})))
    assert lost[0][0] == math.inf
    assert answer_distance(reading(), reading()).nats is None


def test_a_few_tokens_that_moved_are_no_distance_and_a_parting_is_one() -> None:
    a = reading(*((1, -1.0, {1: -1.0, 2: -1.5}) for _ in range(5)))
    moved = reading(*((1, -1.0 + far, {}) for far in (0, 0, 4.0, -4.0, 0)))
    assert answer_distance(a, moved).nats == 0
    assert answer_distance(a, reading(*((1, -1.5, {}) for _ in range(5)))).nats == 0.5
    assert answer_distance(a, reading(*a_row_each(1, 1, 1, 2))).nats == 0.25


def a_row_each(*token_ids: int) -> list[tuple[int, float, dict[int, float]]]:
    return [(token_id, -1.0, {}) for token_id in token_ids]


def test_an_answer_that_ends_earlier_is_as_far_as_the_other_wished_to_go_on() -> None:
    even, sure = (reading((1, -1.0, {}), (2, math.log(p), {})) for p in (0.5, 0.75))
    short = reading((1, -1.0, {}))
    assert apart(even, short)[1] == pytest.approx(0, abs=EPS)
    assert apart(short, sure)[1] == pytest.approx(math.log(3) / 2, abs=EPS)
    assert apart(short, reading((1, -1.0, {}), (2, 0.0, {}))) == ([0], math.inf)


def test_a_distribution_leaves_out_what_is_not_finite() -> None:
    rows = [(-1.0, 0.5), (-1.25, 0.125), (-3.0, 4.0), (math.nan, math.nan), (None, None)]
    positions = [PositionComparison(n, 0, -1.0, theirs, 0.0, kl) for n, (theirs, kl) in enumerate(rows)]
    it = distances_of(positions, 0.25)
    assert (it.num_compared, it.mean_delta, it.median_delta, it.max_delta) == (3, 0.75, 0.25, 2.0)
    assert it.share_far == pytest.approx(1 / 3)
    assert (it.median_kl, it.max_kl) == (0.5, 4.0)
    assert distances_of([], 0.25).mean_delta is None
