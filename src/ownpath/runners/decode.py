"""Runners of lines of kernels: cache writes, index scores, selection and attention over the pool, of decode steps and
of chunks.

They take the arguments of their kernels, whose types are in the families' ``types.py``.
"""

import torch

import ownpath.runners.decode_ops  # noqa: F401, defines the operations that the runners call while torch compiles
from ownpath.kernels.angles.types import Frequencies, StepAnglesKernel, views_of
from ownpath.kernels.attend.types import AttendKernel, AttendWeights, DecodeKeys, DecodeRows
from ownpath.kernels.chunk_entries.types import ChunkEntriesKernel, ChunkPlaces, ChunkRingsKernel, EndingRows
from ownpath.kernels.chunks.types import ChunkKernel, ChunkKeys, ChunkRows
from ownpath.kernels.contract import NormWeights
from ownpath.kernels.entries.types import (
    CompressorWeights,
    EntriesKernel,
    EntriesWeights,
    EntryAngles,
    KeyRounding,
    LayerPools,
    RawRows,
    RowPlaces,
    StepAngles,
)
from ownpath.kernels.registry import KERNELS
from ownpath.kernels.scores.types import CSA_PAGES, IndexQuery, IndexScoresKernel, PagedRows
from ownpath.kernels.select.types import Selected, SelectKernel, SelectWeights
from ownpath.runners.ops import HANDLES
from ownpath.runners.runner import KernelOrName, KernelRunner, chosen_spec

__all__ = [
    "AttendWeights",
    "CacheEntries",
    "ChunkAttention",
    "ChunkEntries",
    "ChunkKeys",
    "ChunkPlaces",
    "ChunkRings",
    "ChunkRows",
    "CompressorWeights",
    "DecodeAttention",
    "DecodeKeys",
    "DecodeRows",
    "EndingRows",
    "EntriesWeights",
    "EntryAngles",
    "Frequencies",
    "IndexQuery",
    "IndexScores",
    "KeyRounding",
    "LayerPools",
    "NormWeights",
    "PagedRows",
    "RawRows",
    "RotaryAngles",
    "RowPlaces",
    "Select",
    "StepAngles",
]


class RotaryAngles(KernelRunner):
    """The angles of a step's positions int32 [T], for all layers."""

    def __init__(self, frequencies: Frequencies, *, kernel: KernelOrName = "ref.step_angles") -> None:
        self.spec = chosen_spec(kernel)
        self.kernel: StepAnglesKernel[object] = KERNELS[self.spec.name]
        self.num_pairs, self.operand = len(frequencies.sliding_F), self.kernel.prepare(frequencies)
        self.handle = HANDLES.new(self)

    def variant(self, positions_T: torch.Tensor) -> str | None:
        """Returns the names of the variants that a call launches; ``None`` for a kernel without variants."""
        return self.kernel.variant(positions_T, self.operand)

    def run(self, positions_T: torch.Tensor) -> torch.Tensor:
        """Computes all tables [KINDS, T, F]. Errors: ValueError naming an argument that the kernel refuses."""
        return self.kernel.run(positions_T, self.operand)

    def __call__(self, positions_T: torch.Tensor) -> StepAngles:
        if torch.compiler.is_compiling():
            return views_of(torch.ops.ownpath.step_angles(positions_T, self.handle))
        return views_of(self.run(positions_T))


class CacheEntries(KernelRunner):
    """Writes a step's keys, raw rows and finished entries to one layer's caches."""

    def __init__(self, weights: EntriesWeights, *, kernel: KernelOrName = "ref.entries") -> None:
        self.spec = chosen_spec(kernel)
        self.kernel: EntriesKernel[object] = KERNELS[self.spec.name]
        self.operand = self.kernel.prepare(weights)
        self.handle = HANDLES.new(self)

    def variant(self, raw: RawRows, *_: object) -> str | None:
        """Returns the names of the variants that a call launches; ``None`` for a kernel without variants."""
        return self.kernel.variant(raw, self.operand)

    def run(self, raw: RawRows, angles: EntryAngles, rows: RowPlaces, pools: LayerPools) -> None:
        """Writes in place. Errors: ValueError naming an argument that the kernel refuses."""
        self.kernel.run(raw, angles, rows, pools, self.operand)

    def __call__(self, raw: RawRows, angles: EntryAngles, rows: RowPlaces, pools: LayerPools) -> None:
        if torch.compiler.is_compiling():
            torch.ops.ownpath.cache_entries(*raw, *angles, *rows, *pools, self.handle)
            return
        self.kernel.run(raw, angles, rows, pools, self.operand)


