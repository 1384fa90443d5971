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
from typing import NamedTuple, Protocol

import numpy as np
import torch

from ownpath.cache.layout import BLOCK_TOKENS, aligned_rows
from ownpath.cache.pools import CachePool, PlacedSequence, SequenceCache
from ownpath.cache.tables import DecodeTables, first_flagged, new_flags
from ownpath.engine.decoder import NOTHING
from ownpath.engine.graphs import GraphModel, StepGraphs
from ownpath.engine.rows import NO_ROWS, NUM_TURNS, GroupedRows, RowArrays, Staged, StepRows
from ownpath.engine.sampler import NUM_SAMPLED, sampled_views, sampler_of
from ownpath.engine.tops import PendingTops, Top, read_tops, start_tops
from ownpath.kernels.sample.types import FilterRows, Sampled, SampleRows
from ownpath.model.model import Verified

ROWS = 2
"""Rows of a request: its last token, and one guess."""
MOST_AHEAD = ROWS * NUM_TURNS
"""Positions behind the last known one that launched steps may write."""
_ACCEPTED, _GUESSES, _FLAGS = NUM_SAMPLED, NUM_SAMPLED + 1, NUM_SAMPLED + 2
"""Rows of a step's results behind the sampler's: by request, whether its guess was right, and the next one; then the
flags of the layers, by row."""
AcceptGuesses = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


class VerifyingModel(GraphModel, Protocol):
    """The model as a step with drafts uses it."""

    def verify(self, token_ids_T: torch.Tensor, tables: DecodeTables) -> Verified: ...

    def guess(self, verified: Verified, next_ids_T: torch.Tensor, rows_R: torch.Tensor) -> torch.Tensor: ...


def accept_equal(drawn_R: torch.Tensor, guesses_R: torch.Tensor, out_R: torch.Tensor) -> None:
    """Accepts the guesses that are the tokens drawn: writes 1 or 0."""
    torch.eq(drawn_R, guesses_R, out=out_R)


class DraftedTokens(NamedTuple):
    """A step's results by request. token_ids: the tokens that count, one or two; ``None`` where a logit is not finite.
    logprobs: theirs. guesses: of the token behind them. flagged, tops: as of ``StepTokens``, by row; request r has
    rows 2 r and 2 r + 1."""

    token_ids: list[list[int | None]]
    logprobs: list[list[float]]
    guesses: list[int]
    flagged: dict[int, int]
    tops: Mapping[int, Top]


