"""Exact top-k of the indexer's scores on Hopper: one launch.

How it works. A row's scores, as integers of the same order, stay in the registers of one program. The threshold, the
k-th best key, is searched between the least and the best: two pivots a pass cut the range to a third, and a count of k
ends the search; usually after 10 to 12 passes. One prefix sum then gives each selected entry its place: all above the
threshold, and of its equals the first ones. A long row is cut into chunks, one program each; the program that finishes
last selects among the chunks' best, which lie in the order of the entries, so that ties are decided as in one piece.

Roofline. 4 bytes a score; at decode sizes the time is the latency of the passes. Limits. K up to 1024, tables of at
most 1,048,576 tokens. The result is exact, so a row's bits depend on nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ownpath.kernels.checks import check, check_rank
from ownpath.kernels.contract import Config
from ownpath.kernels.dsl.driver import current_stream
from ownpath.kernels.dsl.triton import TritonCall, launch
from ownpath.kernels.empty import EmptyOutput
from ownpath.kernels.launch_cache import LaunchCache
from ownpath.kernels.scores.launch import check_rows
from ownpath.kernels.scores.types import CSA_PAGES, EntryPages, PagedRows
from ownpath.kernels.select.search import pool_rows, select_kept, select_large, select_small
from ownpath.kernels.select.types import Selected, SelectWeights
from ownpath.kernels.variants import variant_name

INTERPRETED = triton.knobs.runtime.interpret
MAX_TOPK = 1024
LEAST_SIZE, SMALL_SIZE = 128, 2048
CHUNKS = (4096, 8192, 16384)
"""Scores of a chunk, and the most that the last program of a row selects among. Counts of two pivots share 32 bits."""


@triton.jit
def _finish_row(rows_ptr, num_ptr, flag_ptr, visible, flag, K: tl.constexpr, K_PAD: tl.constexpr):
    """Writes a row's number of entries and its flag, and zeros after its last entry."""
    k = tl.arange(0, K_PAD)
    tl.store(rows_ptr + k, tl.zeros((K_PAD,), tl.int32), mask=(k >= visible) & (k < K))
    tl.store(num_ptr, tl.minimum(visible, K))
    tl.store(flag_ptr, flag)


