"""Knows which blocks hold which tokens, so that a prompt which begins like an earlier one is not computed again.
Bookkeeping only: no tensor, no model.

A block is named by a chained hash: of the name of the block before it and of its own 256 ids. So a name stands for all
tokens up to the block's end, and for the root of the chain: what else decides the keys (model, formats), and the salt
of those who may share them. Entries and index keys lie in the blocks themselves. Windows and compressors' raw rows do
not, and can be computed only from the first token on: they need a snapshot, which is too large to be taken of every
block. A hit is the longest chain that ends in one, or in a tail (``tails``), which lies behind a block's end.

Example: blocks a-b-c-d hold a prompt of 1,100 tokens; there is a snapshot at d. A prompt that shares its first 600
tokens finds a and b, and no snapshot there: it computes them, and takes one at b, because chains part there. The next
prompt of that kind begins with token 512.

What goes, when blocks are needed: first those that no snapshot depends on, from the end of a chain, the chain that was
used longest ago first; then the snapshot, of those at ends of chains, that was used longest ago, and so on. A block
that a running sequence reads stays. When places for snapshots are needed, the one used longest ago goes. Tails go with
their block, and keep none.
"""

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ownpath.cache.layout import BLOCK_TOKENS
from ownpath.cache.tails import Tail, TailIndex

ChainKey = bytes
"""The name of a block and of all before it."""


def chain_root(*parts: str) -> ChainKey:
    """Returns the name before the first block. Other parts, or the same text split elsewhere, give another name."""
    digest = hashlib.sha256()
    for part in parts:
        text = part.encode("utf-8", "surrogatepass")
        digest.update(len(text).to_bytes(8, "little") + text)
    return digest.digest()


def next_key(parent: ChainKey, token_ids: Sequence[int]) -> ChainKey:
    """Returns the name of the block of these ids behind ``parent``."""
    return hashlib.sha256(parent + bytes_of(token_ids)).digest()


def bytes_of(token_ids: Sequence[int]) -> bytes:
    """Returns tokens as bytes that no others have."""
    return array("i", token_ids).tobytes()


class PrefixChain:
    """The names of one sequence's full blocks, as far as its tokens are known.

    lookahead: tokens behind a block that decide what is in it: one for each loaded MTP module, whose row at position p
    is computed from the token after it.
    """

    def __init__(self, root: ChainKey, lookahead: int = 0) -> None:
        self._root, self._last, self.lookahead = root, root, lookahead
        self.keys: list[ChainKey] = []

    def grow(self, num_tokens: int, read: Callable[[int, int], Sequence[int]]) -> None:
        """Names the blocks that are full by ``num_tokens``. read: returns the ids from one position up to another."""
        first, stop = len(self.keys), max(0, num_tokens - self.lookahead) // BLOCK_TOKENS
        for start in range(first * BLOCK_TOKENS, stop * BLOCK_TOKENS, BLOCK_TOKENS):
            self._last = next_key(self._last, read(start, start + BLOCK_TOKENS + self.lookahead))
            self.keys.append(self._last)

    def before(self, num_blocks: int) -> ChainKey:
        """Returns the name of the first so many blocks, or the root."""
        return self.keys[num_blocks - 1] if num_blocks else self._root


class PrefixHit(NamedTuple):
    """A sequence's beginning, as far as it is known.

    blocks: of the longest chain that ends in a snapshot. snapshot: its place; ``None``: there is none, and no block to
    reuse. num_known: blocks that are known, with or without a snapshot behind them.
    """

    blocks: tuple[int, ...]
    snapshot: int | None
    num_known: int


@dataclass(eq=False)
class _Node:
    """A block that is kept. snapshot: its place. is_shared: another sequence has begun with it."""

    key: ChainKey
    parent: "_Node | None"
    block: int
    num_children: int = 0
    snapshot: int | None = None
    is_shared: bool = False

    @property
    def is_loose(self) -> bool:
        """True if no snapshot depends on it, nor a block that is kept."""
        return self.num_children == 0 and self.snapshot is None


