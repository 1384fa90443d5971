"""Slots and blocks: held or free, whatever comes and goes, and books that say when they are not."""

import random
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ownpath.cache.layout import BLOCK_TOKENS
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


def _written_while_shared(slots: Slots) -> None:
    slots.keep(slots.take(1).blocks)


def _twice_in_a_table(slots: Slots) -> None:
    slots.take(2)
    slots.owned[3] = (6, 5, 6)


@pytest.mark.parametrize(
    ("change", "faults"),
    [
        (
            _shared_block,
            [
                "block 3 is missing",
                "block 4 is missing",
                *(f"block {number} has {found} holders, and 1" for number, found in ((1, 2), (2, 2), (3, 0), (4, 0))),
            ],
        ),
        (_too_long, ["slot 1 holds 513 tokens in 2 blocks"]),
        (
            _lost_slot,
            [
                "slot 2 is missing",
                "block 3 is missing",
                "block 4 is missing",
                "block 3 has 0 holders",
                "block 4 has 0 holders",
            ],
        ),
        (
            _nobodys_block,
            ["block 3 is missing", "block 0 does not exist", "block 0 has 1 holders", "block 3 has 0 holders"],
        ),
        (_written_while_shared, ["slot 3 writes to block 5, which has 2 holders"]),
        (_twice_in_a_table, ["block 6 has 2 holders, and 1 are counted", "slot 3 has a block twice"]),
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


def test_a_sequence_begins_with_blocks_of_another_one() -> None:
    """It holds their tokens, and they stay when the first one ends; nobody else gets them meanwhile."""
    slots = Slots(3, 4)
    first = slots.take(2)
    slots.lengths[first.slot] = 2 * BLOCK_TOKENS
    second = slots.take(1, first.blocks)
    assert second.blocks[:2] == first.blocks
    assert slots.lengths[second.slot] == 2 * BLOCK_TOKENS
    assert (slots.num_free_blocks, slots.num_free_slots) == (1, 1)
    slots.give_back(first.slot)
    assert slots.num_free_blocks == 1
    assert slots.faults() == []
    slots.give_back(second.slot)
    assert (slots.num_free_blocks, slots.num_free_slots) == (4, 3)
    assert slots.faults() == []


def test_kept_blocks_outlive_their_sequence() -> None:
    slots = Slots(1, 2)
    owned = slots.take(1)
    slots.lengths[owned.slot] = BLOCK_TOKENS
    slots.keep(owned.blocks)
    slots.give_back(owned.slot)
    assert (slots.num_free_blocks, slots.num_holders(owned.blocks[0])) == (1, 1)
    with pytest.raises(CacheFull, match="2 blocks are wanted, 1 of 2 are free"):
        slots.take(2)
    again = slots.take(0, owned.blocks)
    slots.drop(owned.blocks)
    assert slots.num_free_blocks == 1
    slots.give_back(again.slot)
    assert slots.num_free_blocks == 2
    for wrong in (slots.drop, slots.keep):
        with pytest.raises(AssertionError):
            wrong(owned.blocks)
    assert slots.faults() == []


def test_a_sequence_that_cannot_grow_keeps_what_it_has() -> None:
    slots = Slots(2, 4)
    owned = slots.take(1)
    slots.grow(owned.slot, 2)
    grown = slots.owned[owned.slot]
    assert (grown[0], len(grown)) == (owned.blocks[0], 3)
    with pytest.raises(CacheFull, match="2 blocks are wanted, 1 of 4 are free"):
        slots.grow(owned.slot, 2)
    assert slots.owned[owned.slot] is grown
    assert slots.faults() == []


NUM_SLOTS, NUM_BLOCKS = 4, 10


class Books(RuleBasedStateMachine):
    """Any order of operations; the books balance after each, and agree with a second account of who holds what."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = Slots(NUM_SLOTS, NUM_BLOCKS)
        self.tables: dict[int, list[int]] = {}
        self.kept: list[int] = []

    @rule(num_blocks=st.integers(0, 4), pick=st.randoms(use_true_random=False))
    def take(self, num_blocks: int, pick: random.Random) -> None:
        full = [b for slot, table in self.tables.items() for b in table[: self.slots.lengths[slot] // BLOCK_TOKENS]]
        shared = pick.sample(sorted({*full, *self.kept}), pick.randint(0, len({*full, *self.kept})))
        try:
            owned = self.slots.take(num_blocks, shared)
        except CacheFull:
            assert len(self.tables) == NUM_SLOTS or num_blocks > self.num_free
            return
        assert len(owned.blocks) == num_blocks + len(shared)
        assert not {*owned.blocks[len(shared) :]} & self.held
        self.tables[owned.slot] = list(owned.blocks)

    @precondition(lambda self: self.tables)
    @rule(num_blocks=st.integers(1, 3), num_tokens=st.integers(0, 700), pick=st.randoms(use_true_random=False))
    def grow(self, num_blocks: int, num_tokens: int, pick: random.Random) -> None:
        slot = pick.choice(sorted(self.tables))
        try:
            self.slots.grow(slot, num_blocks)
        except CacheFull:
            assert num_blocks > self.num_free
        else:
            assert not {*self.slots.owned[slot][len(self.tables[slot]) :]} & self.held
            self.tables[slot] = list(self.slots.owned[slot])
        room = BLOCK_TOKENS * len(self.tables[slot])
        self.slots.lengths[slot] = min(self.slots.lengths[slot] + num_tokens, room)

    @precondition(lambda self: self.tables)
    @rule(pick=st.randoms(use_true_random=False))
    def give_back(self, pick: random.Random) -> None:
        slot = pick.choice(sorted(self.tables))
        self.slots.give_back(slot)
        del self.tables[slot]

    @precondition(lambda self: self.tables)
    @rule(pick=st.randoms(use_true_random=False))
    def keep(self, pick: random.Random) -> None:
        slot = pick.choice(sorted(self.tables))
        full = self.tables[slot][: self.slots.lengths[slot] // BLOCK_TOKENS]
        self.slots.keep(full)
        self.kept += full

    @precondition(lambda self: self.kept)
    @rule(pick=st.randoms(use_true_random=False))
    def drop(self, pick: random.Random) -> None:
        gone = [self.kept.pop(pick.randrange(len(self.kept))) for _ in range(pick.randint(1, len(self.kept)))]
        self.slots.drop(gone)

    @property
    def held(self) -> set[int]:
        return {block for table in self.tables.values() for block in table} | {*self.kept}

    @property
    def num_free(self) -> int:
        return NUM_BLOCKS - len(self.held)

    @invariant()
    def balance(self) -> None:
        slots, numbers = self.slots, range(NUM_BLOCKS + 1)
        counts = Counter(block for table in (*self.tables.values(), self.kept) for block in table)
        assert slots.faults() == []
        assert slots.num_free_blocks == self.num_free
        assert [slots.num_holders(block) for block in numbers] == [counts[block] for block in numbers]
        assert {slot: list(table) for slot, table in slots.owned.items()} == self.tables


BooksTest = Books.TestCase
BooksTest.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
