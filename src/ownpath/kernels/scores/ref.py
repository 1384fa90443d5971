"""Torch reference of the indexer's scores over paged keys.

Legend: T rows, I index heads, H index head dim, B blocks of a table, C = B * per_block entries.
"""

from collections.abc import Callable

import torch

from ownpath.kernels.cache_formats.ref import fp4_index
from ownpath.kernels.reference import Reference, filled
from ownpath.kernels.scores.types import CSA_PAGES, EntryPages, IndexQuery, PagedRows
from ownpath.numerics import index_form, rotate_pairs, wide_dtype


def entry_rows(blocks_TB: torch.Tensor, per_block: int) -> torch.Tensor:
    """Returns the pool's row of every entry of every table, int64 [T, C]."""
    within = torch.arange(per_block, device=blocks_TB.device)
    return (blocks_TB.long()[..., None] * per_block + within).flatten(1)


def visible_entries(rows: PagedRows, pages: EntryPages) -> torch.Tensor:
    """Returns which entries each row sees: bool [T, C]."""
    entries_C = torch.arange(rows.blocks_TB.shape[1] * pages.per_block, device=rows.blocks_TB.device)
    counts_T: torch.Tensor = (rows.positions_T + 1) // pages.ratio
    return entries_C < counts_T[:, None]


def keys_of_rows(keys: torch.Tensor, blocks_TB: torch.Tensor, per_block: int, dtype: torch.dtype) -> torch.Tensor:
    """Returns the keys of every table [T, C, H] in a dtype, from a pool as ``IndexScoresKernel.run`` describes it."""
    rows_TC = entry_rows(blocks_TB, per_block)
    if keys.dtype is not torch.uint8:
        return keys[rows_TC].to(dtype)
    return index_form(keys, per_block).read(keys, rows_TC, dtype)


def index_scores(
    query: IndexQuery,
    keys: torch.Tensor,
    rows: PagedRows,
    pages: EntryPages = CSA_PAGES,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes scores [T, C]; 0 for entries that a row does not see.

    Queries are rotated in at least float32 and rounded to their dtype; weights are scaled by H^-1/2 * I^-1/2. Sums have
    the wider dtype of queries and weights, float32 or more.
    """
    return filled(out, _scores(rotate_pairs(query.q_TIH, query.cos_TF, query.sin_TF), query, keys, rows, pages))


def index_scores_fp4(
    query: IndexQuery,
    keys: torch.Tensor,
    rows: PagedRows,
    pages: EntryPages = CSA_PAGES,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes ``index_scores`` of rotated queries that ``cache_formats.ref.fp4_index`` has rounded, as it has keys."""
    q_TIH = fp4_index(rotate_pairs(query.q_TIH, query.cos_TF, query.sin_TF))
    return filled(out, _scores(q_TIH, query, keys, rows, pages))


def _scores(
    q_TIH: torch.Tensor, query: IndexQuery, keys: torch.Tensor, rows: PagedRows, pages: EntryPages
) -> torch.Tensor:
    wide = torch.promote_types(wide_dtype(q_TIH.dtype), query.weights_TI.dtype)
    num_heads, dim = q_TIH.shape[1:]
    weights_TI = query.weights_TI.to(wide) * (dim**-0.5 * num_heads**-0.5)
    visible_TC = visible_entries(rows, pages)
    keys_TCH = keys_of_rows(keys, rows.blocks_TB, pages.per_block, wide)
    products_TIC = torch.relu(q_TIH.to(wide) @ keys_TCH.transpose(1, 2))
    scores_TC = (products_TIC * weights_TI.unsqueeze(-1)).sum(1)
    masked_TC: torch.Tensor = scores_TC.masked_fill(~visible_TC, 0)
    return masked_TC


class IndexScoresReference(Reference):
    """A function of this module as a kernel. The operand is the layout of the entries."""

    def __init__(self, scores: Callable[[IndexQuery, torch.Tensor, PagedRows, EntryPages], torch.Tensor]) -> None:
        self._scores = scores

    def prepare(self, weights: EntryPages) -> EntryPages:
        """Returns the layout unchanged."""
        return weights

    def variant(self, query: IndexQuery, operand: EntryPages) -> None:
        """Returns ``None``: the kernel has no variants."""

    def run(
        self,
        query: IndexQuery,
        keys: torch.Tensor,
        rows: PagedRows,
        operand: EntryPages,
        *,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes scores [T, C], at least float32."""
        return filled(out, self._scores(query, keys, rows, operand))

    def __call__(
        self,
        query: IndexQuery,
        keys: torch.Tensor,
        rows: PagedRows,
        pages: EntryPages = CSA_PAGES,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes scores [T, C]."""
        return filled(out, self._scores(query, keys, rows, pages))


INDEX_SCORES = IndexScoresReference(index_scores)
INDEX_SCORES_FP4 = IndexScoresReference(index_scores_fp4)
