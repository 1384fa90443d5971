"""Steps that read prompts as captured graphs: a family of sizes, each for contexts up to a length.

Eagerly the host launches some 28 kernels a layer, one after the other, and a step of a thousand tokens waits for it. A
graph is one launch. Its arrays lie in fixed places and have a fixed size (``fixed_chunks``), so a step runs in the
smallest graph that holds it, with padded rows behind its own. The backbone is captured; what follows it, logits of some
rows or a draft's module, runs eagerly on its results.

Steps that run eagerly, by ``Model.forward``: of more requests than a graph holds; that take snapshots on their way; of
so many tokens that the padded rows would cost more than the launches; and those whose requests have no more rows than
a decode step has.

Captured once, when the engine starts, so that no request waits for a capture. Without a graph of its shape a step runs
eagerly on the same arrays, with the same bits.

Legend: T rows of a step, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ownpath.cache.chunks import ChunkTables
from ownpath.cache.fixed_chunks import ChunkShape, FixedChunks
from ownpath.cache.pools import CachePool, SequenceCache
from ownpath.cache.tables import StepTables
from ownpath.cache.transfer import StepStaging
from ownpath.config import EngineConfig, ModelConfig
from ownpath.engine.graphs import no_graph_of
from ownpath.kernels.dsl.compilations import COMPILATIONS
from ownpath.model.batch import ForwardBatch
from ownpath.model.block import Hidden, Residual
from ownpath.model.model import Model
from ownpath.terminal.progress import Progress
from ownpath.terminal.text import counted, size_text
from ownpath.trace import Ledger
from ownpath.trace.ledger import CapturedCalls

SIZES = (128, 256, 512, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
"""Rows of the graphs, up to the most tokens that a step reads."""
FIRST_BLOCKS, GROWTH = 32, 4
"""Blocks of a request's table in the graphs of the shortest contexts; of longer ones so many times as many each."""
MOST_REQUESTS = 16
"""Requests of a graph's step. Each brings 127 near keys, which a layer copies whether there are such or not."""
MOST_PADDED, PADDED_SHARE = 512, 8
"""Padded rows of a step: so many at most, or one for so many rows of its own. Beyond 2,048 rows the host is done
launching before the device has run, so that padded rows are all that a graph changes."""


class ReadingModel(Protocol):
    """The model as far as graphs of prompts go."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def caches(self) -> CachePool: ...

    @property
    def ledger(self) -> Ledger: ...

    def new_cache(self, num_tokens: int | None = None) -> SequenceCache: ...

    def read(self, token_ids_T: torch.Tensor, tables: ChunkTables) -> Residual: ...

    def logits_behind(self, residual: Residual, ids_R: torch.Tensor) -> torch.Tensor: ...

    def hidden_behind(self, residual: Residual) -> Hidden: ...

    def forward(self, batch: ForwardBatch) -> torch.Tensor: ...

    def forward_drafting(self, batch: ForwardBatch) -> tuple[torch.Tensor, Hidden]: ...

    def draft_forward(
        self, hidden: Hidden, next_ids_T: torch.Tensor, batch: ForwardBatch, rows_R: torch.Tensor
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class CapturedRead:
    """A shape's graph, and the calls that a replay makes."""

    graph: torch.cuda.CUDAGraph
    calls: CapturedCalls


