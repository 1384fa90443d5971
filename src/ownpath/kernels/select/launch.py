"""Exact top-k of the indexer's scores on Hopper: one launch.

How it works. A row's scores, as integers of the same order, stay in the registers of one program. The threshold, the
k-th best key, is searched between the least and the best: two pivots a pass cut the range to a third, and a count of k
ends the search, usually after 7 to 9 passes. One prefix sum then gives each selected entry its place: all above the
threshold, and of its equals the first ones. A long row is a tree: its leaves are pieces of the row, one program each,
and the program that finishes last of a node's children selects among what they have kept. That lies in the order of the
entries, so that ties are decided as in one piece.

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
from ownpath.kernels.launch_cache import LaunchCache
from ownpath.kernels.scores.launch import check_rows
from ownpath.kernels.scores.types import CSA_PAGES, EntryPages, PagedRows
from ownpath.kernels.select.outputs import SelectOutputs, check_selected, new_selected
from ownpath.kernels.select.search import ordered_keys, select_kept, select_keys
from ownpath.kernels.select.types import Selected, SelectWeights
from ownpath.kernels.variants import variant_name

INTERPRETED = triton.knobs.runtime.interpret
MAX_TOPK = 1024
LEAST_SIZE, MOST_SIZE = 128, 8192
"""Scores of the one program of a short row."""
LEAF_SIZES = (2048, 4096)
"""Scores of a program, up to half as many and up to a quarter as many of which are selected."""
MAX_SCORES = 1 << 18


@triton.jit
def _finish_row(rows_ptr, num_ptr, flag_ptr, visible, flag, K: tl.constexpr, K_PAD: tl.constexpr):
    """Writes a row's number of entries and its flag, and zeros after its last entry."""
    k = tl.arange(0, K_PAD)
    tl.store(rows_ptr + k, tl.zeros((K_PAD,), tl.int32), mask=(k >= visible) & (k < K))
    tl.store(num_ptr, tl.minimum(visible, K))
    tl.store(flag_ptr, flag)


@triton.jit
def _climb(
    state, kept_keys, kept_rows, selected, node, num_nodes, visible,
    K: tl.constexpr, SIZE: tl.constexpr, FAN: tl.constexpr,
):  # fmt: skip
    """Selects at each node whose last child this program is. Returns 1 if it has selected at the root, else 0."""
    first, counter = 0, 1  # of the level: its first node, and the counters of its nodes' parents
    last_kept = tl.minimum(visible - (num_nodes - 1) * SIZE, K)  # by the level's last node; all others keep K
    climbs, is_root = 1, 0
    while climbs != 0:
        parent, parents = node // FAN, tl.cdiv(num_nodes, FAN)
        children = tl.minimum(num_nodes - parent * FAN, FAN)
        tl.debug_barrier()  # the counter tells the other children's programs of everything above
        arrived = tl.atomic_add(state + counter + parent, 1, sem="acq_rel", scope="gpu")
        climbs = 0
        if arrived == children - 1:
            tl.store(state + counter + parent, 0)
            last_children = num_nodes - (parents - 1) * FAN
            last_kept += (last_children - 1) * K
            num = tl.where(parent == parents - 1, last_kept, FAN * K)
            place = (first + num_nodes + parent) * K
            goal = kept_rows + place
            if parents == 1:
                goal = selected
            child = (first + parent * FAN) * K
            select_kept(kept_keys + child, kept_rows + child, num, goal, kept_keys + place, K, SIZE)
            last_kept = tl.minimum(last_kept, K)
            first += num_nodes
            counter += parents
            node, num_nodes = parent, parents
            is_root = (parents == 1).to(tl.int32)
            climbs = 1 - is_root
    return is_root


