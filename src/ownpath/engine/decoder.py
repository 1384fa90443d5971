"""Decode steps on a GPU: each request has a row of arrays that live on the device, and a step is a captured graph.

A step of n rows runs in the smallest bucket of at least n rows. The rest is padded: a negative token, nobody's slot.
The graph reads token, position, slot and block table of each row, runs the model, chooses the next token, and writes
token and position back, so that the next step of the same requests needs nothing from the host. The host uploads the
arrays when other requests take the rows, and reads tokens.

Without graphs the same step runs eagerly, in the same buckets, with the same bits.

Legend: T rows of a step, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ownpath.cache.layout import BLOCK_TOKENS
from ownpath.cache.pools import CachePool
from ownpath.cache.tables import DecodeTables
from ownpath.config import EngineConfig
from ownpath.engine.adjust import AdjustedRows
from ownpath.engine.rows import NO_ROWS, ResidentRows, RowArrays, StepResults, StepRows, StepTokens
from ownpath.engine.sampler import draw_adjusted, sampler_of
from ownpath.kernels.dsl.compilations import COMPILATIONS
from ownpath.kernels.registry import spec_of
from ownpath.terminal.console import tell
from ownpath.terminal.progress import Progress
from ownpath.trace import Ledger
from ownpath.trace.ledger import CapturedCalls

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


@dataclass(frozen=True)
class _Captured:
    """A bucket's graph, its logits, and the calls that a replay makes."""

    graph: torch.cuda.CUDAGraph
    logits_TV: torch.Tensor
    calls: CapturedCalls


class Decoder:
    """Runs decode steps of up to ``max_rows`` requests. num_vocab: ids below it are tokens."""

    def __init__(self, model: DecodingModel, max_rows: int, num_vocab: int) -> None:
        self._model, self._num_vocab = model, num_vocab
        self.pool, device = model.caches, model.caches.spec.device
        self.buckets = (*(size for size in BUCKETS if size < max_rows), max_rows)
        self._rows = RowArrays(max_rows, self.pool.blocks_per_sequence, device)
        self._sampler, self._sampler_operand = sampler_of(device)
        self._results = StepResults(self.pool, max_rows)
        self._resident: ResidentRows | None = None
        self._graphs: dict[int, _Captured] = {}
        self.num_replays = 0
        """Steps that a graph ran."""

    def capture(self, progress: Callable[[int, int, str], None]) -> None:
        """Captures every bucket, the largest first, so that the others fit its memory. Call once, before any step.

        Each bucket first runs eagerly, so that nothing compiles while a graph is captured.
        """
        self._rows.upload(NO_ROWS)
        memory = torch.cuda.graph_pool_handle()
        for done, count in enumerate(reversed(self.buckets)):
            progress(done, len(self.buckets), f"{count} rows")
            self._graphs[count] = self._capture(count, memory)

    def warm_up(self, progress: Callable[[int, int, str], None]) -> None:
        """Runs every bucket once, so that no later step compiles anything. Call once, before any step; not needed
        where buckets are captured."""
        self._rows.upload(NO_ROWS)
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

    def step(self, rows: StepRows, adjusted: AdjustedRows | None = None) -> StepTokens:
        """Runs a step of at least one row and extends the rows' caches by one token.

        adjusted: rows that are drawn again, behind the graph and before anything reads their tokens.
        """
        num_rows, lengths = rows.num_rows, self.pool.slots.lengths
        count = next(size for size in self.buckets if size >= num_rows)
        slots = [cache.slot for cache in rows.caches]
        blocks, positions = [cache.blocks for cache in rows.caches], [lengths[slot] for slot in slots]
        assert all(at < BLOCK_TOKENS * len(own) for at, own in zip(positions, blocks, strict=True)), "a row has no room"
        wanted = ResidentRows(slots, positions, *rows[1:])
        if wanted.continues(self._resident):
            self._rows.upload_blocks(blocks)
        else:
            self._rows.upload(rows)
        self._resident = None  # until the step has ended: one that fails leaves rows that nobody knows
        logits_TV = self.launch(count)
        if adjusted is not None:
            tokens_S = draw_adjusted(logits_TV, adjusted, self._results.on_device)
            self._rows.columns.tokens.index_copy_(0, adjusted.where_S, tokens_S)
        self._results.copy()
        for slot, position in zip(slots, positions, strict=True):
            lengths[slot] = position + 1
        self._results.wait()
        tokens, results = self._results.read(logits_TV[:num_rows])
        self._resident = wanted.advanced(tokens)
        return results

    def upload(self, rows: StepRows) -> None:
        """Uploads rows for ``launch`` and ``run``, whatever the device holds."""
        self._resident = None
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
