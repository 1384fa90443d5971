"""``ownpath bench scores``: the indexer's scores of every visible entry; each call reads another part of a pool."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ownpath.bench.cases import cases_of
from ownpath.bench.floor import Work
from ownpath.bench.kernel import Bound, KernelProblem, case_of, contenders_of, run_kernels
from ownpath.bench.peers.deepgemm import DeepGemm
from ownpath.bench.request import BenchRequest
from ownpath.bench.rotation import num_calls
from ownpath.bench.row import Row
from ownpath.conformance.indexer import judge_scores
from ownpath.formats import KeyFormat
from ownpath.kernels.scores.cases import CASES, ScoresCase
from ownpath.kernels.scores.types import (
    CSA_PAGES,
    FP4_KEY_BYTES,
    FP8_KEY_BYTES,
    INDEX_DIM,
    ROTARY_DIM,
    IndexQuery,
    IndexScoresKernel,
    PagedRows,
)
from ownpath.kernels.spec import KernelSpec
from ownpath.official import Step
from ownpath.ops import OpKind

MOST_SETS, JUDGED_ROWS = 64, 2
BLOCK_TOKENS = CSA_PAGES.per_block * CSA_PAGES.ratio
NAN_BITS = 127
"""E4M3's codes of NaN, without the sign."""
E8M0_ONE = 127
"""The byte of the scale 1."""
KEY_BYTES = {KeyFormat.BF16: 2 * INDEX_DIM, KeyFormat.FP8: FP8_KEY_BYTES, KeyFormat.FP4: FP4_KEY_BYTES}


@dataclass(frozen=True)
class ScoresInputs:
    """A step's queries and tables, and the pool that all sets share."""

    query: IndexQuery
    keys: torch.Tensor
    rows: PagedRows

    @property
    def num_entries(self) -> int:
        return self.rows.blocks_TB.shape[1] * CSA_PAGES.per_block

    def first(self, count: int) -> "ScoresInputs":
        """Returns the first rows."""
        query = IndexQuery(*(part[:count] for part in self.query))
        return ScoresInputs(query, self.keys, PagedRows(*(part[:count] for part in self.rows)))


def measured(asked: BenchRequest) -> Iterator[Row]:
    """Measures case by case."""
    contenders = contenders_of(asked, OpKind.INDEX_SCORES, bind, [DeepGemm()])
    for case in cases_of(asked.shapes, CASES):
        yield from run_kernels(_problems(asked, case), contenders, asked.settings, asked.settings.timer)


def bind(kernel: IndexScoresKernel[object], spec: KernelSpec, sets: Sequence[ScoresInputs]) -> Bound:
    """Binds calls with outputs of their own."""
    operand, device = kernel.prepare(CSA_PAGES), sets[0].keys.device
    outs = [torch.full((len(one.rows.positions_T), one.num_entries), torch.nan, device=device) for one in sets]
    calls = [
        partial(kernel.run, one.query, one.keys, one.rows, operand, out=out)
        for one, out in zip(sets, outs, strict=True)
    ]
    first, is_fp4 = sets[0].first(JUDGED_ROWS), Step.INDEXER in spec.official
    return Bound(calls, lambda: judge_scores(outs[0][:JUDGED_ROWS], first.query, first.keys, first.rows, is_fp4=is_fp4))


def scores_work(case: ScoresCase, num_rows: int) -> Work:
    """Counts a call: every visible key, and its score; a product of each head with each key."""
    num_entries = case.context // CSA_PAGES.ratio
    row_bytes = num_entries * (KEY_BYTES[case.keys] + 4) + 2 * case.num_heads * INDEX_DIM
    return Work(num_rows * row_bytes, 2 * num_rows * num_entries * case.num_heads * INDEX_DIM)


def _problems(asked: BenchRequest, case: ScoresCase) -> Iterator[KernelProblem[ScoresInputs]]:
    counts, g = asked.tokens or case.tokens, asked.settings.generator()
    num_sets = {n: min(num_calls(scores_work(case, n).num_bytes, 2), MOST_SETS) for n in counts}
    # A pool that the sets of any step together more than fill, or as much of it as memory is worth spending on.
    num_blocks = 1 + min(max(n * num_sets[n] for n in counts) * (case.context // BLOCK_TOKENS), 65536)
    keys = draw_keys(num_blocks, case.keys, g)
    for num_rows in counts:
        sets = [_draw(case, num_rows, keys, num_blocks, g) for _ in range(num_sets[num_rows])]
        yield KernelProblem(case_of(asked.settings, "scores", case.label, num_rows, scores_work(case, num_rows)), sets)


def draw_keys(num_blocks: int, form: KeyFormat, g: torch.Generator) -> torch.Tensor:
    """Draws keys: bfloat16 [blocks * 64, 128], or FP8 or FP4 pages uint8 [blocks, 64 * 132 or 68]."""
    per_block = CSA_PAGES.per_block
    if form is KeyFormat.BF16:
        keys = torch.empty(num_blocks * per_block, INDEX_DIM, dtype=torch.bfloat16, device=g.device)
        return keys.normal_(generator=g)
    shape = num_blocks, per_block * KEY_BYTES[form]
    pages = torch.empty(shape, dtype=torch.uint8, device=g.device).random_(0, 256, generator=g)
    if form is KeyFormat.FP4:
        pages[:, per_block * INDEX_DIM // 2 :].bitwise_and_(7).add_(E8M0_ONE - 7)
        return pages
    pages.masked_fill_((pages & NAN_BITS) == NAN_BITS, 0)
    pages[:, per_block * INDEX_DIM :] = torch.full((per_block,), 0.01).view(torch.uint8).to(g.device)
    return pages


def draw_rows(num_rows: int, context: int, num_blocks: int, g: torch.Generator) -> PagedRows:
    """Draws tables of requests that have ``context`` tokens."""
    shape = num_rows, context // BLOCK_TOKENS
    blocks_TB = torch.randint(1, num_blocks, shape, generator=g, device=g.device, dtype=torch.int32)
    return PagedRows(torch.full((num_rows,), context - 1, dtype=torch.int32, device=g.device), blocks_TB)


def _draw(case: ScoresCase, num_rows: int, keys: torch.Tensor, num_blocks: int, g: torch.Generator) -> ScoresInputs:
    normal = partial(torch.randn, generator=g, device=g.device)
    angles_TF = normal(num_rows, ROTARY_DIM // 2) * 100
    query = IndexQuery(
        normal(num_rows, case.num_heads, INDEX_DIM).bfloat16(),
        normal(num_rows, case.num_heads),
        angles_TF.cos(),
        angles_TF.sin(),
    )
    return ScoresInputs(query, keys, draw_rows(num_rows, case.context, num_blocks, g))
