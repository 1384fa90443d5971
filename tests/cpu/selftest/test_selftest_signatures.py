"""The signatures' numbers, worked out by hand."""

import math

import pytest

from ownpath.selftest import signatures


def row(*pairs: tuple[int, float]) -> signatures.Distribution:
    return tuple((token_id, math.log(share)) for token_id, share in pairs)


A, B, C = row((1, 0.5), (2, 0.25)), row((1, 0.4), (2, 0.3)), row((3, 0.75), (1, 0.125))


def test_runs_count_positions() -> None:
    assert signatures.longest_repeat([]) == 0
    assert signatures.longest_repeat([A]) == 1
    assert signatures.longest_repeat([C, A, B, A, C, C]) == 3
    assert signatures.longest_frozen([C, A, A, A, B, A]) == 3
    assert signatures.longest_frozen([A, B, A, B]) == 1


def test_the_distance_is_that_of_the_tokens_both_list() -> None:
    assert signatures.distance(A, A) == 0
    assert signatures.distance(A, B) == pytest.approx(math.log(0.5 / 0.4))
    assert signatures.distance(A, C) == pytest.approx(math.log(0.5 / 0.125))
    assert signatures.distance(A, row((7, 0.5), (8, 0.5))) == math.inf
    assert signatures.distance(row((1, 0.5), (2, 0.2), (3, 0.1)), row((1, 0.5))) == math.inf, "a third is not half"
    assert signatures.largest_distance([A, A], [A, B]) == pytest.approx(math.log(0.5 / 0.4))


def test_the_share_of_special_tokens() -> None:
    assert signatures.special_share([A, B, C, C], {1}) == 0.5


@pytest.mark.parametrize("num_vocab", [2, 100])
def test_entropy_between_certain_and_uniform(num_vocab: int) -> None:
    certain, uniform = row((0, 1.0)), row((0, 1 / num_vocab))
    assert signatures.median_entropy([certain], num_vocab) == 0
    assert signatures.median_entropy([uniform], num_vocab) == pytest.approx(math.log(num_vocab))
    assert signatures.median_entropy([certain, certain, uniform], num_vocab) == 0
    assert signatures.largest_preference([uniform], num_vocab) == pytest.approx(0, abs=1e-12)
    assert signatures.largest_preference([uniform, certain], num_vocab) == pytest.approx(math.log(num_vocab))


def test_the_entropy_bound_is_reached_by_the_flattest_rest() -> None:
    """Half on one token, half spread over ten others."""
    expected = -0.5 * math.log(0.5) - 10 * 0.05 * math.log(0.05)
    assert signatures.median_entropy([A], 11) == pytest.approx(expected)


def test_only_decided_positions_count_as_changed() -> None:
    close = row((1, 0.4), (2, 0.3999))
    assert signatures.changed_share([A, B, close], [A, C, C], 1e-3) == 0.5
    assert signatures.changed_share([close], [C], 1e-3) == 0
    assert signatures.lead(row((1, 1.0))) == math.inf


def test_answers_part_once() -> None:
    close = row((1, 0.4), (2, 0.3999))
    assert signatures.diverges_when_decided([A, B, A], [A, B, A], 1e-3) == 0
    assert signatures.diverges_when_decided([A, B], [A, C], 1e-3) == 1
    assert signatures.diverges_when_decided([close, A], [C, C], 1e-3) == 0, "after a tie they go different ways"