class ChunkEntries(KernelRunner):
    """Writes the entries that a step with chunks finishes to one layer's caches, and gathers its near keys: [W, H]."""

    def __init__(self, weights: EntriesWeights, *, kernel: KernelOrName = "ref.chunk_entries") -> None:
        self.spec = chosen_spec(kernel)
        self.kernel: ChunkEntriesKernel[object] = KERNELS[self.spec.name]
        self.operand = self.kernel.prepare(weights)
        self.handle = HANDLES.new(self)

    def variant(self, raw: RawRows, *_: object) -> str | None:
        """Returns the names of the variants that a call launches; ``None`` for a kernel without variants."""
        return self.kernel.variant(raw, self.operand)

    def run(self, raw: RawRows, ends: EndingRows, places: ChunkPlaces, pools: LayerPools) -> torch.Tensor:
        """Writes in place and gathers. Errors: ValueError naming an argument that the kernel refuses."""
        return self.kernel.run(raw, ends, places, pools, self.operand)

    def __call__(self, raw: RawRows, ends: EndingRows, places: ChunkPlaces, pools: LayerPools) -> torch.Tensor:
        if torch.compiler.is_compiling():
            near_WH: torch.Tensor = torch.ops.ownpath.chunk_entries(*raw, *ends, *places, *pools, self.handle)
            return near_WH
        return self.kernel.run(raw, ends, places, pools, self.operand)


class ChunkRings(KernelRunner):
    """Writes to one layer's rings what a step with chunks leaves in them."""

    def __init__(self, weights: EntriesWeights, *, kernel: KernelOrName = "ref.chunk_rings") -> None:
        self.spec = chosen_spec(kernel)
        self.kernel: ChunkRingsKernel[object] = KERNELS[self.spec.name]
        self.operand = self.kernel.prepare(weights)
        self.handle = HANDLES.new(self)

    def variant(self, raw: RawRows, *_: object) -> str | None:
        """Returns the names of the variants that a call launches; ``None`` for a kernel without variants."""
        return self.kernel.variant(raw, self.operand)

    def run(self, raw: RawRows, places: ChunkPlaces, pools: LayerPools) -> None:
        """Writes in place. Errors: ValueError naming an argument that the kernel refuses."""
        self.kernel.run(raw, places, pools, self.operand)

    def __call__(self, raw: RawRows, places: ChunkPlaces, pools: LayerPools) -> None:
        if torch.compiler.is_compiling():
            torch.ops.ownpath.chunk_rings(*raw, *places, *pools, self.handle)
            return
        self.kernel.run(raw, places, pools, self.operand)


class IndexScores(KernelRunner):
    """Scores the entries that each row sees by the lightning indexer: float32 [T, C]."""

    def __init__(self, *, kernel: KernelOrName = "ref.index_scores") -> None:
        self.spec = chosen_spec(kernel)
        self.kernel: IndexScoresKernel[object] = KERNELS[self.spec.name]
        self.pages = CSA_PAGES
        self.operand = self.kernel.prepare(self.pages)
        self.handle = HANDLES.new(self)

    def variant(self, query: IndexQuery, *_: object) -> str | None:
        """Returns the names of the variants that a call launches; ``None`` for a kernel without variants."""
        return self.kernel.variant(query, self.operand)

    def run(self, query: IndexQuery, keys: torch.Tensor, rows: PagedRows) -> torch.Tensor:
        """Computes scores. Errors: ValueError naming an argument that the kernel refuses."""
        return self.kernel.run(query, keys, rows, self.operand)

    def __call__(self, query: IndexQuery, keys: torch.Tensor, rows: PagedRows) -> torch.Tensor:
        if torch.compiler.is_compiling():
            scores_TC: torch.Tensor = torch.ops.ownpath.index_scores(*query, keys, *rows, self.handle)
            return scores_TC
        return self.kernel.run(query, keys, rows, self.operand)


