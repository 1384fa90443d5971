"""One rank's part of what rank 0 tells, where ranks have requests of their own: every rank, rank 0 too, follows.

A message names the rows of all ranks, by the slots and blocks of the books (``cache.rank_books``). Every rank takes its
own, and runs a step of as many rows as the busiest one: rows that stand for none have a negative token, which goes to
no expert, and are written to nobody's slot and block. So all ranks are in the same exchanges of the same sizes, also
one that has nothing to do. Each gets the logits of all rows, in the order of ranks.

Example: rank 0 has chunks of 3 and 1 tokens, rank 1 one of 2. Both run 4 rows, rank 1 two for nobody. If the last row
of each request is wanted, both want 2: rank 1's second is any of its rows, which nobody reads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ownpath.cache.layout import BLOCK_TOKENS, NOBODY, num_blocks
from ownpath.cache.pools import CachePool, PlacedSequence
from ownpath.cache.rank_books import RankNumbers
from ownpath.cache.tables import StepTables
from ownpath.engine.decoding_ranks import DECODE, REDRAW, FollowingDecoder
from ownpath.engine.following import Follower
from ownpath.engine.leading import PUT, STEP
from ownpath.engine.rows import PADDED
from ownpath.model.batch import ForwardBatch
from ownpath.model.model import Model
from ownpath.ranks.control import RankMessage
from ownpath.splits import DRAWN_MULTIPLE

_BLOCK, _SLOT = "block", "slot"
"""Fields of messages that are numbers of the books."""


@dataclass(frozen=True)
class RankRows:
    """The rows of a step by rank. ranks: of each row. wanted: the rows whose logits are wanted. size: of the ranks."""

    ranks: Sequence[int]
    wanted: Sequence[int]
    size: int

    @cached_property
    def rows(self) -> list[list[int]]:
        """Each rank's rows."""
        return [[row for row, owner in enumerate(self.ranks) if owner == rank] for rank in range(self.size)]

    @cached_property
    def wanted_of(self) -> list[list[int]]:
        """Each rank's wanted rows, by their numbers among its own."""
        own = {row: number for rows in self.rows for number, row in enumerate(rows)}
        return [[own[row] for row in self.wanted if self.ranks[row] == rank] for rank in range(self.size)]

    @property
    def most_rows(self) -> int:
        """Rows that each rank runs."""
        return max(map(len, self.rows))

    @property
    def most_wanted(self) -> int:
        """Rows that each rank gives the logits of."""
        return max(map(len, self.wanted_of))

    def places(self) -> list[int]:
        """Returns each row's place among the rows of all ranks, padded."""
        return in_order(self.ranks, self.most_rows, self.size)

    def wanted_places(self) -> list[int]:
        """Returns each wanted row's place among the logits of all ranks."""
        return in_order([self.ranks[row] for row in self.wanted], self.most_wanted, self.size)


def in_order(ranks: Sequence[int], most: int, size: int) -> list[int]:
    """Returns the place of each of several things, where those of each rank have ``most`` places."""
    following = [most * rank for rank in range(size)]
    found = []
    for rank in ranks:
        found.append(following[rank])
        following[rank] += 1
    return found


class DataStep(NamedTuple):
    """Results of a step, on each rank: the logits of all ranks' wanted rows, and the codes of all ranks' rows
    (``flag_codes``), padded, in the order of ranks."""

    rows: RankRows
    logits_BV: Tensor
    codes_B: Tensor


def flag_codes(flags_LT: Tensor) -> Tensor:
    """Returns a number of each row [T]: of L layers, L - l where l is the first that flags it, 0 where none does."""
    return (flags_LT * _layers_left(flags_LT)).amax(0)


def coded_flags(codes_T: Tensor, flags_LT: Tensor) -> Tensor:
    """Returns flags of which each row's first is set, as ``flag_codes`` tells; of the shape of others."""
    return (codes_T == _layers_left(flags_LT)).to(flags_LT.dtype)


def _layers_left(flags_LT: Tensor) -> Tensor:
    return torch.arange(len(flags_LT), 0, -1, dtype=flags_LT.dtype, device=flags_LT.device)[:, None]