@triton.jit(do_not_specialize=["table_blocks"])
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
    SIZE: tl.constexpr,
    FAN: tl.constexpr,
    LEAVES: tl.constexpr,
    NODES: tl.constexpr,
    HEADER: tl.constexpr,
    PDL: tl.constexpr,
):
    """Selects among one leaf's scores; the program that finishes last of FAN selects among what they have kept.

    A row's workspace: its flag and a counter for each node that has children, HEADER integers in all, then keys
    [NODES, K] and rows [NODES, K] that leaves and inner nodes have kept, level by level.
    """
    leaf, t = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    num_columns = table_blocks * ROWS
    scores_ptr, blocks_ptr, selected = scores_ptr + t * num_columns, blocks_ptr + t * table_blocks, rows_ptr + t * K
    position = tl.load(positions_ptr + t)
    # On their way before the row's length is known.
    i = tl.arange(0, SIZE)
    entry = leaf * SIZE + i
    scores = tl.load(scores_ptr + entry, mask=entry < num_columns, other=0.0)
    rows = tl.load(blocks_ptr + entry // ROWS, mask=entry < num_columns, other=0) * ROWS + entry % ROWS
    visible = tl.minimum((position + 1) // RATIO, num_columns)
    num_leaves = tl.maximum(tl.cdiv(visible, SIZE), 1)
    if leaf < num_leaves:
        num, goal = tl.minimum(visible - leaf * SIZE, SIZE), selected
        state = workspace_ptr + t * (HEADER + 2 * NODES * K)
        kept_keys = state + HEADER
        kept_rows = kept_keys + NODES * K
        if LEAVES > 1 and num_leaves > 1:
            goal = kept_rows + leaf * K
        keys = ordered_keys(scores, i < num)
        flag = select_keys(keys, rows, num, goal, kept_keys + leaf * K, K, SIZE, LEAVES > 1)
        if LEAVES > 1 and num_leaves > 1:
            if flag != 0:
                tl.atomic_max(state, flag, sem="relaxed")
            if _climb(state, kept_keys, kept_rows, selected, leaf, num_leaves, visible, K, SIZE, FAN) != 0:
                flag = tl.load(state, cache_modifier=".cg")
                tl.store(state, 0)
                _finish_row(selected, num_ptr + t, flags_ptr + t, visible, flag, K, K_PAD)
        else:
            _finish_row(selected, num_ptr + t, flags_ptr + t, visible, flag, K, K_PAD)


class SelectTree(NamedTuple):
    """The tree of a row's programs. size: most scores or kept keys of a node. fan: most children of one.

    leaves: of the longest row; nodes: all in all. record: integers of a row's workspace, of which ``header`` are its
    flag and counters.
    """

    size: int
    fan: int
    leaves: int
    nodes: int
    header: int
    record: int


def plan_tree(num_scores: int, topk: int) -> SelectTree:
    """Plans the tree of rows of up to ``num_scores``. Errors: ValueError for rows that are too long."""
    if num_scores > MAX_SCORES:
        raise ValueError(f"cannot select of rows of {num_scores} scores; the most are {MAX_SCORES}")
    if num_scores <= MOST_SIZE:
        return SelectTree(max(LEAST_SIZE, triton.next_power_of_2(num_scores)), 1, 1, 0, 0, 0)
    size = next(size for size in LEAF_SIZES if topk * 4 <= size)
    fan, leaves = size // topk, triton.cdiv(num_scores, size)
    levels = [leaves]
    while levels[-1] > 1:
        levels.append(triton.cdiv(levels[-1], fan))
    header = 16 * triton.cdiv(1 + sum(levels[1:]), 16)
    return SelectTree(size, fan, leaves, sum(levels), header, header + 2 * sum(levels) * topk)


SelectCallKey = tuple[torch.Size, int]
"""Shape of the block table, device."""


@dataclass(frozen=True)
class SelectCall:
    """The prepared launch of one size, and its outputs."""

    tree: SelectTree
    launch: TritonCall
    outputs: SelectOutputs


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
        tree = plan_tree(scores_TC.shape[1], operand.topk)
        return variant_name("select", k=operand.topk, size=tree.size, leaves=tree.leaves)

    def workspace(
        self, operand: SelectOperand, num_rows: int, num_blocks: int, device: torch.device
    ) -> torch.Tensor | None:
        """Allocates zeroed scratch int32 [num_rows, record]; ``None`` where no row has more than one program."""
        tree = plan_tree(num_blocks * operand.pages.per_block, operand.topk)
        if tree.leaves == 1:
            return None
        return torch.zeros(num_rows, tree.record, dtype=torch.int32, device=device)

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
        if out is not None:
            check_selected(out, num_rows, operand.topk, device)
        key = rows.blocks_TB.shape, scores_TC.get_device()
        prepared = operand.launches.get(key)
        tree = plan_tree(width, operand.topk) if prepared is None else prepared.tree
        if workspace is not None:
            _check_workspace(workspace, num_rows, tree, device)
        elif tree.leaves > 1:
            workspace = self.workspace(operand, num_rows, rows.blocks_TB.shape[1], device)
        if prepared is None:
            out = out or new_selected(num_rows, operand.topk, device)
            return _first(scores_TC, rows, operand, tree, out, workspace)
        out = prepared.outputs.new() if out is None else out
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


def _check_workspace(workspace: torch.Tensor, num_rows: int, tree: SelectTree, device: torch.device) -> None:
    if len(workspace) < num_rows:
        raise ValueError(f"workspace is for {len(workspace)} rows, found {num_rows}")
    check("workspace", workspace, (torch.int32,), (len(workspace), tree.record), device)


def _first(
    scores_TC: torch.Tensor,
    rows: PagedRows,
    operand: SelectOperand,
    tree: SelectTree,
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
        (tree.leaves, num_rows),
        (scores_TC, *rows, *out, scratch, rows.blocks_TB.shape[1]),
        {
            "RATIO": pages.ratio,
            "ROWS": pages.per_block,
            "K": topk,
            "K_PAD": triton.next_power_of_2(topk),
            "SIZE": tree.size,
            "FAN": tree.fan,
            "LEAVES": tree.leaves,
            "NODES": tree.nodes,
            "HEADER": tree.header,
            "PDL": pdl,
            "num_warps": 4 if tree.size <= LEAF_SIZES[-1] else 8,
            "launch_pdl": pdl,
        },
        moving=range(7),
    )
    if call is not None:
        index = scores_TC.get_device()
        outputs = SelectOutputs(num_rows, topk, index)
        operand.launches.add((rows.blocks_TB.shape, index), SelectCall(tree, call, outputs))
    return out


SELECT = TritonSelect()
