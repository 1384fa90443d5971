"""Decode steps on a GPU: each request has a row of arrays that live on the device, and a step is a captured graph.

A step of n rows runs in the smallest bucket of at least n rows. The rest is padded: a negative token, nobody's slot.
The graph reads token, position, slot and block table of each row, runs the model, chooses the next token, and writes
token and position back, so that the next step of the same requests needs nothing from the host. The host uploads the
arrays when other requests take the rows, and reads tokens.

Without graphs the same step runs eagerly, in the same buckets, with the same bits.

Legend: R rows of the largest bucket, B blocks of a table, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from ownpath.cache.layout import NOBODY, aligned_rows
from ownpath.cache.pools import CachePool, SequenceCache
from ownpath.cache.tables import DecodeTables, first_flagged, new_flags
from ownpath.config import EngineConfig
from ownpath.engine.request import SamplingParams
from ownpath.engine.sampler import SampleRow, sampled_views, sampler_of
from ownpath.kernels.dsl.compilations import COMPILATIONS
from ownpath.kernels.registry import spec_of
from ownpath.kernels.sample.types import FilterRows, Sampled, SampleRows
from ownpath.terminal.console import tell
from ownpath.terminal.progress import Progress
from ownpath.trace import Ledger
from ownpath.trace.ledger import CapturedCalls

PADDED = -1
"""The token id of a padded row."""
NUM_SAMPLED = len(Sampled._fields)
"""Rows of a step's results that the sampler writes."""
_PADDED_INTEGERS = np.array([[PADDED], [NOBODY], [0], [0], [0], [-1]])
_PADDED_FLOATS = np.array([[0.0], [1.0]])
"""A padded row's token, position, slot and number of drawn tokens; its temperature and top_p."""
GREEDY = SampleRow(SamplingParams(1, temperature=0.0), seed=0, num_drawn=0)
"""Takes the likeliest token."""
BUCKETS = (*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)


class DecodingModel(Protocol):
    """The model as a decoder uses it."""

    @property
    def caches(self) -> CachePool: ...

    @property
    def ledger(self) -> Ledger: ...

    @property
    def decodes(self) -> bool: ...

    def decode(self, token_ids_T: torch.Tensor, tables: DecodeTables) -> torch.Tensor: ...


class DecodeRow(NamedTuple):
    """One request's share of a step: its cache, the token at the position where the cache ends, and how the next one
    is drawn."""

    cache: SequenceCache
    token_id: int
    sample: SampleRow = GREEDY


class StepTokens(NamedTuple):
    """A step's results. token_ids: the token drawn for each row; ``None`` where a logit is not finite. flagged: rows
    whose index scores are not finite, with the first such layer.

    Valid until the next step: logits_TV; logprobs_T, of the tokens by their raw logits, on the host.
    """

    logits_TV: torch.Tensor
    token_ids: list[int | None]
    logprobs_T: "npt.NDArray[np.float32]"
    flagged: dict[int, int]