@dataclass
class HeldDrafts:
    """The requests that the device goes on with. positions: of each one's last token, as far as steps have been
    read."""

    caches: Sequence[SequenceCache]
    slots: list[int]
    blocks: list[tuple[int, ...]]
    positions: list[int]

    @classmethod
    def of(cls, caches: Sequence[SequenceCache]) -> "HeldDrafts":
        """Notes where caches end."""
        positions = [cache.num_tokens for cache in caches]
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
    """Runs steps with drafts of up to ``max_requests`` requests. judge: writes 1 for each guess that is accepted; any
    but ``accept_equal`` is for measuring, and gives wrong answers."""

    def __init__(
        self, model: VerifyingModel, max_requests: int, num_vocab: int, judge: AcceptGuesses = accept_equal
    ) -> None:
        super().__init__(model, max_requests, num_vocab)
        assert self.pool.spec.rows_per_request >= ROWS, "the rings of the caches have no spare rows"
        self._model, self._judge, device = model, judge, self.pool.spec.device
        self._rows = RowArrays(ROWS * max_requests, self.pool.blocks_per_sequence, device)
        self._sampler, self._sampler_operand = sampler_of(device)
        self._results = _Results(self.pool, max_requests)
        self._guessing = _GuessRows(max_requests, device)
        self._held: HeldDrafts | None = None

    def pad(self) -> None:
        """See ``StepGraphs``."""
        turn = self._take_turn()
        staged = self._rows.stage(NO_ROWS, turn)
        self._marks[turn] = self._enqueue(lambda: self._send(staged), turn)

    def warm_up_rest(self, logits_TV: torch.Tensor) -> None:
        """Does nothing: nothing else follows a step."""

    def begin(self, rows: StepRows, guesses: Sequence[int], tops: Mapping[int, int] = NOTHING) -> DraftBegun:
        """Launches a step of other requests, a row and a guess for each. Does not wait. No step may be unread.

        tops: row -> number of its likeliest tokens that the results are to have.
        """
        assert not self._num_unread, "what is unread decides where rows begin"
        self._held, turn = None, self._take_turn()
        staged = self._rows.stage(_in_pairs(rows, guesses, self.pool), turn)
        return self._begin(DraftBegun(HeldDrafts.of(rows.caches), turn, tops), staged)

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
        held, found = begun.held, self._results.read(begun.turn, len(begun.held.slots), tops)
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
        """Launches a step: upload, bucket, likeliest tokens, and the copy of its results."""
        if staged is not None:
            self._send(staged)
        logits_TV = self.launch(self._bucket_of(len(begun.held.slots)))
        if begun.num_tops:
            begun.tops = start_tops(logits_TV, begun.num_tops)
        self._results.send(begun.turn)

    def _send(self, staged: Staged) -> None:
        self._rows.send(staged, self._results.on_device[0])
        self._guessing.take(self._rows)

    def run(self, count: int) -> torch.Tensor:
        """See ``StepGraphs``. count: requests."""
        num_rows, columns, results = ROWS * count, self._rows.columns, self._results
        tokens_T, pads_T = columns.tokens[:num_rows], columns.pads[:num_rows]
        tokens_RG, pads_RG = tokens_T.view(count, ROWS), pads_T.view(count, ROWS)
        verified = self._model.verify(tokens_T, self._rows.tables(self.pool, num_rows, results.flags(num_rows)))
        logits_TV = verified.logits_TV[:, : self.num_vocab].float()
        drawn = sampled_views(results.on_device, num_rows)
        self._sampler.run(logits_TV, self._rows.sample_rows(num_rows), self._sampler_operand, out=drawn)
        accepted_R = results.on_device[_ACCEPTED, :count]
        self._judge(drawn.token_T.view(count, ROWS)[:, 0], tokens_RG[:, 1], accepted_R)
        moved_R = self._guessing.moved(accepted_R)
        next_ids_T = drawn.token_T | pads_T
        rows_R = self._guessing.first_rows[:count] + accepted_R
        guess_RV = self._model.guess(verified, next_ids_T, rows_R)[:, : self.num_vocab].float()
        guessed = self._guessing.sampled(results.on_device[_GUESSES, :count])
        self._sampler.run(guess_RV, self._guessing.sample_rows(count), self._sampler_operand, out=guessed)
        tokens_RG[:, 0] = next_ids_T.index_select(0, rows_R)
        torch.bitwise_or(guessed.token_T, pads_RG[:, 1], out=tokens_RG[:, 1])
        # Last: the module writes its keys at the positions of the step's rows.
        columns.counts[:, :num_rows].view(2, count, ROWS).add_(moved_R.unsqueeze(-1))
        return logits_TV


def _in_pairs(rows: StepRows, guesses: Sequence[int], pool: CachePool) -> GroupedRows:
    """Returns two rows for each: of its token, and of the guess behind it."""
    pairs = zip(rows.token_ids, guesses, strict=True)
    return GroupedRows(
        [
            PlacedSequence(pool, cache.slot, cache.blocks, cache.num_tokens + ahead)
            for cache in rows.caches
            for ahead in range(ROWS)
        ],
        [token_id for pair in pairs for token_id in pair],
        [one for one in rows.params for _ in range(ROWS)],
        [seed for seed in rows.seeds for _ in range(ROWS)],
        [count + ahead for count in rows.num_drawn for ahead in range(ROWS)],
    )


