"""The twins of the indexer's kernels against attention's own selection, row by row, and against plain Python."""

import pytest
import torch
from support.indexer_cases import PAGES, SCORES, hide_unseen, make_keys, make_query, make_rows

from ownpath.attention.rope import Rotation
from ownpath.attention.select import EntrySelector
from ownpath.kernels.scores.ref import entry_rows, index_scores, visible_entries
from ownpath.kernels.select.ref import select

TOPK = 100


def test_scores_and_selection_are_attentions() -> None:
    """In float64, from the raw projections to the rows of the pool, over paged keys beside NaN."""
    g = torch.Generator().manual_seed(0)
    rows = make_rows((0, 2, 403, 1500, 1023), 6, 20, g)
    query, keys = make_query(5, 4, torch.float32, g), make_keys(rows, 20, g).double()
    query = query._replace(q_TIH=query.q_TIH.double(), weights_TI=query.weights_TI.double())
    found = select(index_scores(query, keys, rows), rows, TOPK)
    rotated_TIH = Rotation(query.cos_TF, query.sin_TF).apply(query.q_TIH)
    weights_TI = query.weights_TI * (128**-0.5 * 4**-0.5)
    for row, rows_C in enumerate(entry_rows(rows.blocks_TB, PAGES.per_block)):
        count = int(visible_entries(rows, PAGES)[row].sum())
        one, seen = slice(row, row + 1), torch.ones(1, count, dtype=torch.bool)
        mask_1C = EntrySelector(TOPK).select(rotated_TIH[one], weights_TI[one], keys[rows_C[:count]], seen)
        wanted = rows_C[:count][mask_1C[0]].tolist()
        assert int(found.num_T[row]) == len(wanted) == min(count, TOPK)
        assert found.rows_TK[row].tolist() == wanted + [0] * (TOPK - len(wanted))
    assert not found.non_finite_T.any()


@pytest.mark.parametrize("scores", SCORES)
def test_selection_is_a_sort_of_pairs(scores: str) -> None:
    g = torch.Generator().manual_seed(1)
    rows = make_rows((0, 3, 399, 403, 1279, 640), 5, 20, g)
    scores_TC = hide_unseen(SCORES[scores](6, 320, g), rows)
    found = select(scores_TC, rows, TOPK)
    for row, position in enumerate(rows.positions_T.tolist()):
        seen = scores_TC[row, : (position + 1) // 4].tolist()
        ranked = sorted(
            range(len(seen)), key=lambda entry: (-seen[entry] if seen[entry] == seen[entry] else torch.inf, entry)
        )
        places = [int(rows.blocks_TB[row, entry // 64]) * 64 + entry % 64 for entry in sorted(ranked[:TOPK])]
        assert found.rows_TK[row, : int(found.num_T[row])].tolist() == places
        assert bool(found.non_finite_T[row]) == (not torch.tensor(seen).isfinite().all())
