"""The lightning indexer: which compressed entries a CSA query attends to.

score(t, c) = sum over index heads h of w[t, h] * relu(q[t, h] . k[c]); the ``index_topk`` best entries that the
query may see are kept.

Legend: T tokens, I index heads, H index head dim, C compressed entries.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ownpath.model.caches import CompressorCache
from ownpath.model.compressor import Compressor
from ownpath.model.rope import Rotation
from ownpath.numerics import wide_dtype
from ownpath.runners import Linear


@dataclass(frozen=True)
class Indexer:
    """wq_b: low-rank query -> [I*H]; weights_proj: hidden -> [I]; compressor: its own keys, at index_head_dim.
    keep: what queries become before they are scored; keys become the same in the compressor."""

    wq_b: Linear
    weights_proj: Linear
    compressor: Compressor
    num_heads: int
    head_dim: int
    topk: int
    keep: Callable[[torch.Tensor], torch.Tensor]

    def queries(self, qr_TR: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        """Rotated index queries [T, I, H]."""
        q_TIH: torch.Tensor = self.wq_b(qr_TR).unflatten(-1, (self.num_heads, self.head_dim))
        return self.keep(rotation.apply(q_TIH))

    def head_weights(self, x_TD: torch.Tensor) -> torch.Tensor:
        """w [T, I], with both softmax scales folded in."""
        weights_TI = self.weights_proj(x_TD)
        scale: float = self.head_dim**-0.5 * self.num_heads**-0.5
        return weights_TI.to(wide_dtype(weights_TI.dtype)) * scale

    def select(
        self, q_TIH: torch.Tensor, weights_TI: torch.Tensor, keys_CH: torch.Tensor, visible_TC: torch.Tensor
    ) -> torch.Tensor:
        """Mask [T, C] of the entries each query attends to: the top ``topk`` visible ones, lowest index on ties."""
        if keys_CH.shape[0] <= self.topk:
            return visible_TC
        wide = weights_TI.dtype
        scores_TIC = torch.relu(q_TIH.to(wide) @ keys_CH.to(wide).T)
        scores_TC = (scores_TIC * weights_TI.unsqueeze(-1)).sum(1).masked_fill(~visible_TC, -torch.inf)
        # A stable sort, not topk: which of two equal scores wins must not depend on the number of entries.
        best_TK = scores_TC.sort(dim=-1, descending=True, stable=True).indices[:, : self.topk]
        return torch.zeros_like(visible_TC).scatter_(-1, best_TK, True) & visible_TC

    def append(self, rows: torch.Tensor, position: int, cache: CompressorCache) -> torch.Tensor:
        """Adds the compressor rows of new tokens; returns all index keys so far [C, H]."""
        return self.compressor.append(rows, position, cache)
