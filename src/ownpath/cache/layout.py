"""Describes the caches as arithmetic: the tensors there are, and the row of one that holds a value. Holds no tensor.

There are three groups:

- ``window``: the last keys of each layer, which are the values too. A ring: position p is row p % num_rows of a slot.
- ``state``: the raw rows of each compressor, as many as its next entry needs. A ring as well.
  Both are longer by ``spare_rows`` if a decode step may have several rows of a request: the step's last row must not
  replace what its first one reads, and rows that are taken back must not have replaced what is read again.
- ``entries``: the compressed entries of a layer (main) and its index keys (index). They grow with the sequence: block b
  of a sequence holds the entries of its tokens [256 b, 256 b + 256), in every layer.

A running sequence owns one slot, its place in all rings, and as many blocks as its tokens need. Slot 0 and block 0 are
nobody's: what is to be written nowhere is written there, so that every row of a step has a place.

Example: ratio 4, so 64 entries a block. Entry 70 of a sequence with blocks (5, 9) is row 9 * 64 + 6 = 582 of the pool;
token 300's key, in slot 2 with a window of 128, is row 2 * 128 + 44 = 300.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from ownpath.config import CSA_RATIO, ModelConfig
from ownpath.formats import FP4_INDEX_BYTES, FP8_INDEX_BYTES, FP8_KEY_BYTES, CacheFormat, KeyFormat

BLOCK_TOKENS = 256
"""Tokens of a block: a multiple of every compress ratio."""
NOBODY = 0
"""The slot, and the block, that no sequence owns: writes that are to be dropped go there."""
MOST_ROWS_PER_REQUEST, MOST_DECODE_ROWS = 9, 256
"""Of a decode step: rows of one request, and of all."""
NAN_BYTE = 255
"""A cache full of this byte is full of NaN, in BF16 and float32 as in pages, by codes or by scales."""
INDEX_BYTES = {KeyFormat.FP8: FP8_INDEX_BYTES, KeyFormat.FP4: FP4_INDEX_BYTES}
"""Bytes of an index key in pages."""


@dataclass(frozen=True)
class CacheGroup:
    """A kind of cache. All tensors of a group are written together and freed together.

    is_paged: rows lie in blocks and grow with the sequence; otherwise in a ring of the sequence's slot.
    is_wide: rows are at least float32; otherwise they have the cache's dtype.
    """

    name: str
    is_paged: bool = False
    is_wide: bool = False


WINDOW = CacheGroup("window")
STATE = CacheGroup("state", is_wide=True)
ENTRIES = CacheGroup("entries", is_paged=True)


class EntryKind(Enum):
    """Tells a layer's main entries from its indexer's keys."""

    MAIN = "main"
    INDEX = "index"


@dataclass(frozen=True)
class CacheTensor:
    """One tensor of a group.

    num_rows: rows of one slot, or of one block of a paged group. width: elements of a row. ratio: tokens per entry, 0
    for a window. format: of keys. page_bytes: bytes of a row where the rows of a slot or block are one page; 0 where
    each is values.
    """

    group: CacheGroup
    layer_idx: int
    part: EntryKind
    num_rows: int
    width: int
    ratio: int = 0
    format: KeyFormat = KeyFormat.BF16
    page_bytes: int = 0

    def num_sequence_rows(self, num_tokens: int) -> int:
        """Returns how many rows a sequence of ``num_tokens`` can fill."""
        return num_tokens // self.ratio if self.group.is_paged else self.num_rows

    def row_bytes(self, itemsize: int, state_itemsize: int) -> int:
        """Returns the bytes of a row, for values of ``itemsize`` and states of ``state_itemsize``."""
        return self.page_bytes or self.width * (state_itemsize if self.group.is_wide else itemsize)


@dataclass(frozen=True)
class CacheLayout:
    """Every tensor of the caches of one model, in the order of its layers: the backbone's, then the drafts'."""

    members: tuple[CacheTensor, ...]

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        ratios: Sequence[int],
        cache_format: CacheFormat = CacheFormat.BF16,
        rows_per_request: int = 1,
    ) -> "CacheLayout":
        """Lists the tensors of a model's layers. ratios: one for each layer, as in ``compress_ratios``.
        rows_per_request: the most of a decode step. Errors: ValueError where that is more than any may have."""
        spare = spare_rows(rows_per_request)
        listed = (member for idx, ratio in enumerate(ratios) for member in _of_layer(config, idx, ratio))
        members = [member if member.group.is_paged else _longer(member, spare) for member in listed]
        return cls(tuple(_in_format(member, cache_format) for member in members))

    def of_layers(self, layer_ids: frozenset[int]) -> "CacheLayout":
        """Keeps the tensors of some layers."""
        return CacheLayout(tuple(member for member in self.members if member.layer_idx in layer_ids))

    @property
    def layer_ids(self) -> tuple[int, ...]:
        """The layers that have caches, in ascending order."""
        return tuple(dict.fromkeys(member.layer_idx for member in self.members))

    @property
    def ratios(self) -> tuple[int, ...]:
        """The compress ratios that occur, in ascending order."""
        return tuple(sorted({member.ratio for member in self.members if member.ratio}))

    def num_bytes(self, num_tokens: int, itemsize: int, state_itemsize: int) -> int:
        """Returns the bytes of the rows that one sequence of ``num_tokens`` can fill."""
        return sum(
            member.num_sequence_rows(num_tokens) * member.row_bytes(itemsize, state_itemsize) for member in self.members
        )

    def unit_bytes(self, itemsize: int, state_itemsize: int, *, is_paged: bool) -> int:
        """Returns the bytes of one block of the paged tensors, or of one slot of the others."""
        members = (member for member in self.members if member.group.is_paged == is_paged)
        return sum(member.num_rows * member.row_bytes(itemsize, state_itemsize) for member in members)


def aligned_rows(num_rows: int) -> int:
    """Returns the least number of 4-byte rows, at least ``num_rows``, after which the next array begins at a multiple
    of 16 bytes, as the kernels' widest loads need."""
    return -(-num_rows // 4) * 4


def _of_layer(config: ModelConfig, layer_idx: int, ratio: int) -> Iterator[CacheTensor]:
    """Yields the tensors of a layer, for steps with one row of a request."""
    yield CacheTensor(WINDOW, layer_idx, EntryKind.MAIN, config.sliding_window, config.head_dim)
    if ratio:
        yield from _compressed_tensors(layer_idx, EntryKind.MAIN, ratio, config.head_dim)
    if ratio == CSA_RATIO:
        yield from _compressed_tensors(layer_idx, EntryKind.INDEX, ratio, config.index_head_dim)


def _compressed_tensors(layer_idx: int, part: EntryKind, ratio: int, head_dim: int) -> Iterator[CacheTensor]:
    """Yields the state and entries of one compressor. CSA's windows overlap: an entry needs two windows of doubled
    rows."""
    num_windows = windows_per_entry(ratio)
    yield CacheTensor(STATE, layer_idx, part, num_windows * ratio, 2 * num_windows * head_dim, ratio)
    yield CacheTensor(ENTRIES, layer_idx, part, BLOCK_TOKENS // ratio, head_dim, ratio)


def _longer(member: CacheTensor, spare: int) -> CacheTensor:
    return replace(member, num_rows=member.num_rows + spare)


def _in_format(member: CacheTensor, cache_format: CacheFormat) -> CacheTensor:
    """Gives keys their format; states stay as they are."""
    is_main = member.part is EntryKind.MAIN
    key_format = cache_format.keys if is_main else cache_format.index_keys
    if member.group.is_wide or key_format is KeyFormat.BF16:
        return member
    return replace(member, format=key_format, page_bytes=FP8_KEY_BYTES if is_main else INDEX_BYTES[key_format])


def spare_rows(rows_per_request: int) -> int:
    """Returns the rows by which rings are longer than one row of a request needs: none, or enough for any number of
    rows, so that kernels are compiled for two lengths. Errors: ValueError."""
    if not 1 <= rows_per_request <= MOST_ROWS_PER_REQUEST:
        raise ValueError(f"rows_per_request must be 1 to {MOST_ROWS_PER_REQUEST}, found {rows_per_request}")
    return 0 if rows_per_request == 1 else MOST_ROWS_PER_REQUEST - 1


def windows_per_entry(ratio: int) -> int:
    """Returns how many windows an entry averages over."""
    return 2 if ratio == CSA_RATIO else 1


def first_row(window: int, ratio: int) -> int:
    """Returns the position of the first row that a window's entry averages."""
    return max(0, window + 1 - windows_per_entry(ratio)) * ratio


def num_blocks(num_tokens: int) -> int:
    """Returns how many blocks a sequence of ``num_tokens`` needs."""
    return -(-num_tokens // BLOCK_TOKENS)


def ring_row(slot: int, position: int, num_rows: int) -> int:
    """Returns the row of a window's or state's tensor that holds the row of ``position``."""
    return slot * num_rows + position % num_rows


def entry_row(blocks: Sequence[int], entry: int, num_rows: int) -> int:
    """Returns the row of an entries tensor that holds entry number ``entry`` of a sequence."""
    return blocks[entry // num_rows] * num_rows + entry % num_rows
