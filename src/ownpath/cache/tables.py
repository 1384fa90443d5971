"""Tables of a step: the request of each row, the place of each request in the caches, and where its rows are written.

Legend: T rows of the step, R requests, B blocks of a request.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch

from ownpath.cache.layout import BLOCK_TOKENS, MOST_DECODE_ROWS, NOBODY, aligned_rows, num_blocks
from ownpath.cache.pools import CachePool, PlacedSequence, SequenceCache
from ownpath.cache.snapshot import PassedSnapshot
from ownpath.cache.transfer import upload


def new_flags(pool: CachePool, num_rows: int) -> torch.Tensor:
    """Makes the flags of a step's rows, none of them set: int32 [L, num_rows], each layer's aligned for kernels."""
    shape = 1 + max(pool.layout.layer_ids), aligned_rows(num_rows)
    return torch.zeros(shape, dtype=torch.int32, device=pool.spec.device)[:, :num_rows]


def first_flagged(flags_LT: "npt.NDArray[np.int32]") -> dict[int, int]:
    """Returns the first layer that flagged each row, of those that are flagged at all."""
    if not flags_LT.any():
        return {}
    return {row: int(flags_LT[:, row].argmax()) for row in np.flatnonzero(flags_LT.any(axis=0)).tolist()}


@dataclass(frozen=True)
class Writes:
    """Rows of the pool's tensors that a step's rows are written to, int64 [T] each.

    window_T: in windows. state_T, entry_T: in compressors' states and entries, by compress ratio. The row that ends a
    window writes its entry. Row ``NOBODY`` means "not written": the row ends no window, or a later row of the same step
    replaces it in the ring.
    """

    window_T: torch.Tensor
    state_T: Mapping[int, torch.Tensor]
    entry_T: Mapping[int, torch.Tensor]


@dataclass(frozen=True)
class PassedEnd:
    """A block's end among a request's rows, where a snapshot is to be taken.

    rows: rows of the step in front of the end, as many as rings hold. writes: their places, as of a step that ends
    there.
    """

    rows: slice
    writes: Writes
    snapshot: PassedSnapshot


@dataclass(frozen=True)
class DecodeTables:
    """The arrays of a decode step, in which a request has one row, or as many as the pool's rings are made for; all
    int32, on the pool's device.

    positions_T [T]: each row's position in its sequence; slots_T [T]; blocks_TB [T, B]: block tables, which bound the
    context at 256 * B tokens. Rows of one request follow each other, at consecutive positions. A padded row has slot
    ``NOBODY``, position 0 and a table of ``NOBODY``.
    flags_LT [L, T]: where layer l has an indexer, its selection sets 1 in rows whose index scores are not finite, else
    0. ``None``: nobody asks.
    """

    pool: CachePool
    positions_T: torch.Tensor
    slots_T: torch.Tensor
    blocks_TB: torch.Tensor
    flags_LT: torch.Tensor | None = None

    def flags_of(self, layer_idx: int) -> torch.Tensor | None:
        """Returns a layer's flags [T]; ``None`` where nobody asks."""
        return None if self.flags_LT is None else self.flags_LT[layer_idx]


