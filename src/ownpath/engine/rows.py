"""The rows of decode steps: what a step is given, as the device holds it, and what it returns.

Legend: R rows of the largest bucket, B blocks of a table, L layers, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from operator import sub
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ownpath.cache.layout import BLOCK_TOKENS, NOBODY, aligned_rows
from ownpath.cache.pools import CachePool, PlacedSequence, SequenceCache
from ownpath.cache.tables import DecodeTables, first_flagged, new_flags
from ownpath.engine.request import SamplingParams
from ownpath.engine.sampler import NUM_SAMPLED, SampleRow, sampled_views
from ownpath.engine.tops import Top
from ownpath.kernels.sample.types import FilterRows, NextStep, Sampled, SampleRows

NUM_TURNS = 2
"""Steps that may be under way at a time: each has buffers of its own on the host."""
PADDED = -1
"""The token id of a padded row."""
_PADDED_INTEGERS = np.array([[PADDED], [NOBODY], [0], [0], [0], [-1], [0], [0], [0], [PADDED]])
_PADDED_FLOATS = np.array([[0.0], [1.0], [0.0]])
"""A padded row's token, slot, position, drawn tokens, turn, pad, top_k, source, carry and known token; its temperature,
top_p and min_p."""
GREEDY = SampleRow(SamplingParams(1, temperature=0.0), seed=0, num_drawn=0)
"""Takes the likeliest token."""


def unread(row: int) -> int:
    """Names the token that a row of the step before draws, while nobody has read it: it stands where the token's id
    would, and is negative. Naming a row twice gives the row."""
    return PADDED - 1 - row


class DecodeRow(NamedTuple):
    """One request's share of a step: its cache, the token at the position where the cache ends, and how the next one
    is drawn."""

    cache: SequenceCache
    token_id: int
    sample: SampleRow = GREEDY


class StepRows(NamedTuple):
    """The rows of a step in columns: a list of one row's part each, which costs the host less than objects do.

    token_ids: ids, or names of tokens that are still to be read (``unread``).
    """

    caches: list[SequenceCache]
    token_ids: list[int]
    params: list[SamplingParams]
    seeds: list[int]
    num_drawn: list[int]

    @classmethod
    def of(cls, rows: Sequence[DecodeRow]) -> "StepRows":
        """Puts rows into columns."""
        samples = [row.sample for row in rows]
        return cls(
            [row.cache for row in rows],
            [row.token_id for row in rows],
            [sample.params for sample in samples],
            [sample.seed for sample in samples],
            [sample.num_drawn for sample in samples],
        )

    @property
    def num_rows(self) -> int:
        """The number of rows."""
        return len(self.caches)


class GroupedRows(NamedTuple):
    """The rows of a step of which some requests have several, in columns as ``StepRows``. caches: where each row
    lies, and how many tokens are before it. known: the token that follows each row, -1 where it is to be drawn."""

    caches: list[PlacedSequence]
    token_ids: list[int]
    params: list[SamplingParams]
    seeds: list[int]
    num_drawn: list[int]
    known: list[int]

    @property
    def num_rows(self) -> int:
        """The number of rows."""
        return len(self.caches)


class StepTokens(NamedTuple):
    """A step's results. token_ids: the token drawn for each row; ``None`` where a logit is not finite. flagged: rows
    whose index scores are not finite, with the first such layer. tops: the likeliest tokens of rows that want some.

    Valid until the next step begins: logits_TV. Until the one after it begins: logprobs_T, of the tokens by their raw
    logits, on the host.
    """

    logits_TV: torch.Tensor
    token_ids: list[int | None]
    logprobs_T: "npt.NDArray[np.float32]"
    flagged: dict[int, int]
    tops: Mapping[int, Top] = MappingProxyType({})


NO_ROWS = StepRows.of(())


class Staged(NamedTuple):
    """Rows in host memory, ready to be sent. turn: the buffer they are in. blocks: the first and last row whose block
    tables change; ``None``: none does."""

    turn: int
    blocks: slice | None


class RowArrays:
    """The rows' arrays in one buffer of int32: seeds (two words a row), tokens, slots, positions, numbers of drawn
    tokens, turns (whose copy of the results the step writes), pads (0 for a row, -1 where padded), top_k, sources (the
    row of the step before whose token a row goes on with) and carries (1 where it does, 0 where the host knows the
    token), known tokens behind rows of drafts, temperatures, top_p, min_p [R]; block tables [R, B].

    ``stage`` writes them in host memory, one of two buffers in turn, as the other may still be on its way. ``send``
    transfers them. Both touch only block tables that change: with a context of a million tokens a table has 4,096
    words, and a request changes it once in 256 tokens.
    """

    WORDS = 15

    def __init__(self, max_rows: int, num_blocks: int, device: torch.device) -> None:
        num_rows = aligned_rows(max_rows)
        size = num_rows * (self.WORDS + num_blocks)
        self._hosts = [_HostArrays.of(num_rows, size, device) for _ in range(NUM_TURNS)]
        self._device = torch.zeros(size, dtype=torch.int32, device=device)
        self._held: list[tuple[int, ...] | None] = [None] * num_rows
        self.columns = _Columns.of(self._device, num_rows)

    def tables(self, pool: CachePool, count: int, flags_LT: torch.Tensor | None = None) -> DecodeTables:
        """Returns the step's tables of the first ``count`` rows, as views."""
        columns = self.columns
        arrays = (columns.positions[:count], columns.slots[:count], columns.blocks[:count])
        return DecodeTables(pool, *arrays, flags_LT)

    def sample_rows(self, count: int) -> SampleRows:
        """Returns the parameters of the first ``count`` rows, as views."""
        columns = self.columns
        filters = FilterRows(columns.top_k[:count], columns.top_p[:count], columns.min_p[:count])
        return SampleRows(columns.temperatures[:count], columns.seeds[:count], columns.drawn[:count], filters)

    def stage(
        self,
        rows: StepRows | GroupedRows,
        turn: int,
        places: Sequence[int] | None = None,
        places_before: Sequence[int] | None = None,
    ) -> Staged:
        """Writes these rows into a buffer that nothing reads any more, and pads the others. turn: the step's. places:
        of the rows, and of those of the step before; ``None``: they are the first ones, in order."""
        caches, tokens, params, seeds, drawn = rows[:5]
        known = rows.known if isinstance(rows, GroupedRows) else PADDED
        count, host = rows.num_rows, self._hosts[turn]
        at = slice(count) if places is None else np.array(places)
        host.integers[:], host.floats[:] = _PADDED_INTEGERS, _PADDED_FLOATS
        host.integers[4] = turn
        if count:
            named = np.array(tokens)
            sources = np.maximum(PADDED - 1 - named, 0)
            if places_before is not None:
                sources = np.array(places_before)[sources]
            columns = (
                *(np.maximum(named, 0), [cache.slot for cache in caches], [cache.num_tokens for cache in caches]),
                *(drawn, turn, 0, [one.top_k for one in params], sources, named < PADDED),
                known,
            )
            for integers, values in zip(host.integers, columns, strict=True):
                integers[at] = values
            host.floats[:, at] = np.array([(one.temperature, one.top_p, one.min_p) for one in params]).T
            host.seeds[at] = seeds
        return Staged(turn, self._stage_blocks([cache.blocks for cache in caches], host, places))

    def send(self, staged: Staged, drawn_R: torch.Tensor) -> None:
        """Transfers staged rows, and takes the tokens that only the device knows from those drawn last. Does not
        wait. Shapes: drawn_R int32 [R]."""
        buffer, num_heads = self._hosts[staged.turn].buffer, self.WORDS * len(self._held)
        self._device[:num_heads].copy_(buffer[:num_heads], non_blocking=True)
        if (some := staged.blocks) is not None:
            self.columns.blocks[some].copy_(self._hosts[staged.turn].blocks[some], non_blocking=True)
        columns = self.columns
        columns.tokens.addcmul_(drawn_R.index_select(0, columns.sources), columns.carries)

    def copied(self, staged: Staged) -> bytes:
        """Returns what ``send`` transfers, for ``paste`` of another rank."""
        host, num_heads = self._hosts[staged.turn], self.WORDS * len(self._held)
        blocks = b"" if staged.blocks is None else host.tables[staged.blocks].tobytes()
        return host.buffer[:num_heads].numpy().tobytes() + blocks

    def paste(self, data: bytes, staged: Staged) -> Staged:
        """Writes what another rank has staged into a buffer that nothing reads any more."""
        host, num_heads = self._hosts[staged.turn], self.WORDS * len(self._held)
        words = np.frombuffer(data, np.int32)
        host.buffer.numpy()[:num_heads] = words[:num_heads]
        if staged.blocks is not None:
            host.tables[staged.blocks] = words[num_heads:].reshape(-1, host.tables.shape[1])
        return staged

    def forget(self) -> None:
        """Sends every block table with the next rows: nobody knows which have arrived."""
        self._held = [()] * len(self._held)

    def _stage_blocks(
        self, tables: Sequence[tuple[int, ...]], host: "_HostArrays", places: Sequence[int] | None
    ) -> slice | None:
        """Writes the rows' block tables from the first that changes on the device to the last."""
        wanted: list[tuple[int, ...] | None] = [None] * len(self._held)
        for place, own in zip(range(len(tables)) if places is None else places, tables, strict=True):
            wanted[place] = own
        pairs = enumerate(zip(wanted, self._held, strict=True))
        changed = [row for row, (new, old) in pairs if new is not old and new != old]
        if not changed:
            return None
        self._held, some = wanted, slice(changed[0], changed[-1] + 1)
        for row in range(some.start, some.stop):
            if (table := wanted[row]) != host.written[row]:
                num_blocks = 0 if table is None else len(table)
                host.tables[row, :num_blocks] = table or ()
                host.tables[row, num_blocks:] = NOBODY
                host.written[row] = table
        return some


