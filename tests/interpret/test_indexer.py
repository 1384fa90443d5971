"""The indexer's scores and their selection, interpreted, against float64 and a stable sort."""

from typing import Any

import pytest
import torch
from support.indexer_cases import (
    PAGES,
    POOLS,
    SCORES,
    hide_unseen,
    in_every_form,
    make_fp4_pages,
    make_keys,
    make_pages,
    make_query,
    make_rows,
    unset,
)

from ownpath.conformance.indexer import judge_scores, judge_selected
from ownpath.kernels.cache_formats.ref import fp4_index
from ownpath.kernels.registry import KERNELS
from ownpath.kernels.scores import launch as scores_launch
from ownpath.kernels.scores.ref import index_scores, visible_entries
from ownpath.kernels.scores.types import EntryPages, IndexQuery, PagedRows
from ownpath.kernels.select.launch import plan_tree
from ownpath.kernels.select.types import Selected, SelectWeights

CPU = torch.device("cpu")
SCORE, SELECT = KERNELS["triton.index_scores"], KERNELS["triton.select"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("num_heads", [1, 4, 64])
@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make_pool", POOLS)
def test_scores(num_heads: int, weights_dtype: torch.dtype, make_pool: Any) -> None:
    """Right wherever a row sees an entry, nothing written elsewhere, and no read of memory that is not the row's."""
    g = generator(num_heads)
    rows = make_rows((0, 700, 2, 3, 258, 511), 4, 12, g)
    query, keys = make_query(6, num_heads, weights_dtype, g), make_pool(rows, 12, g)
    out = SCORE(query, keys, rows, out=torch.full((6, 256), torch.nan))
    judge_scores(out, query, keys, rows)
    assert out[~visible_entries(rows, PAGES)].isnan().all()


@pytest.mark.parametrize("kernel", ["triton.index_scores_fp4", "ref.index_scores_fp4", "ref.index_scores"])
@pytest.mark.parametrize("make_pool", POOLS)
def test_other_scores(kernel: str, make_pool: Any) -> None:
    """FP4 queries as official numerics rounds them, bit for bit, and the twins."""
    g = generator()
    rows = make_rows((700, 3, 0), 3, 6, g)
    query, pool = make_query(3, 4, torch.float32, g), make_pool(rows, 6, g)
    query.q_TIH[0, 1, :64] = 0
    query.q_TIH[0, 2] *= 2.0**-60
    judge_scores(KERNELS[kernel](query, pool, rows), query, pool, rows, is_fp4="fp4" in kernel)


def test_a_twin_reads_both_forms_of_keys() -> None:
    """Codes and scales that bfloat16 holds exactly give the same scores as rows and as pages."""
    g = generator()
    rows = make_rows((700, 3), 3, 6, g)
    query, pages = make_query(2, 4, torch.float32, g), make_pages(rows, 6, g)
    codes, scales = pages[:, :8192].contiguous().view(torch.float8_e4m3fn), pages[:, 8192:].contiguous()
    keys = codes.float().view(-1, 128) * scales.view(torch.float32).view(-1, 1)
    assert torch.equal(index_scores(query, pages, rows), index_scores(query, keys.bfloat16(), rows))


@pytest.mark.parametrize("kernel", ["triton.index_scores_fp4", "ref.index_scores_fp4", "ref.index_scores"])
def test_the_same_values_have_the_same_scores_in_every_form(kernel: str) -> None:
    """Of FP4 keys by FP4 queries, whose products are exact sums; the twins' in any case."""
    g = generator()
    rows = make_rows((700, 3), 3, 6, g)
    query, keys = make_query(2, 4, torch.float32, g), fp4_index(make_keys(rows, 6, g))
    seen = visible_entries(rows, PAGES)
    expected, *found = (KERNELS[kernel](query, pool, rows)[seen] for pool in in_every_form(keys))
    assert expected.isfinite().all()
    assert all(torch.equal(one, expected) for one in found)


@pytest.mark.parametrize("byte", [192, 200, 255])
def test_scales_that_fp4_pages_do_not_have_are_seen(byte: int) -> None:
    """A NaN, and what is too large for the kernel, in any of a key's scales: of that key alone."""
    g = generator()
    rows = make_rows((300,), 2, 4, g)
    query, pages = make_query(1, 4, torch.float32, g), make_fp4_pages(rows, 4, g)
    for block in range(4):
        pages[rows.blocks_TB[0, 0], 64 * 64 + 4 * (7 + block) + block] = byte
    seen = SCORE(query, pages, rows)[0, :75].isnan()
    assert seen.nonzero().flatten().tolist() == [7, 8, 9, 10]


def test_scores_do_not_depend_on_the_grid_or_the_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    g = generator()
    rows = make_rows((1000, 1300), 6, 12, g)
    query, keys = make_query(2, 4, torch.float32, g), make_keys(rows, 12, g)
    whole = SCORE(query, keys, rows)
    monkeypatch.setattr(scores_launch, "NUM_SMS", 1)
    strided = SCORE(query, keys, rows)
    alone = SCORE(
        IndexQuery(*(part[1:].clone() for part in query)), keys, PagedRows(*(part[1:].clone() for part in rows))
    )
    visible_TC = visible_entries(rows, PAGES)
    assert torch.equal(whole[visible_TC], strided[visible_TC])
    assert torch.equal(whole[1, visible_TC[1]], alone[0, visible_TC[1]])


def test_rows_of_one_request_see_their_own_entries() -> None:
    """Rows at consecutive positions, of one table: each has the scores and the selection that it has alone."""
    g = generator()
    last = make_rows((515,), 4, 12, g)
    positions_T = torch.arange(509, 516, dtype=torch.int32)
    rows, topk = PagedRows(positions_T, last.blocks_TB.repeat(7, 1)), 127
    query, keys = make_query(7, 4, torch.float32, g), make_keys(last, 12, g)
    scores_TC = SCORE(query, keys, rows)
    found = SELECT(hide_unseen(scores_TC, rows), rows, topk)
    judge_scores(scores_TC, query, keys, rows)
    assert found.num_T.tolist() == [127] * 7
    for t in range(7):
        own = PagedRows(*(part[t : t + 1].clone() for part in rows))
        alone_TC = SCORE(IndexQuery(*(part[t : t + 1].clone() for part in query)), keys, own)
        visible = (509 + t + 1) // 4
        assert torch.equal(alone_TC[0, :visible], scores_TC[t, :visible])
        alone = SELECT(hide_unseen(alone_TC, own), own, topk)
        assert torch.equal(alone.rows_TK[0], found.rows_TK[t])


@pytest.mark.parametrize("place", ["key", "query", "weight"])
def test_nan_stays_visible(place: str) -> None:
    """A NaN of a row's own operands is in its scores: of one entry, or of all."""
    g = generator()
    rows = make_rows((300,), 2, 4, g)
    query, keys = make_query(1, 4, torch.float32, g), make_keys(rows, 4, g)
    at = rows.blocks_TB[0, 0] * 64 + 7
    {"key": keys[at], "query": query.q_TIH[0, 2], "weight": query.weights_TI[0]}[place][3] = torch.nan
    seen = SCORE(query, keys, rows)[0, :75].isnan()
    assert seen.nonzero().flatten().tolist() == ([7] if place == "key" else list(range(75)))


SIZES = {
    "embedded": (128, 9, (0, 3, 511, 515, 2303)),
    "all of them": (512, 8, (0, 2047, 2043, 2046, 259, 3, 1500, 1024)),
    "8k": (512, 32, (8191, 2047, 2051, 5001)),
    "odd": (100, 5, (399, 403, 1279, 641)),
    "16k": (512, 64, (16383, 8195)),
}
"""topk, blocks of a table, positions."""


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("size", SIZES)
def test_select(size: str, scores: str) -> None:
    topk, width, positions = SIZES[size]
    g = generator()
    rows = make_rows(positions, width, 8 * width + 8, g)
    scores_TC = hide_unseen(SCORES[scores](len(positions), width * 64, g), rows)
    found = SELECT(scores_TC, rows, topk, out=unset(len(positions), topk, CPU))
    judge_selected(found, scores_TC, rows, topk)


@pytest.mark.parametrize(("topk", "scores"), [(128, "non-finite"), (512, "ties"), (512, "equal")])
def test_select_of_long_rows(topk: int, scores: str) -> None:
    """Trees of one leaf, of two, of three levels, a last leaf of fewer than ``topk``; the workspace is left ready."""
    width, positions = 160, (0, 8195, 33000)
    tree = plan_tree(width * 64, topk)
    assert (tree.leaves, tree.fan) == (5, 2048 // topk)
    g = generator()
    rows, operand = make_rows(positions, width, 600, g), SELECT.prepare(SelectWeights(topk))
    workspace = SELECT.workspace(operand, len(positions) + 1, width, CPU)
    for seed in range(2 if scores == "equal" else 1):  # the workspace is left ready
        scores_TC = hide_unseen(SCORES[scores](len(positions), width * 64, generator(seed)), rows)
        found = SELECT.run(scores_TC, rows, operand, out=unset(len(positions), topk, CPU), workspace=workspace)
        judge_selected(found, scores_TC, rows, topk)
        assert not workspace[:, : tree.header].any()


@pytest.mark.parametrize("width", [129, 512, 4096])
@pytest.mark.parametrize("topk", [1, 100, 128, 512, 513, 1024])
def test_what_children_keep_fits_into_their_parent(width: int, topk: int) -> None:
    tree = plan_tree(width * 64, topk)
    assert tree.leaves * tree.size >= width * 64
    assert 4 * topk <= tree.size
    assert topk * tree.fan <= tree.size
    assert tree.leaves < tree.nodes
    assert tree.nodes - tree.leaves < tree.header


def test_every_score_decides() -> None:
    """A permutation of distinct scores selects the permuted entries: no place is favoured but at ties."""
    g = generator()
    rows = make_rows((4095,), 16, 17, g)
    order = torch.randperm(1024, generator=g)
    scores_TC = torch.empty(1, 1024)
    scores_TC[0, order] = torch.arange(1024.0)
    found = SELECT(scores_TC, rows, 128)
    places = {int(rows.blocks_TB[0, entry // 64]) * 64 + entry % 64 for entry in order[-128:].tolist()}
    assert {*found.rows_TK[0].tolist()} == places


def test_no_rows() -> None:
    rows = PagedRows(torch.zeros(0, dtype=torch.int32), torch.zeros(0, 4, dtype=torch.int32))
    query = make_query(0, 4, torch.float32, generator())
    scores_TC = SCORE(query, torch.zeros(64, 128).bfloat16(), rows)
    assert scores_TC.shape == (0, 256)
    assert SELECT(scores_TC, rows, 128).rows_TK.shape == (0, 128)


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("q_TIH", lambda part: part.float()),
        ("q_TIH", lambda part: part[..., :64]),
        ("q_TIH", lambda part: part.transpose(0, 1)),
        ("weights_TI", lambda part: part.half()),
        ("weights_TI", lambda part: part[:, :-1]),
        ("cos_TF", lambda part: part[:, :16]),
        ("sin_TF", lambda part: part.double()),
    ],
)
def test_wrong_queries_are_refused(field: str, wrong: Any) -> None:
    g = generator()
    rows = make_rows((300, 5), 2, 4, g)
    query = make_query(2, 4, torch.float32, g)
    with pytest.raises(ValueError, match=field):
        SCORE(query._replace(**{field: wrong(getattr(query, field))}), torch.zeros(256, 128).bfloat16(), rows)


def test_wrong_keys_rows_and_layouts_are_refused() -> None:
    g = generator()
    rows, query = make_rows((300, 5), 2, 4, g), make_query(2, 4, torch.float32, g)
    keys = torch.zeros(256, 128).bfloat16()
    for name, given in {
        "keys": (query, keys.float(), rows),
        "keys must have shape": (query, keys.view(torch.uint8), rows),
        "positions_T": (query, keys, rows._replace(positions_T=rows.positions_T.long())),
        "blocks_TB": (query, keys, rows._replace(blocks_TB=rows.blocks_TB[:1])),
    }.items():
        with pytest.raises(ValueError, match=name):
            SCORE(*given)
    with pytest.raises(ValueError, match="out"):
        SCORE(query, keys, rows, out=torch.zeros(2, 64))
    with pytest.raises(ValueError, match="per_block"):
        SCORE.prepare(EntryPages(2, 128))


def test_wrong_selections_are_refused() -> None:
    rows = make_rows((300, 5), 160, 4, generator())
    scores_TC, operand = torch.zeros(2, 160 * 64), SELECT.prepare(SelectWeights(512))
    with pytest.raises(ValueError, match="scores_TC"):
        SELECT.run(scores_TC[:, :64].contiguous(), rows, operand)
    with pytest.raises(ValueError, match="scores_TC"):
        SELECT.run(scores_TC.double(), rows, operand)
    with pytest.raises(ValueError, match="workspace"):
        SELECT.run(scores_TC, rows, operand, workspace=SELECT.workspace(operand, 1, 160, CPU))
    with pytest.raises(ValueError, match=r"out\.num_T"):
        SELECT.run(scores_TC, rows, operand, out=unset(2, 512, CPU)._replace(num_T=torch.zeros(3, dtype=torch.int32)))
    for topk in (0, 1025):
        with pytest.raises(ValueError, match="topk"):
            SELECT.prepare(SelectWeights(topk))
    with pytest.raises(ValueError, match="cannot select"):
        plan_tree(64 * 4097, 1024)


def test_outputs_are_returned() -> None:
    rows = make_rows((300, 5), 2, 4, generator())
    out = unset(2, 128, CPU)
    assert SELECT(torch.zeros(2, 128), rows, 128, out=out) is out
    assert isinstance(SELECT(torch.zeros(2, 128), rows, 128), Selected)


@pytest.mark.parametrize("per_sm", [3, 4])
@pytest.mark.parametrize("num_blocks", [1, 3, 32, 512, 4096])
@pytest.mark.parametrize("num_rows", [1, 8, 32, 128, 256, 1000])
def test_programs_of_a_row(num_rows: int, num_blocks: int, per_sm: int) -> None:
    """At least one and at most one a block; no more in all than run at once, but one a row."""
    programs = scores_launch.num_programs(num_rows, num_blocks, per_sm)
    assert 1 <= programs <= num_blocks
    assert programs == 1 or programs * num_rows <= per_sm * scores_launch.NUM_SMS
    assert programs < num_blocks or programs * num_rows <= 3 * scores_launch.NUM_SMS or programs == 1