class _RowArrays:
    """The rows' arrays in one buffer of int32: seeds (two words a row), tokens, slots, positions, numbers of drawn
    tokens, steps (1 for a row, 0 where padded), pads (0 for a row, -1 where padded), temperatures, top_p [R]; block
    tables [R, B].

    ``upload`` writes them in host memory and transfers them. It touches only block tables that change: with a context
    of a million tokens a table has 4,096 words, and a request keeps it for life.
    """

    WORDS = 10

    def __init__(self, max_rows: int, num_blocks: int, device: torch.device) -> None:
        num_rows = aligned_rows(max_rows)
        size = num_rows * (self.WORDS + num_blocks)
        self._host = torch.zeros(size, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._device = torch.zeros(size, dtype=torch.int32, device=device)
        heads = self._host.numpy()[: self.WORDS * num_rows].reshape(self.WORDS, num_rows)
        self._seeds = heads[:2].reshape(-1).view(np.int64)
        self._integers, self._floats = heads[2:8], heads[8:].view(np.float32)
        self._host_blocks = _Columns.of(self._host, num_rows).blocks
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

    def upload(self, rows: Sequence[DecodeRow]) -> None:
        """Writes these rows, and pads the others."""
        count = len(rows)
        self._integers[:, count:], self._floats[:, count:] = _PADDED_INTEGERS, _PADDED_FLOATS
        if rows:
            caches, tokens, samples = zip(*rows, strict=True)
            positions, slots = [cache.num_tokens for cache in caches], [cache.slot for cache in caches]
            drawn = [sample.num_drawn for sample in samples]
            self._integers[:, :count] = (tokens, slots, positions, drawn, [1] * count, [0] * count)
            params = [sample.params for sample in samples]
            self._floats[:, :count] = ([one.temperature for one in params], [one.top_p for one in params])
            self._seeds[:count] = [sample.seed for sample in samples]
        num_heads = self.WORDS * len(self._held)
        self._device[:num_heads].copy_(self._host[:num_heads], non_blocking=True)
        self._upload_blocks([row.cache.blocks for row in rows])

    def _upload_blocks(self, tables: Sequence[tuple[int, ...]]) -> None:
        """Transfers the rows' block tables from the first that changed to the last."""
        wanted = [*tables, *[None] * (len(self._held) - len(tables))]
        pairs = enumerate(zip(wanted, self._held, strict=True))
        changed = [row for row, (new, old) in pairs if new is not old and new != old]
        if not changed:
            return
        for row in changed:
            self._host_blocks[row] = NOBODY if (table := wanted[row]) is None else torch.tensor(table)
        self._held = wanted
        some = slice(changed[0], changed[-1] + 1)
        self.columns.blocks[some].copy_(self._host_blocks[some], non_blocking=True)


class _Columns(NamedTuple):
    """Views of the buffer of ``_RowArrays``. top_k, min_p: zeros, for filters that no request sets yet. counts:
    positions and drawn [2, R], which a step counts up by ``steps``."""

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
        heads = buffer[: _RowArrays.WORDS * num_rows].view(_RowArrays.WORDS, num_rows)
        seeds, (temperatures, top_p) = heads[:2].flatten().view(torch.int64), heads[8:].view(torch.float32)
        tokens, slots, positions, drawn, steps, pads = heads[2:8]
        blocks = buffer[_RowArrays.WORDS * num_rows :].view(num_rows, -1)
        top_k = torch.zeros(num_rows, dtype=torch.int32, device=buffer.device)
        min_p = top_k.view(torch.float32)
        counts = heads[4:6]
        return cls(
            seeds, tokens, slots, positions, drawn, steps, pads, temperatures, top_p, blocks, top_k, min_p, counts
        )


_DrawState = tuple[int, int, SamplingParams]
_Resident = tuple[int, tuple[int, ...], int, int, _DrawState | None]
"""A row as the device holds it: slot, blocks, position, token; number of drawn tokens, seed and parameters, if they
matter."""


def _state_of(row: DecodeRow) -> _Resident:
    cache, sample = row.cache, row.sample
    draw = None if sample.params.greedy else (sample.num_drawn, sample.seed, sample.params)
    return cache.slot, cache.blocks, cache.num_tokens, row.token_id, draw


@dataclass(frozen=True)
class _Captured:
    """A bucket's graph, its logits, and the calls that a replay makes."""

    graph: torch.cuda.CUDAGraph
    logits_TV: torch.Tensor
    calls: CapturedCalls


class _Results:
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


class Decoder:
    """Runs decode steps of up to ``max_rows`` requests. num_vocab: ids below it are tokens."""

    def __init__(self, model: DecodingModel, max_rows: int, num_vocab: int) -> None:
        self._model, self._num_vocab = model, num_vocab
        self.pool, device = model.caches, model.caches.spec.device
        self.buckets = (*(size for size in BUCKETS if size < max_rows), max_rows)
        self._rows = _RowArrays(max_rows, self.pool.blocks_per_sequence, device)
        self._sampler, self._sampler_operand = sampler_of(device)
        self._results = _Results(self.pool, max_rows)
        self._resident: list[_Resident] = []
        self._graphs: dict[int, _Captured] = {}
        self.num_replays = 0
        """Steps that a graph ran."""

    def capture(self, progress: Callable[[int, int, str], None]) -> None:
        """Captures every bucket, the largest first, so that the others fit its memory. Call once, before any step.

        Each bucket first runs eagerly, so that nothing compiles while a graph is captured.
        """
        self._rows.upload(())
        memory = torch.cuda.graph_pool_handle()
        for done, count in enumerate(reversed(self.buckets)):
            progress(done, len(self.buckets), f"{count} rows")
            self._graphs[count] = self._capture(count, memory)

    def warm_up(self, progress: Callable[[int, int, str], None]) -> None:
        """Runs every bucket once, so that no later step compiles anything. Call once, before any step; not needed
        where buckets are captured."""
        self._rows.upload(())
        for done, count in enumerate(self.buckets):
            progress(done, len(self.buckets), f"{count} rows")
            with self._model.ledger.counting_apart():
                self.run(count)

    def _capture(self, count: int, memory: Any) -> _Captured:
        with self._model.ledger.counting_apart():
            self.run(count)
        torch.cuda.synchronize(self.pool.spec.device)
        graph = torch.cuda.CUDAGraph()
        with self._model.ledger.counting_apart() as calls, torch.cuda.graph(graph, pool=memory):
            logits_TV = self.run(count)
        COMPILATIONS.num_captured += 1
        return _Captured(graph, logits_TV, self._model.ledger.captured(calls))

    def step(self, rows: Sequence[DecodeRow]) -> StepTokens:
        """Runs a step of at least one row and extends the rows' caches by one token."""
        count = next(size for size in self.buckets if size >= len(rows))
        wanted = [_state_of(row) for row in rows]
        if wanted != self._resident:
            self._rows.upload(rows)
        self._resident = []  # until the step has ended: one that fails leaves rows that nobody knows
        logits_TV = self.launch(count)
        self._results.copy()
        for row in rows:
            row.cache.num_tokens += 1
        self._results.wait()
        tokens, results = self._results.read(logits_TV[: len(rows)])
        self._resident = [
            (slot, blocks, at + 1, token, draw and (draw[0] + 1, *draw[1:]))
            for (slot, blocks, at, _, draw), token in zip(wanted, tokens, strict=True)
        ]
        return results

    def upload(self, rows: Sequence[DecodeRow]) -> None:
        """Uploads rows for ``launch`` and ``run``, whatever the device holds."""
        self._resident = []
        self._rows.upload(rows)

    def launch(self, count: int) -> torch.Tensor:
        """Replays the graph of a bucket, or runs it eagerly where there is none; returns the logits. Does not wait."""
        captured = self._graphs.get(count)
        if captured is None:
            return self.run(count)
        captured.graph.replay()
        self.num_replays += 1
        captured.calls.num_replays += 1
        return captured.logits_TV

    def run(self, count: int) -> torch.Tensor:
        """Runs the first ``count`` rows eagerly: the model, a token for each, and the arrays for the next step."""
        tokens_T = self._rows.columns.tokens[:count]
        tables = self._rows.tables(self.pool, count, self._results.flags(count))
        logits_TV = self._model.decode(tokens_T, tables)[:, : self._num_vocab]
        found = self._results.sampled(count)
        self._sampler.run(logits_TV.float(), self._rows.sample_rows(count), self._sampler_operand, out=found)
        columns = self._rows.columns
        columns.counts[:, :count].add_(columns.steps[:count])
        torch.bitwise_or(found.token_T, columns.pads[:count], out=tokens_T)  # -1 where a row is padded
        return logits_TV


def no_graph_of(ledger: Ledger) -> str | None:
    """Returns the first planned slot that no graph can hold, in words; ``None`` if there is none."""
    for slot, (_, kernels) in ledger.kernels.items():
        held = [name for name in kernels.split("+") if spec_of(name).reads_host]
        if held:
            return f"{slot} runs on {held[0]}, which waits for values on the host"
    return None


def make_decoder(model: DecodingModel, engine: EngineConfig, num_vocab: int) -> Decoder | None:
    """Makes the decoder of a model on a GPU and captures its graphs if the engine wants them; else runs every bucket.

    ``None`` on a CPU, and where no decode step is planned. Says why there are no graphs where a kernel rules them out.
    """
    if torch.device(engine.device).type != "cuda" or not model.decodes:
        return None
    decoder = Decoder(model, engine.max_num_seqs, num_vocab)
    without = no_graph_of(model.ledger)
    if engine.graphs and without is not None:
        tell("decode steps run without graphs", f": {without}")
    captures = engine.graphs and without is None
    with Progress("capturing graphs" if captures else "warming up decode steps") as progress, torch.inference_mode():
        (decoder.capture if captures else decoder.warm_up)(progress)
    return decoder
