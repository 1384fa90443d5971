"""Torch reference of the selection of entries, by a stable sort.

Legend: T rows, C columns of the scores, K entries that a row attends to at most.
"""

import torch

from ownpath.kernels.reference import Reference
from ownpath.kernels.scores.ref import entry_rows, visible_entries
from ownpath.kernels.scores.types import CSA_PAGES, EntryPages, PagedRows
from ownpath.kernels.select.types import Selected, SelectWeights


def select(
    scores_TC: torch.Tensor,
    rows: PagedRows,
    topk: int,
    pages: EntryPages = CSA_PAGES,
    out: Selected | None = None,
) -> Selected:
    """Selects each row's ``topk`` visible entries with the best scores, the lower index at ties.

    A NaN counts as minus infinity. All visible entries are selected where there are no more than ``topk``.
    """
    visible_TC = visible_entries(rows, pages)
    nan_TC = scores_TC.isnan()
    chosen_TC = visible_TC
    if scores_TC.shape[1] > topk:
        # A stable sort, not topk: entries of equal scores keep their order, and what is not visible comes last.
        ranked_TC = scores_TC.masked_fill(nan_TC | ~visible_TC, -torch.inf)
        best_TK = ranked_TC.sort(dim=-1, descending=True, stable=True).indices[:, :topk]
        chosen_TC = torch.zeros_like(visible_TC).scatter_(-1, best_TK, True) & visible_TC
    rows_TK = torch.zeros(len(scores_TC), topk, dtype=torch.int32, device=scores_TC.device)
    places_TC = chosen_TC.cumsum(1) - 1
    of_row, entry = chosen_TC.nonzero(as_tuple=True)
    pool_rows = entry_rows(rows.blocks_TB, pages.per_block)[of_row, entry]
    rows_TK[of_row, places_TC[of_row, entry]] = pool_rows.to(torch.int32)
    non_finite_T = (~scores_TC.isfinite() & visible_TC).any(1)
    found = Selected(rows_TK, chosen_TC.sum(1, dtype=torch.int32), non_finite_T.to(torch.int32))
    return found if out is None else Selected(*(kept.copy_(new) for kept, new in zip(out, found, strict=True)))


class SelectReference(Reference):
    """``select`` as a kernel. The operand is the weights."""

    def prepare(self, weights: SelectWeights) -> SelectWeights:
        """Returns the weights unchanged."""
        return weights

    def variant(self, scores_TC: torch.Tensor, operand: SelectWeights) -> None:
        """Returns ``None``: the kernel has no variants."""

    def workspace(self, operand: SelectWeights, num_rows: int, num_blocks: int, device: torch.device) -> None:
        """Returns ``None``: no call needs scratch."""

    def run(
        self,
        scores_TC: torch.Tensor,
        rows: PagedRows,
        operand: SelectWeights,
        *,
        out: Selected | None = None,
        workspace: torch.Tensor | None = None,
    ) -> Selected:
        """Selects entries of each row."""
        return select(scores_TC, rows, operand.topk, operand.pages, out)

    def __call__(
        self,
        scores_TC: torch.Tensor,
        rows: PagedRows,
        topk: int,
        pages: EntryPages = CSA_PAGES,
        out: Selected | None = None,
    ) -> Selected:
        """Selects entries of each row."""
        return select(scores_TC, rows, topk, pages, out)


SELECT = SelectReference()
