"""The indexer's scores and their selection on the device: values, repetition, graphs, invariance."""

from typing import Any

import pytest
import torch
from support.indexer_cases import (
    PAGES,
    POOLS,
    SCORES,
    hide_unseen,
    in_every_form,
    make_keys,
    make_query,
    make_rows,
    unset,
)

from ownpath.conformance.indexer import judge_scores, judge_selected
from ownpath.kernels.cache_formats.ref import fp4_index
from ownpath.kernels.registry import KERNELS
from ownpath.kernels.scores.ref import visible_entries
from ownpath.kernels.scores.types import IndexQuery, PagedRows
from ownpath.kernels.select.launch import plan_tree
from ownpath.kernels.select.types import SelectWeights

pytestmark = pytest.mark.gpu

SCORE, SELECT = KERNELS["triton.index_scores"], KERNELS["triton.select"]
CLUSTER_SELECT = KERNELS["cute.select_sm90"]
POSITIONS = (0, 2, 3, 258, 511, 700, 8191, 16387)
WIDTH, NUM_BLOCKS = 72, 160


def generator(cuda: torch.device, seed: int = 0) -> torch.Generator:
    return torch.Generator(cuda).manual_seed(seed)


@pytest.mark.parametrize("num_heads", [1, 4, 64, 128])
@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make_pool", POOLS)
def test_scores(num_heads: int, weights_dtype: torch.dtype, make_pool: Any, cuda: torch.device) -> None:
    g = generator(cuda, num_heads)
    rows = make_rows(POSITIONS, WIDTH, NUM_BLOCKS, g)
    query, keys = make_query(len(POSITIONS), num_heads, weights_dtype, g), make_pool(rows, NUM_BLOCKS, g)
    operand, visible_TC = SCORE.prepare(PAGES), visible_entries(rows, PAGES)
    found = []
    for _ in range(3):
        out = torch.full((len(POSITIONS), WIDTH * 64), torch.nan, device=cuda)
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        SCORE.run(query, keys, rows, operand, out=out)
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
        judge_scores(out, query, keys, rows)
        assert out[~visible_TC].isnan().all()
        found.append(out[visible_TC])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("num_heads", [4, 64])
@pytest.mark.parametrize("make_pool", POOLS)
def test_scores_of_fp4_queries(num_heads: int, make_pool: Any, cuda: torch.device) -> None:
    """Queries are rounded as official numerics rounds them: one that falls to the other side would be seen."""
    g = generator(cuda, num_heads)
    rows = make_rows(POSITIONS, WIDTH, NUM_BLOCKS, g)
    query, pool = make_query(len(POSITIONS), num_heads, torch.float32, g), make_pool(rows, NUM_BLOCKS, g)
    judge_scores(KERNELS["triton.index_scores_fp4"](query, pool, rows), query, pool, rows, is_fp4=True)


def test_the_same_values_have_the_same_scores_in_every_form(cuda: torch.device) -> None:
    """Of FP4 keys by FP4 queries, whose products are exact sums; every program of the longest row has one block."""
    g = generator(cuda)
    rows = make_rows((16383, 700), 64, 80, g)
    query, keys = make_query(2, 64, torch.float32, g), fp4_index(make_keys(rows, 80, g))
    seen, kernel = visible_entries(rows, PAGES), KERNELS["triton.index_scores_fp4"]
    expected, *found = (kernel(query, pool, rows)[seen] for pool in in_every_form(keys))
    assert expected.isfinite().all()
    assert all(torch.equal(one, expected) for one in found)


def test_scores_of_a_row_do_not_depend_on_its_neighbours(cuda: torch.device) -> None:
    g = generator(cuda)
    rows = make_rows(POSITIONS, WIDTH, NUM_BLOCKS, g)
    query, keys = make_query(len(POSITIONS), 64, torch.float32, g), make_keys(rows, NUM_BLOCKS, g)
    whole = SCORE(query, keys, rows)
    for row in (5, 7):
        part = slice(row, row + 1)
        alone = SCORE(
            IndexQuery(*(one[part].clone() for one in query)), keys, PagedRows(*(one[part].clone() for one in rows))
        )
        seen = visible_entries(rows, PAGES)[row]
        assert torch.equal(alone[0, seen], whole[row, seen])


