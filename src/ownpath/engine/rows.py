"""The rows of decode steps: what a step is given, as the device holds it, and what it returns.

Legend: R rows of the largest bucket, B blocks of a table, L layers, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ownpath.cache.layout import NOBODY, aligned_rows
from ownpath.cache.pools import CachePool, SequenceCache
from ownpath.cache.tables import DecodeTables, first_flagged, new_flags
from ownpath.engine.request import Request, SamplingParams
from ownpath.engine.sampler import NUM_SAMPLED, SampleRow, sampled_views
from ownpath.kernels.sample.types import FilterRows, Sampled, SampleRows

PADDED = -1
"""The token id of a padded row."""
_PADDED_INTEGERS = np.array([[PADDED], [NOBODY], [0], [0], [0], [-1], [0]])
_PADDED_FLOATS = np.array([[0.0], [1.0], [0.0]])
"""A padded row's token, slot, position, drawn tokens, step, pad and top_k; its temperature, top_p and min_p."""
GREEDY = SampleRow(SamplingParams(1, temperature=0.0), seed=0, num_drawn=0)
"""Takes the likeliest token."""


class DecodeRow(NamedTuple):
    """One request's share of a step: its cache, the token at the position where the cache ends, and how the next one
    is drawn."""

    cache: SequenceCache
    token_id: int
    sample: SampleRow = GREEDY


class StepRows(NamedTuple):
    """The rows of a step in columns: a list of one row's part each, which costs the host less than objects do."""

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


class StepTokens(NamedTuple):
    """A step's results. token_ids: the token drawn for each row; ``None`` where a logit is not finite. flagged: rows
    whose index scores are not finite, with the first such layer.

    Valid until the next step: logits_TV; logprobs_T, of the tokens by their raw logits, on the host.
    """

    logits_TV: torch.Tensor
    token_ids: list[int | None]
    logprobs_T: "npt.NDArray[np.float32]"
    flagged: dict[int, int]


NO_ROWS = StepRows.of(())


def step_rows(requests: Sequence[Request]) -> StepRows:
    """Returns the rows of requests that each run their next token."""
    return StepRows(
        [one.caches for one in requests],
        [one.output_ids[-1] if one.output_ids else one.next_id for one in requests],
        [one.params for one in requests],
        [one.seed for one in requests],
        [len(one.output_ids) for one in requests],
    )


