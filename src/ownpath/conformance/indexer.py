"""Judges the indexer's scores and the selection by them.

Legend: T rows, I index heads, C entries of a table, K entries selected.
"""

import torch

from ownpath.conformance.bounds import FLOAT32_ROUND, Exact, assert_allowed, sum_rounding
from ownpath.kernels.cache_formats.ref import fp4_index
from ownpath.kernels.scores.ref import keys_of_rows, visible_entries
from ownpath.kernels.scores.types import CSA_PAGES, EntryPages, IndexQuery, PagedRows
from ownpath.kernels.select.ref import select
from ownpath.kernels.select.types import Selected
from ownpath.numerics import rotate_pairs

WEIGHT_ROUNDINGS = 4
"""Of a head's share: the scale's, the scaled weight's, the product's, and one to spare."""


def exact_scores(query: IndexQuery, keys: torch.Tensor, rows: PagedRows, pages: EntryPages, is_fp4: bool) -> Exact:
    """Computes scores [T, C] in float64 from the queries that the kernel must use, rounded once, and bounds the error.

    A head's product has the error of a float32 sum of 128 products, which relu does not increase. The sum over heads
    adds its own. is_fp4: queries are rounded to FP4 besides.
    """
    q_TIH = rotate_pairs(query.q_TIH, query.cos_TF, query.sin_TF)
    q_TIH = (fp4_index(q_TIH) if is_fp4 else q_TIH).double()
    num_heads, dim = q_TIH.shape[1:]
    weights_TI1 = query.weights_TI.double()[..., None] * (dim**-0.5 * num_heads**-0.5)
    keys_THC = keys_of_rows(keys, rows.blocks_TB, pages.per_block, torch.float64).transpose(1, 2)
    shares_TIC = torch.relu(q_TIH @ keys_THC) * weights_TI1
    magnitude_TC = (q_TIH.abs() @ keys_THC.abs() * weights_TI1.abs()).sum(1)
    heads = sum_rounding(num_heads) + WEIGHT_ROUNDINGS * FLOAT32_ROUND
    return Exact(shares_TIC.sum(1), magnitude_TC * sum_rounding(dim) + shares_TIC.abs().sum(1) * heads)


def judge_scores(
    found_TC: torch.Tensor,
    query: IndexQuery,
    keys: torch.Tensor,
    rows: PagedRows,
    pages: EntryPages = CSA_PAGES,
    *,
    is_fp4: bool = False,
) -> None:
    """Judges the scores of the entries that each row sees. Errors: AssertionError."""
    visible_TC, exact = visible_entries(rows, pages), exact_scores(query, keys, rows, pages, is_fp4)
    if visible_TC.any():
        assert_allowed(found_TC[visible_TC], Exact(exact.value[visible_TC], exact.bound[visible_TC]))


def judge_selected(
    found: Selected, scores_TC: torch.Tensor, rows: PagedRows, topk: int, pages: EntryPages = CSA_PAGES
) -> None:
    """Judges a selection: it is exact. Errors: AssertionError that names the field and the row."""
    for name, part, wanted in zip(Selected._fields, found, select(scores_TC, rows, topk, pages), strict=True):
        wrong = (part != wanted).reshape(len(part), -1).any(1).nonzero().flatten().tolist()
        assert not wrong, f"{name} of rows {wrong[:8]}"