class _HostArrays(NamedTuple):
    """One of the host's buffers of ``RowArrays``, and views of it. blocks, tables: its block tables, as torch and numpy
    have them. written: those that it holds."""

    buffer: torch.Tensor
    seeds: "npt.NDArray[np.int64]"
    integers: "npt.NDArray[np.int32]"
    floats: "npt.NDArray[np.float32]"
    blocks: torch.Tensor
    tables: "npt.NDArray[np.int32]"
    written: list[tuple[int, ...] | None]

    @classmethod
    def of(cls, num_rows: int, size: int, device: torch.device) -> "_HostArrays":
        buffer = torch.zeros(size, dtype=torch.int32, pin_memory=device.type == "cuda")
        heads = buffer.numpy()[: RowArrays.WORDS * num_rows].reshape(RowArrays.WORDS, num_rows)
        seeds, floats = heads[:2].reshape(-1).view(np.int64), heads[12:].view(np.float32)
        blocks = _Columns.of(buffer, num_rows).blocks
        return cls(buffer, seeds, heads[2:12], floats, blocks, blocks.numpy(), [None] * num_rows)


class _Columns(NamedTuple):
    """Views of the buffer of ``RowArrays``. counts: positions and drawn [2, R], which a step counts up. rows: tokens,
    slots and positions [3, R]. floats: temperatures, top_p and min_p [3, R]."""

    seeds: torch.Tensor
    tokens: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    drawn: torch.Tensor
    turns: torch.Tensor
    pads: torch.Tensor
    temperatures: torch.Tensor
    top_p: torch.Tensor
    blocks: torch.Tensor
    top_k: torch.Tensor
    min_p: torch.Tensor
    sources: torch.Tensor
    carries: torch.Tensor
    known: torch.Tensor
    counts: torch.Tensor
    floats: torch.Tensor
    rows: torch.Tensor

    @classmethod
    def of(cls, buffer: torch.Tensor, num_rows: int) -> "_Columns":
        heads = buffer[: RowArrays.WORDS * num_rows].view(RowArrays.WORDS, num_rows)
        seeds, floats = heads[:2].flatten().view(torch.int64), heads[12:].view(torch.float32)
        tokens, slots, positions, drawn, turns, pads, top_k, sources, carries, known = heads[2:12]
        temperatures, top_p, min_p = floats
        blocks = buffer[RowArrays.WORDS * num_rows :].view(num_rows, -1)
        return cls(
            *(seeds, tokens, slots, positions, drawn, turns, pads, temperatures, top_p),
            *(blocks, top_k, min_p, sources, carries, known),
            counts=heads[4:6],
            floats=floats,
            rows=heads[2:5],
        )