class RowArrays:
    """The rows' arrays in one buffer of int32: seeds (two words a row), tokens, slots, positions, numbers of drawn
    tokens, steps (1 for a row, 0 where padded), pads (0 for a row, -1 where padded), top_k, temperatures, top_p, min_p
    [R]; block tables [R, B].

    ``upload`` writes them in host memory and transfers them. Block tables go apart from the rest, and only those that
    change: with a context of a million tokens a table has 4,096 words, and a request changes it once in 256 tokens.
    """

    WORDS = 12

    def __init__(self, max_rows: int, num_blocks: int, device: torch.device) -> None:
        num_rows = aligned_rows(max_rows)
        size = num_rows * (self.WORDS + num_blocks)
        self._host = torch.zeros(size, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._device = torch.zeros(size, dtype=torch.int32, device=device)
        heads = self._host.numpy()[: self.WORDS * num_rows].reshape(self.WORDS, num_rows)
        self._seeds = heads[:2].reshape(-1).view(np.int64)
        self._integers, self._floats = heads[2:9], heads[9:].view(np.float32)
        self._host_blocks = _Columns.of(self._host, num_rows).blocks
        self._held: list[tuple[int, ...]] = [()] * num_rows
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

    def upload(self, rows: StepRows) -> None:
        """Writes these rows, and pads the others."""
        caches, tokens, params, seeds, drawn = rows
        count = rows.num_rows
        self._integers[:, count:], self._floats[:, count:] = _PADDED_INTEGERS, _PADDED_FLOATS
        if count:
            positions, slots = [cache.num_tokens for cache in caches], [cache.slot for cache in caches]
            top_k = [one.top_k for one in params]
            self._integers[:, :count] = (tokens, slots, positions, drawn, [1] * count, [0] * count, top_k)
            temperatures, top_p = [one.temperature for one in params], [one.top_p for one in params]
            self._floats[:, :count] = (temperatures, top_p, [one.min_p for one in params])
            self._seeds[:count] = seeds
        num_heads = self.WORDS * len(self._held)
        self._device[:num_heads].copy_(self._host[:num_heads], non_blocking=True)
        self.upload_blocks([cache.blocks for cache in caches])

    def upload_blocks(self, tables: Sequence[tuple[int, ...]]) -> None:
        """Transfers the block tables that changed, of these rows; all others become nobody's."""
        wanted = [*tables, *[()] * (len(self._held) - len(tables))]
        pairs = enumerate(zip(wanted, self._held, strict=True))
        changed = [row for row, (new, old) in pairs if new is not old and new != old]
        if not changed:
            return
        for row in changed:
            table = wanted[row]
            self._host_blocks[row, : len(table)] = torch.tensor(table, dtype=torch.int32)
            self._host_blocks[row, len(table) :] = NOBODY
        self._held = wanted
        for some in _runs(changed):
            self.columns.blocks[some].copy_(self._host_blocks[some], non_blocking=True)


def _runs(rows: Sequence[int]) -> Iterator[slice]:
    """Yields ascending numbers as slices, one for those that follow each other."""
    for _, pairs in groupby(enumerate(rows), lambda pair: pair[1] - pair[0]):
        run = [row for _, row in pairs]
        yield slice(run[0], run[-1] + 1)


class _Columns(NamedTuple):
    """Views of the buffer of ``RowArrays``. counts: positions and drawn [2, R], which a step counts up by ``steps``."""

    seeds: torch.Tensor
    tokens: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    drawn: torch.Tensor
    steps: torch.Tensor
    pads: torch.Tensor
    temperatures: torch.Tensor
    top_p: torch.Tensor
    blocks: torch.Tensor
    top_k: torch.Tensor
    min_p: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def of(cls, buffer: torch.Tensor, num_rows: int) -> "_Columns":
        heads = buffer[: RowArrays.WORDS * num_rows].view(RowArrays.WORDS, num_rows)
        seeds, (temperatures, top_p, min_p) = heads[:2].flatten().view(torch.int64), heads[9:].view(torch.float32)
        tokens, slots, positions, drawn, steps, pads, top_k = heads[2:9]
        blocks = buffer[RowArrays.WORDS * num_rows :].view(num_rows, -1)
        counts = heads[4:6]
        return cls(
            seeds, tokens, slots, positions, drawn, steps, pads, temperatures, top_p, blocks, top_k, min_p, counts
        )


class ResidentRows(NamedTuple):
    """Rows as the device holds them, in columns, but for their block tables."""

    slots: list[int]
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

    def advanced(self, token_ids: list[int]) -> "ResidentRows":
        """Returns the rows after a step that has chosen these tokens."""
        ahead = [position + 1 for position in self.positions]
        drawn = [count + 1 for count in self.num_drawn]
        return self._replace(positions=ahead, token_ids=token_ids, num_drawn=drawn)


class StepResults:
    """The results of a step that the host reads, in one copy of int32 [3 + L, R]: the sampler's tokens, faults and
    log-probs, then the flags of each layer's index scores, 0 where a layer has none."""

    def __init__(self, pool: CachePool, max_rows: int) -> None:
        device, flags_LT = pool.spec.device, new_flags(pool, max_rows)
        shape = NUM_SAMPLED + len(flags_LT), aligned_rows(max_rows)
        self.on_device = torch.zeros(shape, dtype=torch.int32, device=device)
        self._read = torch.zeros(shape, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._integers = self._read.numpy()
        self._logprobs = self._integers[2].view(np.float32)

    def sampled(self, count: int) -> Sampled:
        """Returns where the sampler writes."""
        return sampled_views(self.on_device, count)

    def flags(self, count: int) -> torch.Tensor:
        """Returns where selections write: int32 [L, count]."""
        return self.on_device[NUM_SAMPLED:, :count]

    def copy(self) -> None:
        """Copies all to the host. Does not wait."""
        self._read.copy_(self.on_device, non_blocking=True)

    def wait(self) -> None:
        """Waits for the copy."""
        if self._read.is_pinned():
            torch.cuda.current_stream(self.on_device.device).synchronize()

    def read(self, logits_TV: torch.Tensor) -> tuple[list[int], StepTokens]:
        """Returns the tokens that the device goes on with, and the results of as many rows as there are logits."""
        count = len(logits_TV)
        tokens, faults = self._integers[:2, :count].tolist()
        kept = [None if fault else token for token, fault in zip(tokens, faults, strict=True)]
        flagged = first_flagged(self._integers[NUM_SAMPLED:, :count])
        return tokens, StepTokens(logits_TV, kept, self._logprobs, flagged)
