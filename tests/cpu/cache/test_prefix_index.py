"""The index of blocks by their tokens: what it finds, what it lets go first, and books that balance."""

import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ownpath.cache.layout import BLOCK_TOKENS
from ownpath.cache.prefix import ChainKey, PrefixChain, PrefixIndex, chain_root


def keys_of(ids: Sequence[int], root: ChainKey = b"root", lookahead: int = 0) -> list[ChainKey]:
    chain = PrefixChain(root, lookahead)
    chain.grow(len(ids), lambda start, stop: list(ids[start:stop]))
    return chain.keys


def words(text: str) -> list[ChainKey]:
    """A chain whose blocks are letters: the same beginning, the same keys."""
    return keys_of([ord(letter) for letter in text for _ in range(BLOCK_TOKENS)])


def kept(index: PrefixIndex, text: str, blocks: Sequence[int], *snapshots: int) -> None:
    """Takes up blocks, with snapshots behind so many of them."""
    index.add(words(text), blocks)
    for count in snapshots:
        assert index.place_snapshot(words(text[:count])[-1]) is not None


def nobody_reads(block: int) -> bool:
    return True


def all_but(*blocks: int) -> Callable[[int], bool]:
    return lambda block: block not in blocks


@pytest.mark.parametrize("num_tokens", [0, 1, 255, 256, 257, 511, 512, 513])
def test_only_full_blocks_have_names(num_tokens: int) -> None:
    assert len(keys_of(range(num_tokens))) == num_tokens // 256


def test_names_stand_for_all_tokens_before() -> None:
    ids = list(range(1024))
    names = keys_of(ids)
    assert len({*names}) == 4
    for changed in (0, 255, 256, 700, 1023):
        other = keys_of([*ids[:changed], 5000, *ids[changed + 1 :]])
        first = changed // 256
        assert other[:first] == names[:first]
        assert not {*other[first:]} & {*names}


def test_a_chain_grows_as_tokens_come() -> None:
    ids = [n * 7 % 1000 for n in range(1500)]
    chain = PrefixChain(b"root")
    for count in (1, 100, 255, 256, 300, 700, 1499, 1500):
        chain.grow(count, lambda start, stop: ids[start:stop])
        assert chain.keys == keys_of(ids[:count])


def test_a_draft_row_depends_on_the_token_behind_its_block() -> None:
    """MTP's row at 255 is computed from token 256: blocks of the same 256 ids differ if the next ones do."""
    assert keys_of(range(256), lookahead=1) == []
    one, other = keys_of([*range(256), 7], lookahead=1), keys_of([*range(256), 8], lookahead=1)
    assert len(one) == len(other) == 1
    assert one != other


def test_roots_keep_models_formats_and_salts_apart() -> None:
    roots = [chain_root(*parts) for parts in (("a", "bc"), ("ab", "c"), ("abc",), ("a", "bc", ""), (), ("",))]
    assert len({*roots}) == len(roots)
    found = [keys_of(range(256), root)[0] for root in roots]
    assert len({*found}) == len(found)


def test_a_hit_ends_in_the_last_snapshot_of_its_chain() -> None:
    index = PrefixIndex(4)
    kept(index, "abcd", [1, 2, 3, 4], 1, 3)
    found = index.find(words("abcd"))
    assert (found.blocks, found.num_known) == ((1, 2, 3), 4)
    assert index.find(words("abxx")).blocks == (1,)
    assert index.find(words("abxx")).num_known == 2
    assert index.find(words("xbcd")) == ((), None, 0)
    assert index.find([]) == ((), None, 0)
    assert index.find(words("abcd")[:2]).blocks == (1,)


def test_blocks_without_any_snapshot_are_no_hit() -> None:
    index = PrefixIndex(4)
    kept(index, "abc", [1, 2, 3])
    assert index.find(words("abc")) == ((), None, 3)


def test_known_names_keep_their_blocks() -> None:
    index = PrefixIndex(4)
    assert index.add(words("ab"), [1, 2]) == [1, 2]
    assert index.add(words("abc"), [7, 8, 9, 10]) == [9]
    index.place_snapshot(words("abc")[-1])
    assert index.find(words("abc")).blocks == (1, 2, 9)
    assert index.faults() == []


def test_what_no_snapshot_depends_on_goes_first_from_its_end() -> None:
    index = PrefixIndex(4)
    kept(index, "abcd", [1, 2, 3, 4], 2)
    kept(index, "xyz", [5, 6, 7])
    assert index.evict(3, nobody_reads) == [4, 3, 7]
    assert index.find(words("abcd")).blocks == (1, 2)
    assert index.evict(2, nobody_reads) == [6, 5]
    assert index.num_evicted_snapshots == 0
    assert index.faults() == []


