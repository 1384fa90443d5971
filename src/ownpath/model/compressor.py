"""The KV compressor: one cache entry for every ``ratio`` tokens, a gated average of their projections.

HCA (ratio 128): windows lie side by side; an entry is the softmax-weighted sum of its 128 tokens, per channel.
CSA (ratio 4): windows overlap. Each token is projected twice: the first half of the channels serves the *next*
window's entry, the second half its own, so that an entry averages 8 rows. The first window has no predecessor.

Rows wait in a ring until their window is complete; a step continues exactly where the last one stopped, so any way
of cutting a prompt into chunks computes the same entries.

Legend: T new tokens, P compressor width (2H for CSA), H head dim, N finished windows, L rows of one window.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ownpath.config import CSA_RATIO
from ownpath.model.caches import CompressorCache
from ownpath.model.rope import Rope
from ownpath.runners import Linear, RMSNorm


@dataclass(frozen=True)
class Compressor:
    """wkv_wgate: fused projection to (kv, score) [.., 2P], at least float32; ape float32 [ratio, P]: score bias by
    place in window. keep: what entries become before they are kept."""

    wkv_wgate: Linear
    ape: torch.Tensor
    norm: RMSNorm
    rope: Rope
    ratio: int
    keep: Callable[[torch.Tensor], torch.Tensor]

    def project(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Raw (kv, score) rows [T, 2P] in at least float32, as the official code computes them."""
        return self.wkv_wgate(x_TD)

    def append(self, rows_TP2: torch.Tensor, position: int, cache: CompressorCache) -> torch.Tensor:
        """Adds the rows of positions position, position + 1, ...; returns all finished entries so far [C, H]."""
        ratio = self.ratio
        end = position + len(rows_TP2)
        first_window, end_window = position // ratio, end // ratio
        if end_window > first_window:
            start = max(0, first_window - self._lookback) * ratio
            known = torch.cat((cache.state.read(start, position), rows_TP2))
            windows = known[: end_window * ratio - start].unflatten(0, (-1, ratio))
            entries = self._pool(windows, num_entries=end_window - first_window)
            cache.entries_CH[first_window:end_window] = self._finish(entries, first_window, cache.entries_CH.dtype)
        cache.state.write(rows_TP2, position)
        return cache.entries_CH[:end_window]

    @property
    def _lookback(self) -> int:
        return 1 if self.ratio == CSA_RATIO else 0

    def _pool(self, windows: torch.Tensor, num_entries: int) -> torch.Tensor:
        """Gated averages of the last ``num_entries`` windows of [N, ratio, 2P]; one more comes first if it exists."""
        kv_NLP, score_NLP = windows.chunk(2, dim=-1)
        score_NLP = score_NLP + self.ape
        if self._lookback:
            kv_NLP = _overlap(kv_NLP, 0.0)[-num_entries:]
            score_NLP = _overlap(score_NLP, -torch.inf)[-num_entries:]
        return (kv_NLP * score_NLP.softmax(dim=1)).sum(1)

    def _finish(self, entries_NH: torch.Tensor, first_window: int, dtype: torch.dtype) -> torch.Tensor:
        """Norm, then rotation at the position of each window's first token, then what the cache keeps of it."""
        windows = torch.arange(first_window, first_window + len(entries_NH), device=entries_NH.device)
        return self.keep(self.rope.at(windows * self.ratio).apply(self.norm(entries_NH.to(dtype))))


def _overlap(rows_NLP: torch.Tensor, fill: float) -> torch.Tensor:
    """[N, L, 2H] -> [N, 2L, H]: the previous window's first half of channels, then this window's second half."""
    ahead_NLH, own_NLH = rows_NLP.chunk(2, dim=-1)
    before_first = torch.full_like(ahead_NLH[:1], fill)
    return torch.cat((torch.cat((before_first, ahead_NLH[:-1])), own_NLH), dim=1)
