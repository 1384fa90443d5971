"""Decode steps that verify drafts: each request has two rows, its last token and a guess of the next one.

The model runs both. Each row's token is drawn as it would be without drafts, with the noise of its own place in the
answer. If the first row draws the guess, the second row is the step that would have come next, and its token counts
too; otherwise it is taken back, by not counting it. The first MTP module then guesses the token behind the last one
that counts. All of it is one graph, which goes on from what it has left on the device:

    tokens  t g     positions  p p+1     drawn  a b     a == g: next t = b, position p + 2, else t = a, position p + 1

A guess is drawn by the same sampler with the same noise from the module's logits, so that it is the target's token as
often as their distributions allow. Whoever guesses, the answer is the one without drafts.

Legend: T rows of a step, R requests, V vocabulary, L layers; T = 2 R.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ownpath.cache.layout import BLOCK_TOKENS
from ownpath.cache.pools import CachePool, PlacedSequence, SequenceCache
from ownpath.cache.tables import DecodeTables
from ownpath.engine.decoder import NOTHING
from ownpath.engine.draft_rows import DraftArrays, DraftedTokens, end_kernels_of
from ownpath.engine.graphs import GraphModel, StepGraphs
from ownpath.engine.rows import NO_ROWS, NUM_TURNS, PADDED, GroupedRows, RowArrays, Staged, StepRows
from ownpath.engine.sampler import sampler_of
from ownpath.engine.tops import PendingTops, read_tops, start_tops
from ownpath.kernels.drafts.types import ROWS
from ownpath.model.model import Verified

__all__ = ["ROWS", "DraftDecoder", "DraftedTokens"]

MOST_AHEAD = ROWS * NUM_TURNS
"""Positions behind the last known one that launched steps may write."""
UNKNOWN = PADDED, PADDED
"""The tokens behind both rows of a request that answers."""
Known = Sequence[tuple[int, int]]
"""Of each request the tokens behind both rows, -1 where they are to be drawn."""
AcceptGuesses = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Is given the tokens drawn and the guesses of requests, and writes 1 for each guess that counts as right, else 0."""


class VerifyingModel(GraphModel, Protocol):
    """The model as a step with drafts uses it."""

    def verify(self, token_ids_T: torch.Tensor, tables: DecodeTables) -> Verified: ...

    def guess(self, verified: Verified, next_ids_T: torch.Tensor) -> torch.Tensor: ...


@dataclass
class HeldDrafts:
    """The requests that the device goes on with. positions: of each one's last token, as far as steps have been
    read."""

    caches: Sequence[SequenceCache]
    slots: list[int]
    blocks: list[tuple[int, ...]]
    positions: list[int]

    @classmethod
    def of(cls, caches: Sequence[SequenceCache], ahead: int = 0) -> "HeldDrafts":
        """Notes where caches end. ahead: tokens that an unread step will add to each."""
        positions = [cache.num_tokens + ahead for cache in caches]
        return cls(caches, [cache.slot for cache in caches], [cache.blocks for cache in caches], positions)

    @property
    def num_left(self) -> int:
        """Positions that every request has room for from those on."""
        return min(
            room_behind(blocks, at, self.caches[0].pool) for blocks, at in zip(self.blocks, self.positions, strict=True)
        )

    def are_those_of(self, pool: CachePool) -> bool:
        """Returns True if the caches have the block tables and lengths that the device has."""
        lengths, owned = pool.slots.lengths, pool.slots.owned
        is_same = [*map(owned.get, self.slots)] == self.blocks
        return is_same and [*map(lengths.__getitem__, self.slots)] == self.positions


def room_behind(blocks: tuple[int, ...], num_tokens: int, pool: CachePool) -> int:
    """Returns how many tokens a sequence of so many may still have in its blocks."""
    return min(BLOCK_TOKENS * len(blocks), pool.spec.max_tokens) - num_tokens


@dataclass
class DraftBegun:
    """A step that is launched and not read. turn: the buffers of its results. num_tops: row -> number of its likeliest
    tokens."""

    held: HeldDrafts
    turn: int
    num_tops: Mapping[int, int]
    tops: PendingTops | None = field(default=None)