class Select(KernelRunner):
    """Selects each row's best-scored entries: their rows in the pool, ascending, their number, and a flag of scores
    that are not finite, in ``flags_T`` int32 [T] if that is given."""

    def __init__(self, topk: int, *, kernel: KernelOrName = "ref.select") -> None:
        self.spec = chosen_spec(kernel)
        self.kernel: SelectKernel[object] = KERNELS[self.spec.name]
        self.topk, self.operand = topk, self.kernel.prepare(SelectWeights(topk))
        self.handle = HANDLES.new(self)

    def variant(self, scores_TC: torch.Tensor, *_: object) -> str | None:
        """Returns the names of the variants that a call launches; ``None`` for a kernel without variants."""
        return self.kernel.variant(scores_TC, self.operand)

    def run(self, scores_TC: torch.Tensor, rows: PagedRows, flags_T: torch.Tensor | None = None) -> Selected:
        """Selects. Errors: ValueError naming an argument that the kernel refuses."""
        if flags_T is None:
            return self.kernel.run(scores_TC, rows, self.operand)
        shapes = (len(scores_TC), self.topk), (len(scores_TC),)
        rows_TK, num_T = (torch.empty(shape, dtype=torch.int32, device=scores_TC.device) for shape in shapes)
        return self.kernel.run(scores_TC, rows, self.operand, out=Selected(rows_TK, num_T, flags_T))

    def __call__(self, scores_TC: torch.Tensor, rows: PagedRows, flags_T: torch.Tensor | None = None) -> Selected:
        if torch.compiler.is_compiling():
            if flags_T is None:
                flags_T = torch.empty(len(scores_TC), dtype=torch.int32, device=scores_TC.device)
            rows_TK, num_T = torch.ops.ownpath.select(scores_TC, *rows, flags_T, self.handle)
            return Selected(rows_TK, num_T, flags_T)
        return self.run(scores_TC, rows, flags_T)


class DecodeAttention(KernelRunner):
    """Attention of raw queries over window and entries in the pool, its rotation undone: [T, N, H]."""

    def __init__(self, weights: AttendWeights, *, kernel: KernelOrName = "ref.attend") -> None:
        self.spec = chosen_spec(kernel)
        self.kernel: AttendKernel[object] = KERNELS[self.spec.name]
        self.operand = self.kernel.prepare(weights)
        self.handle = HANDLES.new(self)

    def variant(
        self, q_TNH: torch.Tensor, cos_TF: torch.Tensor, sin_TF: torch.Tensor, keys: DecodeKeys, rows: DecodeRows
    ) -> str | None:
        """Returns the names of the variants that a call launches; ``None`` for a kernel without variants."""
        return self.kernel.variant(q_TNH, keys, rows, self.operand)

    def run(
        self, q_TNH: torch.Tensor, cos_TF: torch.Tensor, sin_TF: torch.Tensor, keys: DecodeKeys, rows: DecodeRows
    ) -> torch.Tensor:
        """Attends. Errors: ValueError naming an argument that the kernel refuses."""
        return self.kernel.run(q_TNH, cos_TF, sin_TF, keys, rows, self.operand)

    def __call__(
        self, q_TNH: torch.Tensor, cos_TF: torch.Tensor, sin_TF: torch.Tensor, keys: DecodeKeys, rows: DecodeRows
    ) -> torch.Tensor:
        if torch.compiler.is_compiling():
            o_TNH: torch.Tensor = torch.ops.ownpath.decode_attention(q_TNH, cos_TF, sin_TF, *keys, *rows, self.handle)
            return o_TNH
        return self.kernel.run(q_TNH, cos_TF, sin_TF, keys, rows, self.operand)


class ChunkAttention(KernelRunner):
    """Attention of raw queries of chunks over near keys and entries in the pool, its rotation undone: [T, N, H]."""

    def __init__(self, weights: AttendWeights, *, kernel: KernelOrName = "ref.attend_chunk") -> None:
        self.spec, self.weights = chosen_spec(kernel), weights
        self.kernel: ChunkKernel[object] = KERNELS[self.spec.name]
        self.operand = self.kernel.prepare(weights)
        self.handle = HANDLES.new(self)

    def variant(
        self, q_TNH: torch.Tensor, cos_TF: torch.Tensor, sin_TF: torch.Tensor, keys: ChunkKeys, rows: ChunkRows
    ) -> str | None:
        """Returns the names of the variants that a call launches; ``None`` for a kernel without variants."""
        return self.kernel.variant(q_TNH, keys, rows, self.operand)

    def run(
        self, q_TNH: torch.Tensor, cos_TF: torch.Tensor, sin_TF: torch.Tensor, keys: ChunkKeys, rows: ChunkRows
    ) -> torch.Tensor:
        """Attends. Errors: ValueError naming an argument that the kernel refuses."""
        return self.kernel.run(q_TNH, cos_TF, sin_TF, keys, rows, self.operand)

    def __call__(
        self, q_TNH: torch.Tensor, cos_TF: torch.Tensor, sin_TF: torch.Tensor, keys: ChunkKeys, rows: ChunkRows
    ) -> torch.Tensor:
        if torch.compiler.is_compiling():
            o_TNH: torch.Tensor = torch.ops.ownpath.chunk_attention(q_TNH, cos_TF, sin_TF, *keys, *rows, self.handle)
            return o_TNH
        return self.kernel.run(q_TNH, cos_TF, sin_TF, keys, rows, self.operand)
