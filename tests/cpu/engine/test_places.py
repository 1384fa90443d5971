"""Places to wait in: what a client may hold, and that others find some whatever it holds."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ownpath.engine.places import EngineOverloaded, WaitingPlaces
from ownpath.engine.request import Request, SamplingParams


def requests_of(client: str, count: int) -> list[Request]:
    return [Request([1], SamplingParams(1), lambda output: None, client=client) for _ in range(count)]


def fill(places: WaitingPlaces, opened: list[Request], client: str, limit: int = 1000) -> int:
    """Opens one request after another until one is refused; returns how many were taken."""
    for taken in range(limit):
        coming = requests_of(client, 1)
        try:
            places.check(opened, coming)
        except EngineOverloaded:
            return taken
        opened += coming
    return limit


@pytest.mark.parametrize("most_of_one", [*range(10), 64, 255, 256, 257])
@pytest.mark.parametrize("max_num_seqs", [1, 16])
def test_a_client_that_is_alone_has_what_was_asked_for(most_of_one: int, max_num_seqs: int) -> None:
    opened: list[Request] = []
    assert fill(WaitingPlaces(max_num_seqs, most_of_one), opened, "a") == max_num_seqs + most_of_one


def test_the_worked_example() -> None:
    """One client fills what it may; the largest body of another one is taken, and places are left."""
    places = WaitingPlaces(16, 256)
    opened: list[Request] = []
    assert fill(places, opened, "a") == 272
    with pytest.raises(EngineOverloaded, match="272 requests of this client are open"):
        places.check(opened, requests_of("a", 1))
    body = requests_of("b", 64)
    places.check(opened, body)
    opened += body
    assert places.count - (len(opened) - 16) == 22
    places.check(opened, requests_of("c", 8))


@pytest.mark.parametrize("num_greedy", [1, 2, 3, 10, 40])
def test_a_newcomer_finds_a_place_however_many_are_greedy(num_greedy: int) -> None:
    """They take turns in asking, so all hold about the same: three times what is left."""
    places = WaitingPlaces(16, 256)
    opened: list[Request] = []
    while sum(fill(places, opened, f"greedy {idx}", 1) for idx in range(num_greedy)):
        pass
    num_left = places.count + 16 - len(opened)
    assert num_left >= 2
    held = Counter(request.client for request in opened)
    assert max(held.values()) - min(held.values()) <= 16, "equal, apart from those that came first and run"
    assert max(held.values()) <= 3 * num_left + 16
    places.check(opened, requests_of("newcomer", 1))


def test_a_body_is_refused_whole_and_the_reason_is_named() -> None:
    places = WaitingPlaces(2, 3)
    places.check([], requests_of("a", 5))
    with pytest.raises(EngineOverloaded, match="0 requests of this client are open"):
        places.check([], requests_of("a", 6))
    with pytest.raises(EngineOverloaded, match="0 of at most 6 requests are open"):
        places.check([], requests_of("a", 7))


@settings(max_examples=30)
@given(st.integers(1, 6), st.integers(0, 30), st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), max_size=12))
def test_limits_hold_and_who_could_run_at_once_is_never_refused(
    max_num_seqs: int, most_of_one: int, asked: list[tuple[int, int]]
) -> None:
    places = WaitingPlaces(max_num_seqs, most_of_one)
    opened: list[Request] = []
    for client, count in asked:
        coming = requests_of(str(client), count)
        try:
            places.check(opened, coming)
        except EngineOverloaded:
            assert len(opened) + count > max_num_seqs
            continue
        opened += coming
        assert len(opened) <= max_num_seqs + places.count