class DraftDecoder(StepGraphs):
    """Runs steps with drafts of up to ``max_requests`` requests. judge: decides which guesses are right in place of the
    tokens drawn, for measuring: answers are wrong then."""

    def __init__(
        self, model: VerifyingModel, max_requests: int, num_vocab: int, judge: AcceptGuesses | None = None
    ) -> None:
        super().__init__(model, max_requests, num_vocab)
        assert self.pool.spec.rows_per_request >= ROWS, "the rings of the caches have no spare rows"
        self._model, self._judge, device = model, judge, self.pool.spec.device
        self._rows = RowArrays(ROWS * max_requests, self.pool.blocks_per_sequence, device)
        self._sampler, self._sampler_operand = sampler_of(device)
        self._ends = end_kernels_of(device)
        self._arrays = DraftArrays(self.pool, self._rows, max_requests)
        self._held: HeldDrafts | None = None

    def pad(self) -> None:
        """See ``StepGraphs``."""
        turn = self._take_turn()
        staged = self._rows.stage(NO_ROWS, turn)
        self._marks[turn] = self._enqueue(lambda: self._send(staged), turn)

    def warm_up_rest(self, logits_TV: torch.Tensor) -> None:
        """Does nothing: nothing else follows a step."""

    def begin(
        self,
        rows: StepRows,
        guesses: Sequence[int],
        tops: Mapping[int, int] = NOTHING,
        known: Known = (),
        ahead: int = 0,
    ) -> DraftBegun:
        """Launches a step of other requests, a row and a guess for each. Does not wait. No step may be unread, but one
        whose guesses are all known: ``ahead`` is then what it adds.

        tops: row -> number of its likeliest tokens that the results are to have. known: of each request the tokens
        behind both rows, -1 where they are to be drawn; a request whose guess is known has both tokens count.
        """
        assert ahead == ROWS * self._num_unread, "what is unread decides where rows begin"
        self._held, turn = None, self._take_turn()
        held = HeldDrafts.of(rows.caches, ahead)
        staged = self._rows.stage(_in_pairs(rows, guesses, known or [UNKNOWN] * rows.num_rows, held), turn)
        return self._begin(DraftBegun(held, turn, tops), staged)

    @property
    def can_repeat(self) -> bool:
        """True if the requests of the last step may go on as they are."""
        held = self._held
        return held is not None and held.are_those_of(self.pool) and held.num_left >= ROWS * (1 + self._num_unread)

    def repeat(self, before: DraftBegun) -> DraftBegun:
        """Launches one more step of the same requests. before: the last one."""
        assert self._held is not None
        return self._begin(DraftBegun(self._held, self._take_turn(), before.num_tops), None)

    def _begin(self, begun: DraftBegun, staged: Staged | None) -> DraftBegun:
        assert begun.held.num_left >= ROWS * (1 + self._num_unread), "a request has no room"
        self._held = None  # until the step is launched: one that fails leaves rows that nobody knows
        self._marks[begun.turn] = self._enqueue(lambda: self._launch_whole(begun, staged), begun.turn)
        self._held, self._num_unread = begun.held, self._num_unread + 1
        return begun

    def finish(self, begun: DraftBegun) -> DraftedTokens:
        """Waits for the oldest unread step, counts its tokens into their caches, and returns its results."""
        self._marks[begun.turn].wait()
        self._num_unread -= 1
        tops = {} if begun.tops is None else read_tops(begun.tops)
        held, found = begun.held, self._arrays.read(begun.turn, len(begun.held.slots), tops)
        lengths = self.pool.slots.lengths
        for n, (slot, tokens) in enumerate(zip(held.slots, found.token_ids, strict=True)):
            held.positions[n] += len(tokens)
            lengths[slot] = held.positions[n]
        return found

    def forget(self) -> None:
        """Gives unread steps up: nobody will read them, and nothing goes on from their rows."""
        self._num_unread, self._held = 0, None
        self._rows.forget()

    def _launch_whole(self, begun: DraftBegun, staged: Staged | None) -> None:
        """Launches a step: upload, bucket, and likeliest tokens."""
        if staged is not None:
            self._send(staged)
        logits_TV = self.launch(self._bucket_of(len(begun.held.slots)))
        if begun.num_tops:
            begun.tops = start_tops(logits_TV, begun.num_tops)

    def _send(self, staged: Staged) -> None:
        self._rows.send(staged, self._arrays.drawn_W)
        self._arrays.take()

    def run(self, count: int) -> torch.Tensor:
        """See ``StepGraphs``. count: requests."""
        num_rows, columns, arrays, (accept, go_on) = ROWS * count, self._rows.columns, self._arrays, self._ends
        tokens_T, rows = columns.tokens[:num_rows], arrays.rows
        verified = self._model.verify(tokens_T, self._rows.tables(self.pool, num_rows, arrays.flags(num_rows)))
        logits_TV = verified.logits_TV[:, : self.num_vocab].float()
        drawn = arrays.sampled(num_rows)
        self._sampler.run(logits_TV, self._rows.sample_rows(num_rows), self._sampler_operand, out=drawn)
        if self._judge is not None:
            self._judge(drawn.token_T[::ROWS], tokens_T[1::ROWS], arrays.accepted(count))
        accept.run(rows, count, is_judged=self._judge is not None)
        # The module writes its keys at the positions of the step's rows, which move behind it.
        guess_TV = self._model.guess(verified, rows.following_W[:num_rows])[:, : self.num_vocab].float()
        self._sampler.run(guess_TV, arrays.guessing(count), self._sampler_operand, out=arrays.guessed(num_rows))
        go_on.run(rows, count)
        return logits_TV


def _in_pairs(rows: StepRows, guesses: Sequence[int], known: Known, held: HeldDrafts) -> GroupedRows:
    """Returns two rows for each: of its token, and of the guess behind it."""
    pairs = zip(rows.token_ids, guesses, strict=True)
    return GroupedRows(
        [
            PlacedSequence(held.caches[0].pool, slot, blocks, position + ahead)
            for slot, blocks, position in zip(held.slots, held.blocks, held.positions, strict=True)
            for ahead in range(ROWS)
        ],
        [token_id for pair in pairs for token_id in pair],
        [one for one in rows.params for _ in range(ROWS)],
        [seed for seed in rows.seeds for _ in range(ROWS)],
        [count + ahead for count in rows.num_drawn for ahead in range(ROWS)],
        [token_id for pair in known for token_id in pair],
    )
