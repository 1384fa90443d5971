"""The protocol of the exchanges, in every order in which its steps can happen; and each mistake in it is found."""

from dataclasses import replace

import pytest
from support.exchange_model import Protocol, Search, Wrong

TWO = Search(2, 4)
EMPTY = Search(2, 4, empty=1)
DEATH = Search(2, 4, dies=1)
LATE = Search(2, 4, late=1)
DEATH_OF_THREE = Search(3, 2, dies=1)


@pytest.mark.parametrize(
    ("search", "at_least"),
    [
        (Search(2, 2 * 8), 2000),  # every parity and every epoch of a whole turn
        (EMPTY, 500),
        (DEATH, 2000),
        (Search(2, 3, dies=0), 1000),
        (LATE, 10000),
        (Search(3, 3), 40000),
        (DEATH_OF_THREE, 50000),
        (replace(TWO, steps=7, in_place=frozenset({0, 2, 5})), 1000),
        (replace(LATE, in_place=frozenset({0, 2})), 10000),
        (Search(3, 2, in_place=frozenset({0})), 1000),
        (Search(2, 2 * 8, tagged=frozenset(range(1, 16))), 2000),
        (replace(TWO, steps=7, tagged=frozenset({0, 2, 3, 6}), in_place=frozenset({1, 4})), 1000),
        (replace(DEATH, tagged=frozenset({0, 1, 3})), 2000),
        (replace(LATE, steps=3, tagged=frozenset({1, 2})), 2000),
        (replace(DEATH_OF_THREE, tagged=frozenset({0, 1})), 10000),
        (replace(TWO, steps=6, tagged=frozenset({0, 3, 4}), copied=frozenset({0, 4}), in_place=frozenset({2})), 500),
        (replace(DEATH, tagged=frozenset({2}), copied=frozenset({2}), in_place=frozenset({0})), 2000),
    ],
    ids=[
        *("two", "no rows", "a death", "the first dies", "late", "three", "a death among three"),
        *("rows in place", "rows in place, late", "rows of three in place"),
        *("tags", "tags and flags in turn", "tags, a death", "tags, late", "tags, a death among three"),
        *("tagged rows copied to their place", "tagged rows copied, a death"),
    ],
)
def test_no_order_of_steps_is_wrong(search: Search, at_least: int) -> None:
    """Nothing is read early or overwritten unread, nothing hangs, sums are in the order of ranks; a rank that dies is
    named by all others, after one wait each. at_least: that the search goes through many states."""
    assert search.run() > at_least


READS = r"reads rank \d's row of exchange"
EARLY = r"reads rank \d's row of exchange (-1 in \d|0 in 2|1 in 3)"
"""Too early: none is there, or the one before in the same buffer. The search meets one or the other first, as sets of
strings are ordered in this process."""
MISTAKES = [
    ("one buffer", Protocol(buffers=1), TWO, READS),
    ("flags before rows", Protocol(releases=False), TWO, EARLY),
    ("rows read before flags", Protocol(acquires=False), TWO, EARLY),
    ("a replay with the old epoch", Protocol(advances=False), TWO, READS),
    ("epochs compared as numbers", Protocol(wraps=False), TWO, READS),
    ("the other parity", Protocol(skew=1), TWO, READS),
    ("sums as flags arrive", Protocol(fixed_order=False), TWO, "adds in the order"),
    ("flags that are set to zero", Protocol(resets=True), TWO, "as lost"),
    ("a push before the reads before it ended", Protocol(drains=False), TWO, READS),
    ("no abort cell", Protocol(polls_abort=False), DEATH, "limit a second time"),
    ("nobody is told", Protocol(tells=False), LATE, "as lost"),
    ("a push after an abort", Protocol(stops=False), replace(LATE, steps=3), READS),
    ("no limit", Protocol(bounded=False), DEATH, "hangs"),
    ("everyone who is missed is named", Protocol(patient=False), DEATH_OF_THREE, "names 11[01]? as lost"),
    ("silence without rows", Protocol(empty_sends=False), EMPTY, "hangs"),
]


@pytest.mark.parametrize(
    ("protocol", "search", "found"), [one[1:] for one in MISTAKES], ids=[one[0] for one in MISTAKES]
)
def test_a_mistake_is_found(protocol: Protocol, search: Search, found: str) -> None:
    with pytest.raises(Wrong, match=found):
        replace(search, protocol=protocol).run()


def test_rows_in_place_twice_running_are_overwritten_unread() -> None:
    """The exchange between is what says that all have read them."""
    with pytest.raises(Wrong, match=READS):
        replace(TWO, in_place=frozenset({1, 2})).run()


def test_a_place_is_no_buffer_for_rows_that_are_copied() -> None:
    """Copied rows and rows pushed to the same place in the next exchange: another rank may push before they are
    read."""
    with pytest.raises(Wrong, match=READS):
        replace(TWO, tagged=frozenset({1}), copied=frozenset({1}), in_place=frozenset({2})).run()


def test_tagged_rows_in_one_buffer_are_overwritten_unread() -> None:
    with pytest.raises(Wrong, match=r"reads rank|hangs"):
        replace(TWO, tagged=frozenset(range(4)), protocol=Protocol(buffers=1)).run()


def test_every_part_of_the_protocol_has_its_mistake() -> None:
    design = vars(Protocol())
    assert {
        name for _, protocol, *_ in MISTAKES for name, value in vars(protocol).items() if value != design[name]
    } == set(design)
