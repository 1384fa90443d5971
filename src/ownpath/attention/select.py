"""Selects the compressed entries that a CSA query attends to, by the lightning indexer's scores.

score(t, c) = sum over index heads h of w[t, h] * relu(q[t, h] . k[c]). A query attends to the ``topk`` best entries
that it may see.

Legend: T tokens, I index heads, H index head dim, C compressed entries.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class EntrySelector:
    """Selects entries by score. topk: the most entries that a query attends to."""

    topk: int

    def select(
        self,
        q_TIH: torch.Tensor,
        weights_TI: torch.Tensor,
        keys_CH: torch.Tensor,
        visible_TC: torch.Tensor,
        flags_T: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns a mask [T, C] of the entries each query attends to: the ``topk`` best visible ones, lowest index on
        ties. Sets 1 in ``flags_T`` int32 [T] where a visible score decides and is not finite."""
        if keys_CH.shape[0] <= self.topk:
            return visible_TC
        wide = weights_TI.dtype
        scores_TIC = torch.relu(q_TIH.to(wide) @ keys_CH.to(wide).T)
        scores_TC = (scores_TIC * weights_TI.unsqueeze(-1)).sum(1).masked_fill(~visible_TC, -torch.inf)
        # A stable sort, not topk: the winner among equal scores must not depend on the number of entries.
        ranked = scores_TC.sort(dim=-1, descending=True, stable=True)
        best_TK = ranked.indices[:, : self.topk]
        if flags_T is not None:
            flags_T.copy_(_flags(ranked.values, visible_TC.sum(1)))
        return torch.zeros_like(visible_TC).scatter_(-1, best_TK, True) & visible_TC


def _flags(ranked_TC: torch.Tensor, num_visible_T: torch.Tensor) -> torch.Tensor:
    """Returns True in rows that see a score that is not finite, from their scores in descending order, -infinity where
    not visible: NaN comes first, then infinity, and a visible -infinity behind all others."""
    last_T1 = (num_visible_T - 1).clamp(min=0).unsqueeze(-1)
    ends_T2 = torch.cat((ranked_TC[:, :1], ranked_TC.gather(1, last_T1)), dim=1)
    return ~ends_T2.isfinite().all(1) & (num_visible_T > 0)