class _GuessRows:
    """The parameters by which guesses are drawn, of one upload. first_rows: those of the requests, int32 [R]."""

    def __init__(self, max_requests: int, device: torch.device) -> None:
        count = aligned_rows(max_requests)
        self.first_rows = torch.arange(count, dtype=torch.int32, device=device) * ROWS
        self._integers, self._floats = (
            torch.zeros(3, count, dtype=dtype, device=device) for dtype in (torch.int32, torch.float32)
        )
        self._seeds = torch.zeros(count, dtype=torch.int64, device=device)
        self._unread = torch.zeros(NUM_SAMPLED, count, dtype=torch.int32, device=device)
        self._max_requests = max_requests

    def take(self, rows: RowArrays) -> None:
        """Takes the parameters of each request's first row, which has just been sent."""
        columns, count = rows.columns, self._max_requests
        whole, some = (columns.pads, columns.drawn, columns.top_k), slice(0, ROWS * count, ROWS)
        for place, column in zip(self._integers, whole, strict=True):
            place[:count] = column[some]
        for place, column in zip(self._floats, (columns.temperatures, columns.top_p, columns.min_p), strict=True):
            place[:count] = column[some]
        self._seeds[:count] = columns.seeds[some]
        self._integers[0, :count] += 1  # 1 for a request, 0 where padded

    def moved(self, accepted_R: torch.Tensor) -> torch.Tensor:
        """Returns how many tokens count of each request, 0 where padded, and counts its drawn ones up by them."""
        count = len(accepted_R)
        are_there_R = self._integers[0, :count]
        moved_R = torch.addcmul(are_there_R, accepted_R, are_there_R)
        self._integers[1, :count] += moved_R
        return moved_R

    def sample_rows(self, count: int) -> SampleRows:
        """Returns how the guesses of the first requests are drawn: each as its target is in the next step."""
        _, drawn, top_k = self._integers[:, :count]
        temperatures, top_p, min_p = self._floats[:, :count]
        return SampleRows(temperatures, self._seeds[:count], drawn, FilterRows(top_k, top_p, min_p))

    def sampled(self, guesses_R: torch.Tensor) -> Sampled:
        """Returns where the sampler writes: the tokens there, and what nobody reads elsewhere."""
        return sampled_views(self._unread, len(guesses_R))._replace(token_T=guesses_R)


class _Results:
    """The results of a step, int32 [5 + L, T], on the device and in two copies that the host reads in turn."""

    def __init__(self, pool: CachePool, max_requests: int) -> None:
        device, num_rows = pool.spec.device, ROWS * max_requests
        shape = _FLAGS + len(new_flags(pool, num_rows)), aligned_rows(num_rows)
        self.on_device = torch.zeros(shape, dtype=torch.int32, device=device)
        self._shared = torch.zeros(NUM_TURNS, *shape, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._integers = self._shared.numpy()

    def flags(self, num_rows: int) -> torch.Tensor:
        """Returns where selections write: int32 [L, num_rows]."""
        return self.on_device[_FLAGS:, :num_rows]

    def send(self, turn: int) -> None:
        """Copies the results to the host. Does not wait."""
        self._shared[turn].copy_(self.on_device, non_blocking=True)

    def read(self, turn: int, count: int, tops: Mapping[int, Top]) -> DraftedTokens:
        """Returns the results of so many requests."""
        integers, num_rows = self._integers[turn], ROWS * count
        tokens, faults = integers[:2, :num_rows].reshape(2, count, ROWS).tolist()
        logprobs = integers[2, :num_rows].view(np.float32).reshape(count, ROWS).tolist()
        accepted, guesses = integers[_ACCEPTED : _GUESSES + 1, :count].tolist()
        kept = [
            [None if fault else token for token, fault in zip(*pair, strict=True)][: 1 + more]
            for *pair, more in zip(tokens, faults, accepted, strict=True)
        ]
        flagged = {
            row: layer_idx
            for row, layer_idx in first_flagged(integers[_FLAGS:, :num_rows]).items()
            if row % ROWS <= accepted[row // ROWS]
        }
        return DraftedTokens(kept, logprobs, guesses, flagged, tops)