def test_nan_stays_visible(cuda: torch.device) -> None:
    g = generator(cuda)
    rows = make_rows((8191,), 32, 40, g)
    query, keys = make_query(1, 64, torch.float32, g), make_keys(rows, 40, g)
    keys[rows.blocks_TB[0, 3] * 64 + 9, 100] = torch.nan
    scores_TC = SCORE(query, keys, rows)
    assert scores_TC[0].isnan().nonzero().flatten().tolist() == [3 * 64 + 9]
    assert SELECT(scores_TC, rows, 512).non_finite_T.tolist() == [1]


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize(
    ("topk", "width"), [(128, 12), (100, 5), (512, 32), (512, 64), (512, 512), (1024, 512), (512, 4096), (1024, 4096)]
)
def test_select(topk: int, width: int, scores: str, cuda: torch.device) -> None:
    """Right, every element written, the same again, and the workspace ready for the next call."""
    g = generator(cuda)
    longest = width * 256 - 1
    positions = (longest, 0, 3, longest // 2, 4 * topk + 2, 4 * topk + 3, longest // 3, longest - 4)
    positions = tuple(min(position, longest) for position in positions)
    rows = make_rows(positions, width, 8 * width + 8, g)
    operand = SELECT.prepare(SelectWeights(topk))
    workspace = SELECT.workspace(operand, len(positions) + 1, width, cuda)
    for seed in range(3):
        scores_TC = hide_unseen(SCORES[scores](len(positions), width * 64, generator(cuda, seed)), rows)
        out = unset(len(positions), topk, cuda)
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        SELECT.run(scores_TC, rows, operand, out=out, workspace=workspace)
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
        judge_selected(out, scores_TC, rows, topk)
        assert workspace is None or not workspace[:, : plan_tree(width * 64, topk).header].any()


OUTLIERS = {"high": 1e30, "low": -1e30, "infinite": torch.inf}


@pytest.mark.parametrize("num_rows", [1, 8, 40, 100, 140])
@pytest.mark.parametrize(
    ("topk", "width"), [(512, 65), (1024, 128), (512, 160), (512, 512), (1024, 512), (128, 300), (1, 512)]
)
def test_select_of_long_rows(topk: int, width: int, num_rows: int, cuda: torch.device) -> None:
    """Every kernel that serves long rows: rows of one CTA, of all, shorter than K; hard scores; rows repeat bits."""
    longest = width * 256 - 1
    ends = (longest, 4 * topk + 3, 4 * topk - 1, longest - 5, 16383, 16387, 0, longest // 2, 4 * 4096 + 3)
    positions = [min(ends[row % len(ends)], longest) for row in range(num_rows)]
    rows = make_rows(positions, width, num_rows * width + 8, generator(cuda))
    operand = CLUSTER_SELECT.prepare(SelectWeights(topk))
    assert CLUSTER_SELECT.workspace(operand, num_rows, width, cuda) is None
    kinds = [make(num_rows, width * 64, generator(cuda, topk)) for make in SCORES.values()]
    for outlier in OUTLIERS.values():
        kinds.append(torch.randn(num_rows, width * 64, generator=generator(cuda), device=cuda))
        kinds[-1][:, 5] = outlier
    for scores_TC in kinds:
        hidden_TC = hide_unseen(scores_TC, rows)
        for _ in range(2):
            out = unset(num_rows, topk, cuda)
            CLUSTER_SELECT.run(hidden_TC, rows, operand, out=out)
            judge_selected(out, hidden_TC, rows, topk)


def test_select_of_a_million_tokens(cuda: torch.device) -> None:
    """The longest rows: random, and few distinct values, whose bins hold thousands."""
    rows = make_rows((4096 * 256 - 1, 700000, 16384 * 4 + 3, 900), 4096, 3 * 4096 + 9, generator(cuda))
    for kind in ("normal", "ties", "ordered"):
        scores_TC = hide_unseen(SCORES[kind](4, 4096 * 64, generator(cuda)), rows)
        for topk in (512, 1024):
            judge_selected(CLUSTER_SELECT(scores_TC, rows, topk), scores_TC, rows, topk)


@pytest.mark.parametrize("select", [SELECT, CLUSTER_SELECT], ids=["triton", "cute"])
@pytest.mark.parametrize("width", [32, 512])
def test_a_graph_follows_its_inputs(width: int, select: Any, cuda: torch.device) -> None:
    """Scores and select captured together, replayed for other positions, tables and queries."""
    g = generator(cuda)
    longest = width * 256 - 1
    first, second = (
        make_rows(positions, width, 2 * width + 8, g) for positions in ((longest, 0, 900), (700, longest, 0))
    )
    query, other = (make_query(3, 64, torch.float32, g) for _ in range(2))
    keys = torch.randn((2 * width + 8) * 64, 128, generator=g, device=cuda).bfloat16()
    scored, selected = SCORE.prepare(PAGES), select.prepare(SelectWeights(512))
    scores_TC, out = torch.full((3, width * 64), torch.nan, device=cuda), unset(3, 512, cuda)
    workspace = select.workspace(selected, 3, width, cuda)

    def step() -> None:
        SCORE.run(query, keys, first, scored, out=scores_TC)
        select.run(scores_TC, first, selected, out=out, workspace=workspace)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for kept, new in zip((*first, *query), (*second, *other), strict=True):
        kept.copy_(new)
    graph.replay()
    judge_scores(scores_TC, query, keys, first)
    judge_selected(out, scores_TC, first, 512)