@dataclass(frozen=True)
class StepTables:
    """The arrays of one step: on the host for Python code, and on the pool's device, once somebody asks, for kernels.

    Device: positions_T int64 [T], each row's position in its sequence; slots_R int64 [R]; blocks_RB int64 [R, B], block
    tables; flags_LT int32 [L, T], 1 in rows whose index scores are not finite in layer l.
    Host: places, of rows; row_ends, where each request's rows end; starts, the position of each request's first
    row; slots; passed, the snapshots to be taken on the way, of each request from the first on.
    """

    pool: CachePool
    places: "HostPlaces"
    row_ends: tuple[int, ...]
    starts: tuple[int, ...]
    slots: tuple[int, ...]
    passed: tuple[PassedEnd, ...] = ()

    @cached_property
    def positions_T(self) -> torch.Tensor:
        return upload(self.places.positions_T, self.pool.spec.device)

    @cached_property
    def slots_R(self) -> torch.Tensor:
        return upload(torch.tensor(self.slots), self.pool.spec.device)

    @cached_property
    def blocks_RB(self) -> torch.Tensor:
        return upload(self.places.blocks_RB, self.pool.spec.device)

    @cached_property
    def flags_LT(self) -> torch.Tensor:
        return new_flags(self.pool, self.row_ends[-1])

    @cached_property
    def rows(self) -> tuple[slice, ...]:
        """The rows of each request."""
        return tuple(slice(*pair) for pair in zip((0, *self.row_ends), self.row_ends, strict=False))

    @cached_property
    def num_blocks(self) -> int:
        """Blocks of the longest request behind the step."""
        ends = (start + rows.stop - rows.start for start, rows in zip(self.starts, self.rows, strict=True))
        return num_blocks(max(ends))

    @cached_property
    def writes(self) -> Writes:
        """The places that torch writes the step's rows to; lines of kernels need none of them."""
        return self.places.writes(self.pool, self.pool.spec.device)

    @cached_property
    def decode(self) -> DecodeTables | None:
        """The arrays of a decode step; ``None`` if a request has more rows than the pool's rings are made for, or if a
        snapshot is to be taken on the way. Block tables are cut to the blocks that the step needs."""
        if self.passed:
            return None
        counts = [rows.stop - rows.start for rows in self.rows]
        if max(counts) > self.pool.spec.rows_per_request or self.row_ends[-1] > MOST_DECODE_ROWS:
            return None
        slots_T, blocks_TB = self.slots_R, self.blocks_RB[:, : self.num_blocks]
        if max(counts) > 1:
            request_T = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(slots_T.device)
            slots_T, blocks_TB = slots_T[request_T], blocks_TB[request_T]
        arrays = (self.positions_T, slots_T, blocks_TB)
        positions_T, slots_T, blocks_TB = (array.to(torch.int32).contiguous() for array in arrays)
        return DecodeTables(self.pool, positions_T, slots_T, blocks_TB, self.flags_LT)

    def extend(self) -> None:
        """Adds the step's rows to the token counts of their sequences."""
        for slot, start, rows in zip(self.slots, self.starts, self.rows, strict=True):
            self.pool.slots.lengths[slot] = start + rows.stop - rows.start

    @classmethod
    def of(
        cls,
        caches: Sequence[SequenceCache | PlacedSequence],
        num_rows: Sequence[int],
        passed: Sequence[PassedSnapshot] = (),
    ) -> "StepTables":
        """Builds the tables of a step in which sequence i brings ``num_rows[i]`` more rows.

        The sequences are distinct, but for those of ``NOBODY``, and of one pool, and have room for their rows. passed:
        snapshots to be taken on the way, behind the first row and before the last one of their sequences; of each in
        ascending order.
        """
        pool, slots = caches[0].pool, tuple(cache.slot for cache in caches)
        assert all(cache.pool is pool for cache in caches), "sequences of different pools"
        own = [slot for slot in slots if slot != NOBODY]
        assert len({*own}) == len(own), "a sequence is twice in a step"
        starts = tuple(cache.num_tokens for cache in caches)
        row_ends = tuple(accumulate(num_rows))
        starts_R, num_rows_R, slots_R = (torch.tensor(values) for values in (starts, tuple(num_rows), slots))
        blocks_RB = tables_of([cache.blocks for cache in caches], pool.blocks_per_sequence)
        first_R = torch.tensor((0, *row_ends[:-1]))
        request_T = torch.arange(len(slots)).repeat_interleave(num_rows_R)
        positions_T = torch.arange(row_ends[-1]) + (starts_R - first_R)[request_T]
        places = HostPlaces(positions_T, (starts_R + num_rows_R)[request_T], slots_R[request_T], request_T, blocks_RB)
        return cls(pool, places, row_ends, starts, slots, tuple(map(places.passed_end, passed)))


def tables_of(blocks: Sequence[Sequence[int]], width: int) -> torch.Tensor:
    """Returns block tables of one width, int64 [R, width], with ``NOBODY`` behind the blocks that sequences have."""
    return torch.tensor([(*own, *[NOBODY] * (width - len(own))) for own in blocks])


@dataclass(frozen=True)
class HostPlaces:
    """Per row, on the host: its position, its sequence's length after the step, its slot, its request. And each
    request's blocks [R, B]."""

    positions_T: torch.Tensor
    lengths_T: torch.Tensor
    slots_T: torch.Tensor
    requests_T: torch.Tensor
    blocks_RB: torch.Tensor

    def passed_end(self, snapshot: PassedSnapshot) -> PassedEnd:
        """Returns the rows and their places as of a step that ends where a snapshot is to be taken."""
        pool, end = snapshot.pool, snapshot.num_tokens
        is_held_T = (self.positions_T >= end - pool.longest_ring) & (self.positions_T < end)
        held = torch.nonzero(is_held_T & (self.slots_T == snapshot.slot)).flatten().tolist()
        rows = slice(held[0], held[-1] + 1)
        lengths_T = torch.full_like(self.lengths_T[rows], end)
        own = self.slots_T[rows], self.requests_T[rows], self.blocks_RB
        places = HostPlaces(self.positions_T[rows], lengths_T, *own)
        return PassedEnd(rows, places.writes(pool, pool.spec.device), snapshot)

    def writes(self, pool: CachePool, device: torch.device) -> Writes:
        ratios, spec = pool.layout.ratios, pool.spec
        state_T = {ratio: upload(self.ring(spec.state_rows(ratio)), device) for ratio in ratios}
        entry_T = {ratio: upload(self.entries(ratio), device) for ratio in ratios}
        return Writes(upload(self.ring(spec.window_rows), device), state_T, entry_T)

    def ring(self, num_rows: int) -> torch.Tensor:
        """Applies ``layout.ring_row`` to the last ``num_rows`` positions of each sequence."""
        rows_T = self.slots_T * num_rows + self.positions_T % num_rows
        return torch.where(self.positions_T >= self.lengths_T - num_rows, rows_T, NOBODY)

    def entries(self, ratio: int) -> torch.Tensor:
        """Applies ``layout.entry_row`` to the entries whose windows end at a row."""
        per_block = BLOCK_TOKENS // ratio
        entry_T = self.positions_T // ratio
        block_T = self.blocks_RB[self.requests_T, entry_T // per_block]
        return torch.where((self.positions_T + 1) % ratio == 0, block_T * per_block + entry_T % per_block, NOBODY)
