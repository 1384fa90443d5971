"""What one sequence keeps between steps: declared up front, allocated once, written in place.

Per layer: a ring of the last ``sliding_window`` keys (which are the values too); for a compressing layer also the
compressed entries so far and a ring of the compressor's raw rows, just long enough for the next window; for CSA the
same pair again for the indexer. Nothing depends on how the tokens were cut into steps.

Legend: W sliding window, C compressed entries, R rows of compressor state, H head dim, P compressor width.
"""

from dataclasses import dataclass

import torch

from ownpath.config import CSA_RATIO, SLIDING, EngineConfig, ModelConfig


class Ring:
    """The last ``size`` rows of a sequence, addressed by position."""

    def __init__(self, size: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.size = size
        self.rows = torch.zeros(size, width, dtype=dtype, device=device)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Rows of positions [start, stop), oldest first; all must be among the last ``size`` written."""
        assert 0 <= stop - start <= self.size, (start, stop, self.size)
        positions = torch.arange(start, stop, device=self.rows.device)
        return self.rows[positions % self.size]

    def write(self, rows: torch.Tensor, start: int) -> None:
        """Stores the rows of positions start, start + 1, ...; only the last ``size`` of them are kept."""
        skipped = max(0, len(rows) - self.size)
        positions = torch.arange(start + skipped, start + len(rows), device=self.rows.device)
        self.rows[positions % self.size] = rows[skipped:]


@dataclass(frozen=True)
class CompressorCache:
    """entries_CH: one row per finished window, in order. state: raw (kv, score) rows of the newest tokens [R, 2P]."""

    ratio: int
    entries_CH: torch.Tensor
    state: Ring

    @classmethod
    def allocate(cls, ratio: int, head_dim: int, max_tokens: int, spec: "CacheSpec") -> "CompressorCache":
        overlaps = ratio == CSA_RATIO
        num_rows = 2 * ratio if overlaps else ratio
        width = 2 * head_dim if overlaps else head_dim
        entries = torch.zeros(max_tokens // ratio, head_dim, dtype=spec.dtype, device=spec.device)
        return cls(ratio, entries, Ring(num_rows, 2 * width, spec.state_dtype, spec.device))


@dataclass(frozen=True)
class LayerCache:
    """One attention layer's caches; compressor and indexer are ``None`` where the layer has none."""

    window: Ring
    compressor: CompressorCache | None
    indexer: CompressorCache | None


@dataclass(frozen=True)
class CacheSpec:
    """Everything needed to allocate a sequence's caches. state_dtype: at least float32, softmax inputs live there.

    num_drafts: MTP modules that are loaded; each has a window of its own.
    """

    config: ModelConfig
    max_tokens: int
    dtype: torch.dtype
    device: torch.device
    num_drafts: int = 0

    @classmethod
    def of(cls, config: ModelConfig, engine: EngineConfig) -> "CacheSpec":
        num_drafts = config.num_nextn_predict_layers if engine.loads_draft else 0
        return cls(config, engine.max_model_len, engine.dtype, torch.device(engine.device), num_drafts)

    @property
    def ratios(self) -> tuple[int, ...]:
        """Of every layer with caches: the backbone's, then the drafts'."""
        return (*self.config.compress_ratios, *[SLIDING] * self.num_drafts)

    @property
    def state_dtype(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    def allocate_layer(self, ratio: int) -> LayerCache:
        config = self.config
        window = Ring(config.sliding_window, config.head_dim, self.dtype, self.device)
        compressor = indexer = None
        if ratio:
            compressor = CompressorCache.allocate(ratio, config.head_dim, self.max_tokens, self)
        if ratio == CSA_RATIO:
            indexer = CompressorCache.allocate(ratio, config.index_head_dim, self.max_tokens, self)
        return LayerCache(window, compressor, indexer)


class SequenceCache:
    """All layers' caches of one sequence, the backbone's, then the drafts'.

    ``num_tokens`` is how many tokens the backbone's hold; the model advances it.
    """

    def __init__(self, spec: CacheSpec) -> None:
        self.max_tokens = spec.max_tokens
        self.num_tokens = 0
        self.layers = tuple(spec.allocate_layer(ratio) for ratio in spec.ratios)

    def num_bytes(self) -> int:
        """Bytes of all tensors of this sequence."""
        total = 0
        for layer in self.layers:
            tensors = [layer.window.rows]
            for part in (layer.compressor, layer.indexer):
                tensors += [part.entries_CH, part.state.rows] if part else []
            total += sum(tensor.nbytes for tensor in tensors)
        return total