@triton.jit
def select_kernel(
    scores_ptr,
    positions_ptr,
    blocks_ptr,
    rows_ptr,
    num_ptr,
    flags_ptr,
    workspace_ptr,
    table_blocks,
    RATIO: tl.constexpr,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    SMALL: tl.constexpr,
    SIZE: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNKS_PAD: tl.constexpr,
    KEPT: tl.constexpr,
    HEADER: tl.constexpr,
    PIECE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Selects within one chunk of a row; the row's last program also selects among what its chunks have kept.

    A row's workspace: a counter, a flag for each chunk, HEADER integers in all, then keys and rows [CHUNKS, K] each.
    """
    chunk, t = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    num_columns = table_blocks * ROWS
    scores_ptr, blocks_ptr, selected = scores_ptr + t * num_columns, blocks_ptr + t * table_blocks, rows_ptr + t * K
    position = tl.load(positions_ptr + t)
    start = chunk * SIZE
    # On their way before the row's length is known.
    entry = start + tl.arange(0, SMALL)
    small = tl.load(scores_ptr + entry, mask=entry < num_columns, other=0.0)
    small_rows = pool_rows(blocks_ptr, entry, entry < num_columns, ROWS)
    visible = tl.minimum((position + 1) // RATIO, num_columns)
    num_chunks = tl.maximum(tl.cdiv(visible, SIZE), 1)
    if chunk < num_chunks:
        counter = workspace_ptr + t * (HEADER + 2 * CHUNKS * K)
        kept_keys = counter + HEADER
        kept_rows = kept_keys + CHUNKS * K
        is_split, num = num_chunks > 1, tl.minimum(visible - start, SIZE)
        goal, goal_keys = selected, kept_keys + chunk * K
        if CHUNKS > 1 and is_split:
            goal = kept_rows + chunk * K
        if SIZE > SMALL and num > SMALL:
            flag = select_large(scores_ptr, blocks_ptr, goal, goal_keys, start, num, K, SIZE, PIECE, ROWS, CHUNKS > 1)
        else:
            flag = select_small(small, small_rows, goal, goal_keys, num, K, SMALL, CHUNKS > 1)
        if CHUNKS > 1 and is_split:
            tl.store(counter + 1 + chunk, flag)
            tl.debug_barrier()  # the counter tells the row's other programs of everything above
            if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == num_chunks - 1:
                num_kept = (num_chunks - 1) * K + tl.minimum(visible - (num_chunks - 1) * SIZE, K)
                if KEPT > SIZE and num_kept > SIZE:
                    select_kept(kept_keys, kept_rows, selected, num_kept, K, KEPT, PIECE)
                else:
                    select_kept(kept_keys, kept_rows, selected, num_kept, K, min(SIZE, KEPT), PIECE)
                c = tl.arange(0, CHUNKS_PAD)
                flags = tl.load(counter + 1 + c, mask=c < num_chunks, other=0, cache_modifier=".cg")
                _finish_row(selected, num_ptr + t, flags_ptr + t, visible, tl.max(flags, axis=0), K, K_PAD)
                tl.store(counter, 0)
        else:
            _finish_row(selected, num_ptr + t, flags_ptr + t, visible, flag, K, K_PAD)


class ChunkPlan(NamedTuple):
    """The cut of a row: ``num_chunks`` chunks of ``size`` scores; ``kept``: the most that their best are, in all.

    record: integers of a row's workspace, of which ``header`` are its counter and flags.
    """

    size: int
    num_chunks: int
    kept: int
    header: int
    record: int

    @property
    def num_warps(self) -> int:
        return 4 if max(self.size, self.kept) <= 4096 else 8


def plan_chunks(num_scores: int, topk: int) -> ChunkPlan:
    """Chooses the chunks of rows of up to ``num_scores``: the least work in sequence.

    Errors: ValueError for rows longer than the chunks' best fit into one program.
    """
    plans = [_plan(size, triton.cdiv(num_scores, size), topk) for size in CHUNKS]
    fitting = [plan for plan in plans if plan.num_chunks == 1 or plan.kept <= CHUNKS[-1]]
    if not fitting:
        raise ValueError(f"cannot select {topk} of rows of {num_scores} scores")
    if fitting[0].num_chunks == 1:
        return _plan(max(LEAST_SIZE, triton.next_power_of_2(num_scores)), 1, topk)
    return min(fitting, key=lambda plan: plan.size + plan.kept)


def _plan(size: int, num_chunks: int, topk: int) -> ChunkPlan:
    header = 16 * triton.cdiv(1 + num_chunks, 16)
    kept = num_chunks * topk if num_chunks > 1 else 0
    return ChunkPlan(size, num_chunks, kept, header, header + 2 * num_chunks * topk)


SelectCallKey = tuple[torch.Size, int]
"""Shape of the block table, device."""


@dataclass(frozen=True)
class SelectCall:
    """The prepared launch of one size, and its outputs."""

    launch: TritonCall
    outputs: tuple[EmptyOutput, EmptyOutput, EmptyOutput]


@dataclass(frozen=True)
class SelectOperand:
    """launches: by ``SelectCallKey``, for inputs that have passed every check."""

    topk: int
    pages: EntryPages
    launches: LaunchCache[SelectCallKey, SelectCall] = field(default_factory=LaunchCache, compare=False)
    lock: Lock = field(default_factory=Lock, compare=False)


class TritonSelect:
    """Each row's ``topk`` visible entries with the best scores, as rows of the pool in the order of the entries.

    The lower index wins a tie, -0 equals 0, a NaN counts as minus infinity and flags its row.
    """

    def prepare(self, weights: SelectWeights) -> SelectOperand:
        """Makes the operand. Errors: ValueError for a ``topk`` outside 1 to 1024, or blocks not a power of two long."""
        if not 0 < weights.topk <= MAX_TOPK:
            raise ValueError(f"topk is {weights.topk}; this kernel selects 1 to {MAX_TOPK} entries")
        if weights.pages.per_block != triton.next_power_of_2(weights.pages.per_block):
            raise ValueError(f"per_block is {weights.pages.per_block}, not a power of two")
        return SelectOperand(weights.topk, weights.pages)

    def configs(self, operand: SelectOperand) -> Sequence[Config]:
        """Returns nothing: Triton compiles at the first call."""
        return ()

    def variant(self, scores_TC: torch.Tensor, operand: SelectOperand) -> str:
        """Returns the variant's name, which depends on the longest possible row and ``topk``."""
        plan = plan_chunks(scores_TC.shape[1], operand.topk)
        return variant_name("select", k=operand.topk, size=plan.size, chunks=plan.num_chunks)

    def workspace(
        self, operand: SelectOperand, num_rows: int, num_blocks: int, device: torch.device
    ) -> torch.Tensor | None:
        """Allocates zeroed scratch int32 [num_rows, record]; ``None`` where no row is cut."""
        plan = plan_chunks(num_blocks * operand.pages.per_block, operand.topk)
        if plan.num_chunks == 1:
            return None
        return torch.zeros(num_rows, plan.record, dtype=torch.int32, device=device)

    def run(
        self,
        scores_TC: torch.Tensor,
        rows: PagedRows,
        operand: SelectOperand,
        *,
        out: Selected | None = None,
        workspace: torch.Tensor | None = None,
    ) -> Selected:
        """Selects entries. Scores float32 [T, B * per_block]; those that a row does not see are not read.

        Errors: ValueError naming the operand for a wrong shape, dtype, device, stride or alignment.
        """
        check_rank("scores_TC", scores_TC, 2, INTERPRETED)
        device, num_rows = scores_TC.device, len(scores_TC)
        check_rows(rows, num_rows, device)
        width = rows.blocks_TB.shape[1] * operand.pages.per_block
        check("scores_TC", scores_TC, (torch.float32,), (num_rows, width), device)
        plan = plan_chunks(width, operand.topk)
        if workspace is not None:
            _check_workspace(workspace, num_rows, plan, device)
        elif plan.num_chunks > 1:
            workspace = self.workspace(operand, num_rows, rows.blocks_TB.shape[1], device)
        if out is not None:
            _check_selected(out, num_rows, operand.topk, device)
        key = rows.blocks_TB.shape, scores_TC.get_device()
        prepared = operand.launches.get(key)
        if prepared is None:
            return _first(scores_TC, rows, operand, plan, out or _new_selected(scores_TC, operand.topk), workspace)
        out = Selected(*(empty.new() for empty in prepared.outputs)) if out is None else out
        addresses = [tensor.data_ptr() for tensor in (scores_TC, *rows, *out)]
        with operand.lock:
            scratch = addresses[3] if workspace is None else workspace.data_ptr()
            prepared.launch.start(current_stream(key[1]), *addresses, scratch)
        return out

    def __call__(
        self,
        scores_TC: torch.Tensor,
        rows: PagedRows,
        topk: int,
        pages: EntryPages = CSA_PAGES,
        out: Selected | None = None,
    ) -> Selected:
        """Computes ``run`` with the signature of the twin."""
        return self.run(scores_TC, rows, self.prepare(SelectWeights(topk, pages)), out=out)


def _check_workspace(workspace: torch.Tensor, num_rows: int, plan: ChunkPlan, device: torch.device) -> None:
    if len(workspace) < num_rows:
        raise ValueError(f"workspace is for {len(workspace)} rows, found {num_rows}")
    check("workspace", workspace, (torch.int32,), (len(workspace), plan.record), device)


def _check_selected(out: Selected, num_rows: int, topk: int, device: torch.device) -> None:
    check("out.rows_TK", out.rows_TK, (torch.int32,), (num_rows, topk), device)
    check("out.num_T", out.num_T, (torch.int32,), (num_rows,), device)
    check("out.non_finite_T", out.non_finite_T, (torch.int32,), (num_rows,), device)


def _new_selected(scores_TC: torch.Tensor, topk: int) -> Selected:
    shapes = (len(scores_TC), topk), (len(scores_TC),), (len(scores_TC),)
    return Selected(*(torch.empty(shape, dtype=torch.int32, device=scores_TC.device) for shape in shapes))


def _first(
    scores_TC: torch.Tensor,
    rows: PagedRows,
    operand: SelectOperand,
    plan: ChunkPlan,
    out: Selected,
    workspace: torch.Tensor | None,
) -> Selected:
    """Launches through Triton, which compiles, and caches the launch of this size."""
    num_rows, pdl, topk, pages = len(scores_TC), not INTERPRETED, operand.topk, operand.pages
    if not num_rows:
        return out
    scratch = out.rows_TK if workspace is None else workspace
    call = launch(
        select_kernel,
        (plan.num_chunks, num_rows),
        (scores_TC, *rows, *out, scratch, rows.blocks_TB.shape[1]),
        {
            "RATIO": pages.ratio,
            "ROWS": pages.per_block,
            "K": topk,
            "K_PAD": triton.next_power_of_2(topk),
            "SMALL": min(SMALL_SIZE, plan.size),
            "SIZE": plan.size,
            "CHUNKS": plan.num_chunks,
            "CHUNKS_PAD": triton.next_power_of_2(plan.num_chunks),
            "KEPT": triton.next_power_of_2(max(plan.kept, 1)),
            "HEADER": plan.header,
            "PIECE": SMALL_SIZE,
            "PDL": pdl,
            "num_warps": plan.num_warps,
            "launch_pdl": pdl,
        },
        moving=range(7),
    )
    if call is not None:
        first, second, third = (EmptyOutput(part.shape, part.dtype, part.get_device()) for part in out)
        operand.launches.add((rows.blocks_TB.shape, scores_TC.get_device()), SelectCall(call, (first, second, third)))
    return out


SELECT = TritonSelect()