class ResidentRows(NamedTuple):
    """Rows as the device holds them, in columns. token_ids: as in ``StepRows``."""

    slots: list[int]
    blocks: list[tuple[int, ...]]
    positions: list[int]
    token_ids: list[int]
    params: list[SamplingParams]
    seeds: list[int]
    num_drawn: list[int]

    def continues(self, held: "ResidentRows | None") -> bool:
        """Returns True if ``held`` are the same rows. What only a drawing row reads may differ in others."""
        if held is None or self[:-2] != held[:-2]:
            return False
        ours, theirs = zip(*self[-2:], strict=True), zip(*held[-2:], strict=True)
        return self[-2:] == held[-2:] or all(
            one.greedy or own == other for one, own, other in zip(self.params, ours, theirs, strict=True)
        )


class HeldRows:
    """The rows that the device goes on with, step by step. caches: theirs. first: the rows of the first step.

    positions: of the next step. num_left: steps until the first row's memory is full. token_ids: what the last step
    drew; ``None``: nobody has read that yet.
    """

    def __init__(self, caches: Sequence[SequenceCache], first: ResidentRows) -> None:
        self.caches, self.first, self.positions = caches, first, first.positions
        most = caches[0].pool.spec.max_tokens
        ends = [min(BLOCK_TOKENS * len(blocks), most) for blocks in first.blocks]
        self.num_left = min(map(sub, ends, first.positions))
        self.token_ids: list[int] | None = None
        self._num_steps = 0

    def are_those_of(self, pool: CachePool) -> bool:
        """Returns True if the caches have the block tables and lengths that the device has."""
        lengths, owned, slots = pool.slots.lengths, pool.slots.owned, self.first.slots
        blocks = [*map(owned.get, slots)]
        return blocks == self.first.blocks and [*map(lengths.__getitem__, slots)] == self.positions

    def advance(self) -> None:
        """Notes that a step is launched."""
        self._num_steps, self.num_left, self.token_ids = self._num_steps + 1, self.num_left - 1, None
        self.positions = [position + 1 for position in self.positions]

    def rows(self) -> ResidentRows:
        """Returns the rows as the last step leaves them, with names of tokens that nobody has read."""
        names = [unread(row) for row in range(len(self.caches))] if self.token_ids is None else self.token_ids
        drawn = [count + self._num_steps for count in self.first.num_drawn]
        return self.first._replace(positions=self.positions, token_ids=names, num_drawn=drawn)


