"""The index of tails: what it finds, which goes first, and books that balance."""

import random

from cpu.cache.test_prefix_index import kept, nobody_reads, words
from hypothesis import given, settings
from hypothesis import strategies as st

from ownpath.cache.prefix import PrefixIndex, bytes_of
from ownpath.cache.tails import Tail, TailIndex

ROOT = b"root"


def behind(
    index: TailIndex, parent: bytes, ids: list[int], lookahead: int = 0, *, is_first: bool = True
) -> Tail | None:
    """Adds a tail of all these tokens but the last ones, which decide what is in it."""
    return index.place(parent, bytes_of(ids), len(ids) - lookahead, is_first=is_first)


def find(index: TailIndex, parent: bytes, ids: list[int], most: int = 999) -> int:
    """Returns the tokens of the tail that is found."""
    found = index.find(parent, lambda: bytes_of(ids), most)
    return 0 if found is None else found.num_tokens


def test_the_longest_tail_that_a_prompt_goes_on_with() -> None:
    index = TailIndex(4)
    for length in (3, 5, 9):
        behind(index, ROOT, [*range(length)])
    assert [find(index, ROOT, [*range(count)]) for count in (2, 3, 4, 5, 8, 9, 20)] == [0, 3, 3, 5, 5, 9, 9]
    assert [find(index, ROOT, [*range(20)], most) for most in (2, 3, 8, 9)] == [0, 3, 5, 9]
    assert find(index, ROOT, [0, 1, 2, 9, 4]) == 3
    assert find(index, b"other", [*range(9)]) == 0


def test_a_tail_is_found_whole_or_not_at_all() -> None:
    """Ids are compared, not bytes of a part of one."""
    index = TailIndex(1)
    behind(index, ROOT, [1, 2, 256])
    assert find(index, ROOT, [1, 2, 255]) == find(index, ROOT, [1, 2]) == find(index, ROOT, [1, 2, 512]) == 0


def test_what_decides_a_draft_is_part_of_the_name() -> None:
    index = TailIndex(2)
    behind(index, ROOT, [1, 2, 3, 9], lookahead=1)
    assert find(index, ROOT, [1, 2, 3, 9]) == 3
    assert find(index, ROOT, [1, 2, 3, 8]) == find(index, ROOT, [1, 2, 3]) == 0


def test_nobody_reads_ids_where_there_is_no_tail() -> None:
    index = TailIndex(2)
    behind(index, ROOT, [1])
    assert index.find(b"other", lambda: 1 // 0, 9) is None  # type: ignore[arg-type, return-value]


def test_a_block_that_goes_takes_its_tails() -> None:
    index = PrefixIndex(2, 4)
    kept(index, "ab", [1, 2], 1)
    first, second = words("ab")
    for parent, ids in ((first, [1]), (second, [1]), (second, [2])):
        behind(index.tails, parent, ids, is_first=False)
    behind(index.tails, ROOT, [1])
    assert index.faults() == []
    assert index.evict(1, nobody_reads) == [2], "a tail keeps no block"
    assert (len(index.tails), index.faults()) == (2, [])
    assert index.evict(1, nobody_reads) == [1]
    assert (len(index.tails), index.faults()) == (1, [])
    index.clear()
    assert (len(index.tails), index.faults()) == (0, [])


def test_a_tail_that_is_used_keeps_its_blocks_longer() -> None:
    """As if its chain's snapshot, or its loose block, had been used."""
    index = PrefixIndex(4, 4)
    kept(index, "a", [1])
    kept(index, "b", [2])
    kept(index, "c", [3], 1)
    kept(index, "d", [4], 1)
    tails = {text: behind(index.tails, words(text)[0], [5], is_first=False) for text in "ac"}
    for tail in tails.values():
        assert tail is not None
        index.use_tail(tail)
    assert index.evict(4, nobody_reads) == [2, 1, 4, 3]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32))
def test_the_books_balance_whatever_happens(seed: int) -> None:
    """Compared with a list of tails in the order of their use."""
    chance, index, order = random.Random(seed), TailIndex(3), list[tuple[bytes, tuple[int, ...]]]()
    for _ in range(80):
        parent, ids = chance.choice([b"a", b"b"]), tuple(chance.choice([1, 2]) for _ in range(chance.randint(1, 4)))
        action = chance.random()
        if action < 0.5:
            is_new = (parent, ids) not in order
            assert (behind(index, parent, [*ids]) is not None) == is_new
            order = [*order[is_new and len(order) == 3 :], (parent, ids)] if is_new else order
        elif action < 0.9:
            most = chance.randint(1, 4)
            fit = [own for of, own in order if of == parent and ids[: len(own)] == own and len(own) <= most]
            found = index.find(parent, lambda ids=ids: bytes_of(ids), most)  # type: ignore[misc]
            assert (found is None) == (not fit)
            if found is not None:
                one = max(fit, key=len)
                assert found.ids == bytes_of(one)
                index.use(found)
                order.remove((parent, one))
                order.append((parent, one))
        else:
            index.drop_behind(parent)
            order = [pair for pair in order if pair[0] != parent]
        assert [*index.faults(())] == []
        assert [(tail.parent, tail.ids) for tail in index._tails.values()] == [(of, bytes_of(own)) for of, own in order]
