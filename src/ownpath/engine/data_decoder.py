"""Decode steps where ranks have requests of their own: each rank's rows are a part of the same arrays on all.

A step of a bucket of n runs n rows on every rank, padded, and rank r's are rows n r to n (r + 1) - 1 of the arrays, as
they are of the logits. So all ranks draw for all rows, from the same logits with the same arrays, and each runs its own
rows through the layers. Rank 0 tells of rows by the books' numbers; a rank takes its own slots and blocks from them on
the device. What the layers flag is added up over ranks before the tokens are drawn, which writes both to the host.

Example: 3 rows of rank 0 and 1 of rank 1 run in the bucket of 3: rows 0, 1, 2 and 3, and rows 4 and 5 are padded.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch

from ownpath.cache.layout import NOBODY, aligned_rows
from ownpath.cache.pools import CachePool
from ownpath.cache.rank_books import RankNumbers
from ownpath.cache.tables import DecodeTables, new_flags
from ownpath.engine.data_steps import coded_flags, flag_codes, in_order, share_codes
from ownpath.engine.decoder import StepBegun
from ownpath.engine.decoding_ranks import FollowingDecoder, LeadingDecoder, RankDecoder, SharingModel
from ownpath.engine.rows import Staged, StepRows
from ownpath.ranks.control import Leader


class DataModel(SharingModel, Protocol):
    """The model as a rank's decoder uses it."""

    def decode_by_data(self, token_ids_T: torch.Tensor, tables: DecodeTables) -> torch.Tensor: ...


class OwnRows:
    """A rank's own rows of a step's arrays, by its own numbers, in memory that is aligned for kernels. rank: of
    ``RankNumbers``."""

    def __init__(self, pool: CachePool, max_rows: int, rank: int) -> None:
        self.pool, self._rank, self._numbers = pool, rank, RankNumbers.of(pool.spec)
        heads, blocks, device = (3, aligned_rows(max_rows)), (max_rows, pool.blocks_per_sequence), pool.spec.device
        self._heads, self._blocks = (torch.zeros(size, dtype=torch.int32, device=device) for size in (heads, blocks))
        self._flags_LT = new_flags(pool, max_rows)

    def take(self, heads_3R: torch.Tensor, blocks_RB: torch.Tensor, count: int) -> tuple[torch.Tensor, DecodeTables]:
        """Copies this rank's rows, ``count`` of each rank, from tokens, slots and positions [3, R] and block tables;
        returns tokens and tables."""
        rows = slice(self._rank * count, (self._rank + 1) * count)
        heads, blocks = self._heads[:, :count], self._blocks[:count]
        heads.copy_(heads_3R[:, rows])
        blocks.copy_(blocks_RB[rows])
        tokens, slots, positions = heads
        if self._rank:
            slots.sub_(self._rank * self._numbers.num_slots).clamp_(min=NOBODY)
            blocks.sub_(self._rank * self._numbers.num_blocks).clamp_(min=NOBODY)
        return tokens, DecodeTables(self.pool, positions, slots, blocks, self._flags_LT[:, :count])


class DataDecoder(RankDecoder):
    """A decoder of one of several ranks that have requests of their own; see ``RankDecoder``. max_rows: of each."""

    def __init__(self, model: DataModel, max_rows: int, num_vocab: int, rank: int, size: int, **others: Any) -> None:
        self._rank, self.num_parts = rank, size
        super().__init__(model, max_rows, num_vocab, **others)
        self._decode: Callable[[torch.Tensor, DecodeTables], torch.Tensor] = model.decode_by_data
        self._own, self._numbers = OwnRows(model.caches, max_rows, rank), RankNumbers.of(model.caches.spec)

    def has_graph(self, num_requests: int) -> bool:
        """See ``StepGraphs``. Which bucket runs a step depends on the rank that has the most rows of it."""
        return bool(self._graphs)

    def place(self, rows: StepRows) -> tuple[int, list[int] | None]:
        """See ``Decoder``: each rank's rows follow each other."""
        ranks = [self._numbers.rank_of(cache.slot) for cache in rows.caches]
        count = self._bucket_of(max(ranks.count(rank) for rank in range(self.num_parts)))
        return count, in_order(ranks, count, self.num_parts)

    def _stage(self, rows: StepRows, begun: StepBegun) -> Staged:
        return self._rows.stage(rows, begun.turn, begun.places, None if self._last is None else self._last.places)

    def run(self, count: int) -> torch.Tensor:
        """See ``StepGraphs``. count: rows of each rank. Returns the logits of all ranks' rows."""
        columns, num_rows = self._rows.columns, self.num_parts * count
        tokens_T, tables = self._own.take(columns.rows, columns.blocks, count)
        logits_BV = self._decode(tokens_T, tables)[:, : self.num_vocab]
        assert tables.flags_LT is not None
        codes_T = flag_codes(tables.flags_LT)
        codes_B = share_codes(self._share, codes_T, self._rank, self.num_parts, self._dtype)
        flags_LB = self._results.flags(num_rows)
        flags_LB.copy_(coded_flags(codes_B, flags_LB))
        self._sample(logits_BV, self._rows.sample_rows(num_rows))
        return logits_BV

    def _num_shared(self, begun: StepBegun) -> int:
        return self.num_parts * begun.count


class LeadingDataDecoder(DataDecoder, LeadingDecoder):
    """Rank 0's. books: of the caches of all ranks."""

    def __init__(self, model: DataModel, max_rows: int, num_vocab: int, leader: Leader, books: CachePool) -> None:
        size = books.slots.num_slots // RankNumbers.of(books.spec).num_slots
        super().__init__(model, max_rows, num_vocab, 0, size, leader=leader)
        self.pool = books


class FollowingDataDecoder(DataDecoder, FollowingDecoder):
    """Another rank's."""