class PromptGraphs:
    """A model that reads prompts in graphs where a step fits one; see ``steps.LanguageModel``.

    most_tokens: that a step reads. sizes: rows of the graphs below it, ascending.
    """

    def __init__(self, model: ReadingModel, most_tokens: int, sizes: Sequence[int] = SIZES) -> None:
        self._model, self.caches = model, model.caches
        self.shapes = tuple(shapes_of(most_tokens, self.caches, sizes))
        self._fixed: dict[ChunkShape, FixedChunks] = {}
        self._graphs: dict[ChunkShape, CapturedRead] = {}
        self._left: Residual | None = None  # of the graph that ran last
        largest = FixedChunks(self.caches, ChunkShape(*map(max, zip(*self.shapes, strict=True))))
        self._staging = StepStaging(largest.num_words, self.caches.spec.device)
        self.num_replays = 0
        """Steps that a graph ran."""
        self.num_bytes = 0
        """Device memory that the graphs take."""

    def __str__(self) -> str:
        return f"{counted(len(self.shapes), 'graph')}, {size_text(self.num_bytes)}"

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self._model.config

    def new_cache(self, num_tokens: int | None = None) -> SequenceCache:
        """See ``Model.new_cache``."""
        return self._model.new_cache(num_tokens)

    def shape_of(self, tables: StepTables) -> ChunkShape | None:
        """Returns the shape that a step runs in; ``None``: it runs as it is."""
        counts = [rows.stop - rows.start for rows in tables.rows]
        if tables.passed or max(counts) <= self.caches.spec.rows_per_request:
            return None
        num_rows = tables.row_ends[-1]
        fitting = next((shape for shape in self.shapes if shape.holds(tables)), None)
        most = num_rows + max(MOST_PADDED, num_rows // PADDED_SHARE)
        return fitting if fitting is not None and fitting.num_rows <= most else None

    def takes(self, num_requests: int) -> bool:
        """Returns True if a graph reads short prompts of so many requests in a step."""
        return bool(self._graphs) and num_requests <= self.shapes[0].num_requests

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """See ``Model.forward``."""
        residual = self._read(batch)
        if residual is None:
            return self._model.forward(batch)
        return self._model.logits_behind(residual, batch.logits_ids)

    def forward_drafting(self, batch: ForwardBatch) -> tuple[torch.Tensor, Hidden]:
        """See ``Model.forward_drafting``."""
        residual = self._read(batch)
        if residual is None:
            return self._model.forward_drafting(batch)
        return self._model.logits_behind(residual, batch.logits_ids), self._model.hidden_behind(residual)

    def draft_forward(
        self, hidden: Hidden, next_ids_T: torch.Tensor, batch: ForwardBatch, rows_R: torch.Tensor
    ) -> torch.Tensor:
        """See ``Model.draft_forward``."""
        return self._model.draft_forward(hidden, next_ids_T, batch, rows_R)

    def capture(self, progress: Callable[[int, int, str], None]) -> None:
        """Captures every shape, the largest first, so that the others fit its memory. Call once, before any step.

        Each first runs eagerly, so that nothing compiles while a graph is captured.
        """
        memory = torch.cuda.graph_pool_handle()
        for done, shape in enumerate(sorted(self.shapes, reverse=True)):
            progress(done, len(self.shapes), f"{shape.num_rows} tokens")
            self._graphs[shape] = self._capture(self._fixed_of(shape), memory)

    @torch.inference_mode()
    def _read(self, batch: ForwardBatch) -> Residual | None:
        """Runs the backbone on a batch that fits a shape, and counts its tokens in. Valid until the next call."""
        shape = self.shape_of(batch.tables)
        if shape is None:
            return None
        fixed, num_rows = self._fixed_of(shape), batch.tables.row_ends[-1]
        fixed.send(batch.tables, batch.token_ids_T, self._staging)
        residual = self._launch(fixed)
        batch.tables.flags_LT.copy_(fixed.tables.flags_LT[:, :num_rows])
        batch.tables.extend()
        return residual.first(num_rows)

    def _launch(self, fixed: FixedChunks) -> Residual:
        captured = self._graphs.get(fixed.shape)
        if captured is None:
            return self._model.read(fixed.token_ids_T, fixed.tables)
        captured.graph.replay()
        self.num_replays += 1
        captured.calls.num_replays += 1
        assert self._left is not None
        return self._left

    def _capture(self, fixed: FixedChunks, memory: Any) -> CapturedRead:
        ledger = self._model.ledger
        with ledger.counting_apart():
            residual = self._model.read(fixed.token_ids_T, fixed.tables)
        if self._left is None:  # one for all graphs: each of its own would keep its memory from the others
            self._left = Residual.of_parts([torch.empty_like(part) for part in residual.parts])
        left = self._left.first(fixed.shape.num_rows)
        torch.cuda.synchronize(self.caches.spec.device)
        graph = torch.cuda.CUDAGraph()
        with ledger.counting_apart() as calls, torch.cuda.graph(graph, pool=memory):
            residual = self._model.read(fixed.token_ids_T, fixed.tables)
            torch._foreach_copy_(left.parts, residual.parts)
        COMPILATIONS.num_captured += 1
        return CapturedRead(graph, ledger.captured(calls))

    def _fixed_of(self, shape: ChunkShape) -> FixedChunks:
        if shape not in self._fixed:
            self._fixed[shape] = FixedChunks(self.caches, shape)
        return self._fixed[shape]


def shapes_of(most_tokens: int, pool: CachePool, sizes: Sequence[int]) -> Iterator[ChunkShape]:
    """Yields the shapes of steps that read up to so many tokens, the smallest first. sizes: ascending."""
    largest = min(most_tokens, pool.spec.max_tokens)
    widths, width = list[int](), FIRST_BLOCKS
    while width < pool.blocks_per_sequence:
        widths.append(width)
        width *= GROWTH
    for num_rows in (*(size for size in sizes if size < largest), largest):
        for num_blocks in (*widths, pool.blocks_per_sequence):
            yield ChunkShape(num_rows, min(MOST_REQUESTS, pool.spec.max_sequences), num_blocks)


def prompts_of(model: object) -> PromptGraphs | None:
    """Returns a model's graphs of prompts; ``None``: it has none."""
    return model if isinstance(model, PromptGraphs) else None


def with_prompt_graphs(model: Model, engine: EngineConfig) -> "Model | PromptGraphs":
    """Captures the graphs of a model that one process runs on a GPU.

    Returns the model as it is where the engine wants no graphs, where steps with chunks have no line of kernels or one
    that waits for the host, and on a CPU.
    """
    device = torch.device(engine.device)
    if device.type != "cuda" or not engine.graphs or model.paged is None or not model.paged.has_chunks:
        return model
    if no_graph_of(model.ledger) is not None:
        return model
    torch.cuda.empty_cache()  # as a capture does
    graphs, before = PromptGraphs(model, engine.max_prefill_tokens), torch.cuda.mem_get_info(device)[0]
    with Progress("capturing graphs of prompts") as progress, torch.inference_mode():
        graphs.capture(progress)
    torch.cuda.empty_cache()
    graphs.num_bytes = max(0, before - torch.cuda.mem_get_info(device)[0])
    return graphs