class StepResults:
    """The results of a step, int32 [3 + L, R]: the sampler's tokens, faults and log-probs, then the flags of each
    layer's index scores, 0 where a layer has none. The sampler writes them to the host's memory as well, to one of two
    copies in turn, as the host may still read one step's while the next one's arrive."""

    def __init__(self, pool: CachePool, max_rows: int) -> None:
        device, flags_LT = pool.spec.device, new_flags(pool, max_rows)
        shape = NUM_SAMPLED + len(flags_LT), aligned_rows(max_rows)
        self.on_device = torch.zeros(shape, dtype=torch.int32, device=device)
        self._shared = torch.zeros(NUM_TURNS, *shape, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._integers = self._shared.numpy()
        self._sampled: dict[int, Sampled] = {}
        self.drawn_R = self.on_device[0]
        """The tokens that the last step drew, int32 [R]."""

    def sampled(self, count: int) -> Sampled:
        """Returns where the sampler writes."""
        if count not in self._sampled:
            self._sampled[count] = sampled_views(self.on_device, count)
        return self._sampled[count]

    def flags(self, count: int) -> torch.Tensor:
        """Returns where selections write: int32 [L, count]."""
        return self.on_device[NUM_SAMPLED:, :count]

    def following(self, columns: "_Columns") -> NextStep:
        """Returns where the rows of a step go on."""
        return NextStep(columns.tokens, columns.pads, columns.counts, columns.turns, self.on_device, self._shared)

    def read(
        self, turn: int, count: int, logits_TV: torch.Tensor, places: Sequence[int] | None = None
    ) -> tuple[list[int], StepTokens]:
        """Returns the tokens that the device goes on with, and the results of so many rows. places: see
        ``RowArrays.stage``; logits stay where they are."""
        at = slice(count) if places is None else np.array(places)
        integers = self._integers[turn][:, at]
        tokens, faults = integers[:2].tolist()
        kept = (
            tokens
            if not any(faults)
            else [None if fault else token for token, fault in zip(tokens, faults, strict=True)]
        )
        flagged = first_flagged(integers[NUM_SAMPLED:])
        return tokens, StepTokens(logits_TV, kept, integers[2].view(np.float32), flagged)