def test_then_the_snapshot_used_longest_ago() -> None:
    index = PrefixIndex(4)
    for first, text in enumerate(("ab", "cd", "ef")):
        kept(index, text, [2 * first + 1, 2 * first + 2], 2)
    index.use(words("ab"))
    assert index.evict(1, nobody_reads) == [4]
    assert index.evict(2, nobody_reads) == [3, 6]
    assert index.find(words("ab")).blocks == (1, 2)
    assert index.num_evicted_snapshots == 2
    assert index.evict(9, nobody_reads) == [5, 2, 1]
    assert (index.num_blocks, index.num_snapshots) == (0, 0)
    assert index.faults() == []


def test_a_snapshot_in_the_middle_frees_nothing_and_stays() -> None:
    index = PrefixIndex(4)
    kept(index, "abcd", [1, 2, 3, 4], 2, 4)
    assert index.evict(1, nobody_reads) == [4]
    assert index.find(words("abcd")).blocks == (1, 2)


def test_blocks_that_are_read_stay() -> None:
    index = PrefixIndex(4)
    kept(index, "abc", [1, 2, 3], 3)
    kept(index, "abxy", [1, 2, 4, 5])
    assert index.evict(9, all_but(1, 2, 3)) == [5, 4]
    assert index.evict(9, all_but(1, 2, 3)) == []
    assert index.find(words("abc")).blocks == (1, 2, 3)


def test_a_full_store_gives_up_the_oldest_snapshot() -> None:
    index = PrefixIndex(2)
    kept(index, "a", [1], 1)
    kept(index, "b", [2], 1)
    index.use(words("a"))
    kept(index, "c", [3], 1)
    assert [len(index.find(words(text)).blocks) for text in "abc"] == [1, 0, 1]
    assert index.num_snapshots == 2
    assert index.place_snapshot(words("c")[0]) is None, "there is one already"
    assert index.place_snapshot(words("q")[0]) is None, "nobody keeps the block"
    assert index.faults() == []


def test_a_moving_snapshot_goes_unless_somebody_began_with_it() -> None:
    index = PrefixIndex(4)
    kept(index, "ab", [1, 2], 1, 2)
    index.use(words("a"))
    index.forget_snapshot(words("a")[-1])
    index.forget_snapshot(words("ab")[-1])
    assert index.find(words("ab")).blocks == (1,)


def test_what_is_withdrawn_is_found_no_more() -> None:
    index = PrefixIndex(4)
    kept(index, "abc", [1, 2, 3], 1, 3)
    kept(index, "abx", [7, 8, 9], 3)
    assert index.withdraw(words("abc"), [1, 2, 3]) == [3]
    assert index.find(words("abc")) == ((), None, 2)
    assert index.withdraw(words("abx"), [7, 8, 9]) == [9]
    assert index.faults() == []


def test_a_torn_chain_is_made_whole() -> None:
    """The index let go of a running sequence's older blocks, kept by another: what it adds later hangs together."""
    index = PrefixIndex(4)
    kept(index, "ab", [1, 2])
    assert index.evict(2, nobody_reads) == [2, 1]
    assert index.add(words("abc"), [1, 2, 3]) == [1, 2, 3]
    assert index.faults() == []


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_the_books_balance_whatever_happens(seed: int) -> None:
    """A hit is always a chain of blocks that were added under these names, and its snapshot the one of its end."""
    chance, index, saved = random.Random(seed), PrefixIndex(3), {}
    block_of: dict[ChainKey, int] = {}
    fresh = iter(range(1, 10**6))
    for _ in range(60):
        text = "".join(chance.choice("ab") for _ in range(chance.randint(1, 5)))
        keys = words(text)
        action = chance.random()
        if action < 0.4:
            blocks = [block_of.get(key, 0) if chance.random() < 0.8 else 0 for key in keys]
            blocks = [block or next(fresh) for block in blocks]
            added = index.add(keys, blocks)
            block_of |= {key: block for key, block in zip(keys, blocks, strict=True) if block in added}
        elif action < 0.6:
            place = index.place_snapshot(keys[-1])
            if place is not None:
                saved[place] = keys[-1]
        elif action < 0.8:
            found = index.find(keys)
            assert found.blocks == tuple(block_of[key] for key in keys[: len(found.blocks)])
            if found.snapshot is not None:
                assert saved[found.snapshot] == keys[len(found.blocks) - 1]
                index.use(keys[: len(found.blocks)])
        elif action < 0.9:
            read = {block for block in index.blocks() if chance.random() < 0.3}
            dropped = index.evict(chance.randint(1, 4), all_but(*read))
            assert not {*dropped} & read
            assert not {*dropped} & {*index.blocks()}
        else:
            index.forget_snapshot(keys[-1])
        assert index.faults() == []
    assert {*index.clear()} <= {*block_of.values()}
    assert index.faults() == []