def share_codes(share: Callable[[Tensor], Tensor], codes_T: Tensor, rank: int, size: int, dtype: torch.dtype) -> Tensor:
    """Returns all ranks' codes [N * T], in the order of ranks. share: adds up over ranks, in a dtype of which codes are
    exact numbers."""
    count = len(codes_T)
    own = codes_T.new_zeros(-(-size * count // DRAWN_MULTIPLE) * DRAWN_MULTIPLE, dtype=dtype)
    own[rank * count : (rank + 1) * count] = codes_T
    return share(own.view(-1, DRAWN_MULTIPLE)).flatten()[: size * count].to(codes_T.dtype)


class DataFollower(Follower):
    """One rank's part; see ``Follower``. rank, size: of the ranks."""

    def __init__(
        self,
        model: Model,
        rank: int,
        size: int,
        places: tuple[int, int],
        decoder: FollowingDecoder | None = None,
    ) -> None:
        super().__init__(model, *places, decoder)
        self.rank, self.size, self.numbers = rank, size, RankNumbers.of(model.cache_spec)

    def do(self, told: RankMessage) -> object:
        """Does what a message says, if it is for this rank."""
        if told["kind"] in (STEP, DECODE, REDRAW):
            return super().do(told)
        own = self._own(told)
        return None if own is None else super().do(own)

    def step(self, told: RankMessage) -> DataStep:
        """Runs this rank's part of a step."""
        sequences = told["sequences"]
        ranks = [self.numbers.rank_of(slot) for slot, _, num_rows, _ in sequences for _ in range(num_rows)]
        rows = RankRows(ranks, told["logits_ids"], self.size)
        batch = self._batch(told, rows)
        logits_BV = self._model.forward_by_data(batch)
        assert self._model.share is not None, "no exchange of tokens is planned"
        codes_T = flag_codes(batch.tables.flags_LT)
        dtype = self._pool.spec.dtype
        return DataStep(rows, logits_BV, share_codes(self._model.share, codes_T, self.rank, self.size, dtype))

    def _own(self, told: RankMessage) -> RankMessage | None:
        """Returns a message by the numbers of this rank; ``None`` where it is for another one."""
        if told["kind"] == PUT:
            return told if told["taken"] in self._passed else None
        if self.numbers.rank_of(told[_SLOT]) != self.rank:
            return None
        own = told | {_SLOT: self.numbers.own_slot(told[_SLOT])}
        return own | {_BLOCK: self.numbers.own_block(told[_BLOCK])} if _BLOCK in told else own

    def _step(self, told: RankMessage) -> DataStep:
        return self.step(told)

    def _batch(self, told: RankMessage, rows: RankRows) -> ForwardBatch:
        own, numbers, pool, device = rows.rows[self.rank], self.numbers, self._pool, self._pool.spec.device
        sequences = [one for one in told["sequences"] if numbers.rank_of(one[0]) == self.rank]
        taken = [one for one in told["passed"] if numbers.rank_of(one[0]) == self.rank]
        passed = self._take_passed([(numbers.own_slot(slot), *rest) for slot, *rest in taken], told["living"])
        placed = [
            PlacedSequence(pool, numbers.own_slot(slot), tuple(map(numbers.own_block, blocks)), start)
            for slot, start, _, blocks in sequences
        ]
        counts = [num_rows for _, _, num_rows, _ in sequences]
        for count in _padding(pool, rows.most_rows - len(own)):
            placed.append(PlacedSequence(pool, NOBODY, (NOBODY,) * num_blocks(count), 0))
            counts.append(count)
        ids = [told["token_ids"][row] for row in own] + [PADDED] * (rows.most_rows - len(own))
        wanted = rows.wanted_of[self.rank]
        wanted = wanted + [0] * (rows.most_wanted - len(wanted))
        arrays = (torch.tensor(values, dtype=torch.int64).to(device) for values in (ids, wanted))
        token_ids_T, logits_ids = arrays
        return ForwardBatch(token_ids_T, StepTables.of(placed, counts, passed), logits_ids)


def _padding(pool: CachePool, count: int) -> list[int]:
    """Divides rows for nobody into sequences, none longer than any may be."""
    most = min(pool.spec.max_tokens, BLOCK_TOKENS * pool.blocks_per_sequence)
    return [min(most, count - first) for first in range(0, count, most)]
