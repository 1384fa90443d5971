"""Decode steps on a GPU: each request has a row of arrays that live on the device, and a step is a captured graph.

A step of n rows runs in the smallest bucket of at least n rows. The rest is padded: a negative token, nobody's slot.
The graph reads token, position, slot and block table of each row, runs the model, chooses the next token, and writes
token and position back, so that the next step of the same requests needs nothing from the host. The host uploads the
arrays when other requests take the rows, and reads tokens.

Without graphs the same step runs eagerly, in the same buckets, with the same bits.

Legend: R rows of the largest bucket, B blocks of a table, V vocabulary.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from ownpath.cache.layout import NOBODY
from ownpath.cache.pools import CachePool, SequenceCache
from ownpath.cache.tables import DecodeTables
from ownpath.config import EngineConfig
from ownpath.terminal.progress import Progress
from ownpath.trace import Ledger

PADDED = -1
"""The token id of a padded row."""
BUCKETS = (*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)


class DecodingModel(Protocol):
    """The model as a decoder uses it."""

    @property
    def caches(self) -> CachePool: ...

    @property
    def ledger(self) -> Ledger: ...

    def decode(self, token_ids_T: torch.Tensor, tables: DecodeTables) -> torch.Tensor: ...


class DecodeRow(NamedTuple):
    """One request's share of a step: its cache, and the token at the position where the cache ends."""

    cache: SequenceCache
    token_id: int


class Decoded(NamedTuple):
    """A step's results. logits_TV: valid until the next step. token_ids: the likeliest token of each row; ``None``
    where a logit is not finite."""

    logits_TV: torch.Tensor
    token_ids: list[int | None]


class _RowArrays:
    """The rows' arrays in one buffer of int32: tokens [R], positions [R], slots [R], block tables [R, B].

    ``upload`` copies the host's values to the device in one transfer.
    """

    def __init__(self, num_rows: int, num_blocks: int, device: torch.device) -> None:
        self.num_rows, self.num_blocks = num_rows, num_blocks
        size = num_rows * (3 + num_blocks)
        self._host = torch.zeros(size, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._device = torch.zeros(size, dtype=torch.int32, device=device)
        self._values = self._host.numpy()

    def tokens(self, count: int) -> torch.Tensor:
        return self._device[:count]

    def tables(self, pool: CachePool, count: int) -> DecodeTables:
        """Returns the step's tables of the first ``count`` rows, as views."""
        positions, slots, blocks = (self._device[idx * self.num_rows :] for idx in (1, 2, 3))
        return DecodeTables(pool, positions[:count], slots[:count], blocks.view(self.num_rows, -1)[:count])

    def upload(self, rows: Sequence[DecodeRow]) -> None:
        """Writes these rows, and pads the others."""
        count, all_rows = len(rows), self.num_rows
        tokens, positions, slots = self._values[: 3 * all_rows].reshape(3, all_rows)
        blocks = self._values[3 * all_rows :].reshape(all_rows, self.num_blocks)
        tokens[count:], positions[count:], slots[count:], blocks[count:] = PADDED, 0, NOBODY, NOBODY
        for idx, (cache, token_id) in enumerate(rows):
            tokens[idx], positions[idx], slots[idx], blocks[idx] = token_id, cache.num_tokens, cache.slot, cache.blocks
        self._device.copy_(self._host, non_blocking=True)


@dataclass(frozen=True)
class _Captured:
    """A bucket's graph, its logits, and the calls that a replay makes."""

    graph: torch.cuda.CUDAGraph
    logits_TV: torch.Tensor
    calls: Counter[str]


class Decoder:
    """Runs decode steps of up to ``max_rows`` requests. num_vocab: ids below it are tokens."""

    def __init__(self, model: DecodingModel, max_rows: int, num_vocab: int) -> None:
        self._model, self._num_vocab = model, num_vocab
        self.pool, device = model.caches, model.caches.spec.device
        self.buckets = (*(size for size in BUCKETS if size < max_rows), max_rows)
        self._rows = _RowArrays(max_rows, self.pool.blocks_per_sequence, device)
        self._chosen = torch.zeros(2, max_rows, dtype=torch.int32, device=device)
        self._read = torch.zeros(2, max_rows, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._resident: list[tuple[int, int, int]] = []
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

    def _capture(self, count: int, memory: tuple[int, int]) -> _Captured:
        with self._model.ledger.counting_apart():
            self._run(count)
        torch.cuda.synchronize(self.pool.spec.device)
        graph = torch.cuda.CUDAGraph()
        with self._model.ledger.counting_apart() as calls, torch.cuda.graph(graph, pool=memory):
            logits_TV = self._run(count)
        return _Captured(graph, logits_TV, calls)

    def step(self, rows: Sequence[DecodeRow]) -> Decoded:
        """Runs a step of at least one row and extends the rows' caches by one token."""
        count = next(size for size in self.buckets if size >= len(rows))
        wanted = [(cache.slot, cache.num_tokens, token_id) for cache, token_id in rows]
        if wanted != self._resident:
            self._rows.upload(rows)
        captured = self._graphs.get(count)
        if captured is None:
            logits_TV = self._run(count)
        else:
            captured.graph.replay()
            logits_TV, self.num_replays = captured.logits_TV, self.num_replays + 1
            self._model.ledger.add(captured.calls)
        self._read.copy_(self._chosen, non_blocking=True)
        for cache, _ in rows:
            cache.num_tokens += 1
        if self._read.is_pinned():
            torch.cuda.current_stream(self.pool.spec.device).synchronize()
        tokens, finite = self._read[:, : len(rows)].tolist()
        self._resident = [(slot, at + 1, token) for (slot, at, _), token in zip(wanted, tokens, strict=True)]
        chosen = [token if is_finite else None for token, is_finite in zip(tokens, finite, strict=True)]
        return Decoded(logits_TV[: len(rows)], chosen)

    def _run(self, count: int) -> torch.Tensor:
        """Runs the model on the first ``count`` rows, chooses tokens, and makes the rows ready for the next step."""
        tokens_T, tables = self._rows.tokens(count), self._rows.tables(self.pool, count)
        logits_TV = self._model.decode(tokens_T, tables)[:, : self._num_vocab]
        best_T = logits_TV.argmax(dim=-1)
        self._chosen[0, :count] = best_T
        self._chosen[1, :count] = logits_TV.isfinite().all(dim=-1)
        is_row_T = tokens_T >= 0
        tables.positions_T.add_(is_row_T)
        tokens_T.copy_(torch.where(is_row_T, best_T, PADDED))
        return logits_TV


def make_decoder(model: DecodingModel, engine: EngineConfig, num_vocab: int) -> Decoder | None:
    """Makes the decoder of a model on a GPU and captures its graphs, if the engine wants them. ``None`` on a CPU."""
    if torch.device(engine.device).type != "cuda":
        return None
    decoder = Decoder(model, engine.max_num_seqs, num_vocab)
    if engine.graphs:
        with Progress("capturing graphs") as progress, torch.inference_mode():
            decoder.capture(progress)
    return decoder
