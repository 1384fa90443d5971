"""Slots and blocks: owned once or free, whatever comes and goes, and books that say when they are not."""

import random
from collections.abc import Callable

import pytest

from ownpath.cache.slots import CacheFull, Owned, Slots


def test_a_thousand_sequences_come_and_go() -> None:
    """The books balance after each of them; slots and blocks of those that run are distinct and nobody's never."""
    chance, slots, running = random.Random(3), Slots(5, 12), []
    refused = 0
    for _ in range(1000):
        if running and chance.random() < 0.5:
            slots.give_back(running.pop(chance.randrange(len(running))).slot)
        else:
            try:
                running.append(slots.take(chance.randint(1, 6)))
            except CacheFull:
                refused += 1
        assert slots.faults() == []
        owned = [block for one in running for block in one.blocks]
        assert len({*owned}) == len(owned)
        assert len({one.slot for one in running}) == len(running)
        assert 0 not in owned
        assert 0 not in {one.slot for one in running}
    assert 0 < refused < 1000


def test_a_refusal_takes_nothing() -> None:
    slots = Slots(2, 3)
    first = slots.take(2)
    with pytest.raises(CacheFull, match="2 blocks are wanted, 1 of 3 are free"):
        slots.take(2)
    second = slots.take(1)
    with pytest.raises(CacheFull, match="all 2 slots of the caches are taken"):
        slots.take(0)
    slots.give_back(first.slot)
    assert slots.take(2).blocks
    assert second == Owned(2, (3,))
    assert slots.faults() == []


def test_a_new_sequence_holds_no_token() -> None:
    slots = Slots(1, 1)
    first = slots.take(1)
    slots.lengths[first.slot] = 17
    slots.give_back(first.slot)
    assert slots.lengths[slots.take(1).slot] == 0


def test_what_is_given_back_twice_is_refused() -> None:
    slots = Slots(1, 1)
    owned = slots.take(1)
    slots.give_back(owned.slot)
    with pytest.raises(KeyError):
        slots.give_back(owned.slot)
    assert slots.faults() == []


def _shared_block(slots: Slots) -> None:
    slots.owned[2] = slots.owned[1]


def _too_long(slots: Slots) -> None:
    slots.lengths[1] = 513


def _lost_slot(slots: Slots) -> None:
    del slots.owned[2]


def _nobodys_block(slots: Slots) -> None:
    slots.owned[2] = (0, 4)


@pytest.mark.parametrize(
    ("change", "faults"),
    [
        (_shared_block, ["block 3 is missing", "block 4 is missing", "block 1 is there 2", "block 2 is there 2"]),
        (_too_long, ["slot 1 holds 513 tokens in 2 blocks"]),
        (_lost_slot, ["slot 2 is missing", "block 3 is missing", "block 4 is missing"]),
        (_nobodys_block, ["block 3 is missing", "block 0 does not exist"]),
    ],
)
def test_wrong_books_are_seen(change: Callable[[Slots], None], faults: list[str]) -> None:
    slots = Slots(3, 6)
    slots.take(2)
    slots.take(2)
    assert slots.faults() == []
    change(slots)
    found = slots.faults()
    assert len(found) == len(faults)
    assert all(one.startswith(expected) for one, expected in zip(found, faults, strict=True)), found