class PrefixIndex:
    """The blocks that are kept for later sequences, the snapshots of ``num_places`` places, and ``num_tails`` tails.

    It holds no block itself: whoever calls it keeps and drops them as it says.
    """

    def __init__(self, num_places: int, num_tails: int = 0) -> None:
        self.num_places, self.num_evicted_snapshots = num_places, 0
        self.tails = TailIndex(num_tails)
        self._free_places = list(range(num_places - 1, -1, -1))
        self._nodes: dict[ChainKey, _Node] = {}
        # Both in the order of their last use, the oldest first.
        self._loose: dict[ChainKey, _Node] = {}
        self._snapshots: dict[int, _Node] = {}

    @property
    def num_blocks(self) -> int:
        """Blocks that are kept."""
        return len(self._nodes)

    @property
    def num_snapshots(self) -> int:
        """Places that are taken."""
        return len(self._snapshots)

    def find(self, keys: Sequence[ChainKey]) -> PrefixHit:
        """Returns what is known of a sequence with these names."""
        path: list[_Node] = []
        for key in keys:
            node = self._nodes.get(key)
            if node is None:
                break
            path.append(node)
        count = next((n for n in range(len(path), 0, -1) if path[n - 1].snapshot is not None), 0)
        return PrefixHit(
            tuple(node.block for node in path[:count]), path[count - 1].snapshot if count else None, len(path)
        )

    def use(self, keys: Sequence[ChainKey]) -> None:
        """Notes that a sequence begins with the blocks of these names, which end in a snapshot."""
        node = self._nodes[keys[-1]]
        assert node.snapshot is not None, "a hit ends in a snapshot"
        node.is_shared = True
        self._snapshots[node.snapshot] = self._snapshots.pop(node.snapshot)

    def use_tail(self, tail: Tail) -> None:
        """Notes that a sequence begins with a tail, and the blocks before it."""
        self.tails.use(tail)
        node = None if tail.is_first else self._nodes[tail.parent]
        if node is not None and node.snapshot is not None:
            self._snapshots[node.snapshot] = self._snapshots.pop(node.snapshot)
        elif node is not None and node.is_loose:
            self._loose[node.key] = self._loose.pop(node.key)

    def knows(self, key: ChainKey) -> bool:
        """Returns True if a block is kept under this name."""
        return key in self._nodes

    def blocks_of(self, keys: Sequence[ChainKey]) -> tuple[int, ...]:
        """Returns the blocks of names that are known."""
        return tuple(self._nodes[key].block for key in keys)

    def add(self, keys: Sequence[ChainKey], blocks: Sequence[int]) -> list[int]:
        """Takes up a sequence's blocks by their names, from the first on. Returns those to keep: of names that were not
        known."""
        known = next((n for n in range(len(keys), 0, -1) if keys[n - 1] in self._nodes), 0)
        parent = self._nodes[keys[known - 1]] if known else None
        for key, block in zip(keys[known:], blocks[known : len(keys)], strict=True):
            parent = self._link(key, parent, block)
        return list(blocks[known : len(keys)])

    def _link(self, key: ChainKey, parent: _Node | None, block: int) -> _Node:
        node = self._nodes[key] = self._loose[key] = _Node(key, parent, block)
        if parent is not None:
            parent.num_children += 1
            self._loose.pop(parent.key, None)
        return node

    def place_snapshot(self, key: ChainKey) -> int | None:
        """Returns a place for a snapshot of the state behind a block. ``None``: there is one, or the block is not kept.

        If no place is free, the snapshot that was used longest ago loses its own.
        """
        node = self._nodes.get(key)
        if node is None or node.snapshot is not None or not self.num_places:
            return None
        if not self._free_places:
            self._evict_snapshot(next(iter(self._snapshots.values())))
        node.snapshot = self._free_places.pop()
        self._snapshots[node.snapshot] = node
        self._loose.pop(key, None)
        return node.snapshot

    def forget_snapshot(self, key: ChainKey) -> None:
        """Gives up the snapshot behind a block, unless another sequence has begun with it."""
        node = self._nodes.get(key)
        if node is not None and node.snapshot is not None and not node.is_shared:
            self._free(node)

    def withdraw(self, keys: Sequence[ChainKey], blocks: Sequence[int]) -> list[int]:
        """Forgets the blocks of a sequence whose numbers are wrong, as far as no other one's depend on them, and all
        their snapshots. Returns the blocks that are kept no longer."""
        dropped: list[int] = []
        for key, block in reversed([*zip(keys, blocks, strict=False)]):
            node = self._nodes.get(key)
            if node is None or node.block != block:
                continue
            if node.snapshot is not None:
                self._free(node)
            if node.is_loose:
                self._unlink(node)
                dropped.append(block)
        return dropped

    def evict(self, count: int, is_idle: Callable[[int], bool]) -> list[int]:
        """Returns up to ``count`` blocks that are kept no longer. is_idle: tells whether nobody else holds a block."""
        dropped: list[int] = []
        while len(dropped) < count:
            node = self._next_loose(is_idle) or self._free_oldest_end(is_idle)
            if node is None:
                break
            # On along its chain, which nobody can find without its end any more than without its beginning.
            while node is not None and len(dropped) < count and node.is_loose and is_idle(node.block):
                self._unlink(node)
                dropped.append(node.block)
                node = node.parent
        return dropped

    def _next_loose(self, is_idle: Callable[[int], bool]) -> _Node | None:
        return next((node for node in self._loose.values() if is_idle(node.block)), None)

    def _free_oldest_end(self, is_idle: Callable[[int], bool]) -> _Node | None:
        """Takes the place of the oldest snapshot that blocks can be freed with."""
        ends = (node for node in self._snapshots.values() if not node.num_children and is_idle(node.block))
        node = next(ends, None)
        if node is not None:
            self._evict_snapshot(node)
        return node

    def _evict_snapshot(self, node: _Node) -> None:
        self._free(node)
        self.num_evicted_snapshots += 1

    def _free(self, node: _Node) -> None:
        assert node.snapshot is not None
        del self._snapshots[node.snapshot]
        self._free_places.append(node.snapshot)
        node.snapshot, node.is_shared = None, False
        if node.is_loose:
            self._loose[node.key] = node

    def _unlink(self, node: _Node) -> None:
        self.tails.drop_behind(node.key)
        del self._nodes[node.key], self._loose[node.key]
        if node.parent is not None:
            node.parent.num_children -= 1
            if node.parent.is_loose:
                self._loose[node.parent.key] = node.parent

    def clear(self) -> list[int]:
        """Forgets everything. Returns the blocks that are kept no longer."""
        dropped = [node.block for node in self._nodes.values()]
        self._nodes, self._loose, self._snapshots = {}, {}, {}
        self._free_places = list(range(self.num_places - 1, -1, -1))
        self.tails.clear()
        return dropped

    def blocks(self) -> Iterator[int]:
        """Yields the blocks that are kept."""
        return (node.block for node in self._nodes.values())

    def faults(self) -> list[str]:
        """Lists inconsistencies, a sentence each: none while every block is kept once, every place is free or one
        snapshot's or tail's, and chains are whole."""
        return [*self._find_broken_chains(), *self._find_wrong_places(), *self.tails.faults(self._nodes)]

    def _find_broken_chains(self) -> Iterator[str]:
        children: dict[_Node | None, int] = {}
        for node in self._nodes.values():
            children[node.parent] = children.get(node.parent, 0) + 1
            if node.parent is not None and self._nodes.get(node.parent.key) is not node.parent:
                yield f"block {node.block} is kept, and the one before it is not"
        for node in self._nodes.values():
            if node.num_children != children.get(node, 0):
                yield f"block {node.block} counts {node.num_children} blocks behind it, not {children.get(node, 0)}"
            if node.is_loose != (node.key in self._loose):
                yield f"block {node.block} is in the wrong list"
        if len({*self.blocks()}) < self.num_blocks:
            yield "a block is kept under two names"

    def _find_wrong_places(self) -> Iterator[str]:
        if sorted([*self._free_places, *self._snapshots]) != list(range(self.num_places)):
            yield f"places {self._free_places} are free and {[*self._snapshots]} taken, of {self.num_places}"
        for place, node in self._snapshots.items():
            if node.snapshot != place or self._nodes.get(node.key) is not node:
                yield f"place {place} holds the snapshot of no kept block"
        if sum(node.snapshot is not None for node in self._nodes.values()) != len(self._snapshots):
            yield "a block has a snapshot without a place"
