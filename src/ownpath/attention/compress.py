"""The KV compressor: one cache entry for every ``ratio`` tokens, a gated average of their projections.

HCA (ratio 128): windows lie side by side; an entry is the softmax-weighted sum of its 128 tokens, per channel.
CSA (ratio 4): windows overlap. Each token is projected twice: the first half of the channels serves the *next*
window's entry, the second half its own, so that an entry averages 8 rows. The first window has no predecessor.

Rows wait in a ring until their window is complete; a step continues exactly where the last one stopped, so any way
of cutting a prompt into chunks computes the same entries.

Legend: T rows, P compressor width (2H for CSA), H head dim, N finished windows, L rows of one window.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ownpath.attention.rope import Rope
from ownpath.cache.layout import first_row, windows_per_entry
from ownpath.runners import RMSNorm


@dataclass(frozen=True)
class Compressor:
    """Turns raw rows into entries. ape float32 [ratio, P]: score bias by place in the window. quantize_kv: rounds
    entries to the cache's format; the identity without one."""

    ape: torch.Tensor
    norm: RMSNorm
    rope: Rope
    ratio: int
    quantize_kv: Callable[[torch.Tensor], torch.Tensor]

    def entries(self, rows_TP2: torch.Tensor, windows: range, dtype: torch.dtype) -> torch.Tensor:
        """Computes the entries of these windows [N, H]. rows: from ``layout.first_row`` of the first window to at least
        the end of the last."""
        end = windows.stop * self.ratio - first_row(windows.start, self.ratio)
        pooled_NH = self._pool(rows_TP2[:end].unflatten(0, (-1, self.ratio)), num_entries=len(windows))
        return self._finish(pooled_NH, windows, dtype)

    def _pool(self, windows: torch.Tensor, num_entries: int) -> torch.Tensor:
        """Averages the last ``num_entries`` windows of [N, ratio, 2P], gated; one more window stands in front if it
        exists."""
        kv_NLP, score_NLP = windows.chunk(2, dim=-1)
        score_NLP = score_NLP + self.ape
        if windows_per_entry(self.ratio) > 1:
            kv_NLP = _overlap(kv_NLP, 0.0)[-num_entries:]
            score_NLP = _overlap(score_NLP, -torch.inf)[-num_entries:]
        return (kv_NLP * score_NLP.softmax(dim=1)).sum(1)

    def _finish(self, pooled_NH: torch.Tensor, windows: range, dtype: torch.dtype) -> torch.Tensor:
        """Applies the norm, the rotation at the position of each window's first token, and the cache's format."""
        numbers = torch.arange(windows.start, windows.stop, device=pooled_NH.device)
        return self.quantize_kv(self.rope.at(numbers * self.ratio).apply(self.norm(pooled_NH.to(dtype))))


def _overlap(rows_NLP: torch.Tensor, fill: float) -> torch.Tensor:
    """Pairs windows, [N, L, 2H] -> [N, 2L, H]: the previous window's first half of channels, then this one's second
    half."""
    ahead_NLH, own_NLH = rows_NLP.chunk(2, dim=-1)
    before_first = torch.full_like(ahead_NLH[:1], fill)
    return torch.cat((torch.cat((before_first, ahead_NLH[:-1])), own_NLH), dim=1)
