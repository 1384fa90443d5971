"""Decode attention in Triton: one launch where a row's keys stay together, two where they are split.

How it works. A program takes one row, 16 or 64 of its heads and a share of its keys, in tiles of 64. It norms and
rotates its queries as it loads them. Tiles come by asynchronous copies, window and entries alike, from rows of the
pools that are looked up one tile ahead; a key is read once, for scores and for values. FP8 keys are decoded in
registers. With splits, float32 sums go to the workspace, and a second launch merges them. The epilogue divides, rotates
back and rounds.

Roofline. A row's keys at 1024 or 584 bytes; from 64 heads on, 4 * N * H flops a key on the tensor cores of one SM for
each split: splits fill the SMs while rows are few. Limits. H = 512 with 64 rotary channels, up to 128 heads, 1 + spare
rows of a request in a call. Splits depend on T and the longest context alone, or in the invariant kernel on the row's
own length alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import NamedTuple

import torch
import triton

from ownpath.kernels.attend.arguments import AttendArguments, AttendCallKey
from ownpath.kernels.attend.checks import check_call, check_out, check_workspace
from ownpath.kernels.attend.triton_attend import attend_kernel, merge_splits_kernel
from ownpath.kernels.attend.types import WINDOW_ROWS, AttendWeights, DecodeKeys, DecodeRows
from ownpath.kernels.checks import is_dense
from ownpath.kernels.contract import Config
from ownpath.kernels.dsl.driver import current_stream
from ownpath.kernels.dsl.triton import TritonCall, launch
from ownpath.kernels.empty import EmptyOutput
from ownpath.kernels.launch_cache import LaunchCache
from ownpath.kernels.variants import variant_name

INTERPRETED = triton.knobs.runtime.interpret
LOG2E = 1.4426950408889634
HEAD_DIM, TILE, RING_TILES = 512, 64, 2
WARPS, MOST_SPLITS = 8, 128
PROGRAMS = 132
"""Programs that run at once on an H200."""
INVARIANT_TILES = 4
"""Tiles of a split whose size does not depend on the call."""


class AttendForm(NamedTuple):
    """The form of a call. heads: of a program. splits: of the keys. chunk: tiles of a split, 0 for equal shares."""

    heads: int
    stages: int
    splits: int
    chunk: int


def most_entries(keys: DecodeKeys, rows: DecodeRows) -> int:
    """Returns how many entries of a row its list, or else its table, has room for."""
    if rows.selected_TK is not None:
        return rows.selected_TK.shape[1]
    return rows.blocks_TB.shape[1] * keys.per_block


def most_tiles(keys: DecodeKeys, rows: DecodeRows) -> int:
    """Returns the tiles of the longest row that the arrays allow."""
    return RING_TILES + -(-most_entries(keys, rows) // TILE)


def choose_form(num_rows: int, num_heads: int, tiles: int, is_fp8: bool) -> AttendForm:
    """Chooses the form from the number of rows and the longest row's tiles, never from positions."""
    few = 32 if tiles == RING_TILES else 8
    heads = 16 if num_heads <= 16 or num_rows * triton.cdiv(num_heads, 64) <= few else 64
    programs = num_rows * triton.cdiv(num_heads, heads)
    splits = 1 if tiles == RING_TILES else min(tiles, MOST_SPLITS, max(1, PROGRAMS // programs))
    return AttendForm(heads, _stages(tiles, is_fp8), splits, 0)


def invariant_form(num_heads: int, keys: DecodeKeys, tiles: int) -> AttendForm:
    """Returns the form whose bits depend on the row alone. Where tiles follow the table's width, there is always a
    merge."""
    heads = 16 if num_heads <= 16 else 64
    least = 2 if keys.ratio == 128 else 1
    splits = max(least, triton.cdiv(tiles, INVARIANT_TILES))
    return AttendForm(heads, _stages(tiles, keys.is_fp8), splits, INVARIANT_TILES)


def _stages(tiles: int, is_fp8: bool) -> int:
    """Returns the pipeline's stages: rows of BF16 entries are looked up one stage ahead."""
    return 2 if is_fp8 or tiles == RING_TILES else 3


@dataclass(frozen=True)
class AttendCall:
    """The prepared launches of one form of call.

    merge, workspace: ``None`` without splits. num_floats: of the workspace. stats_bytes: where its statistics start.
    """

    attend: TritonCall
    merge: TritonCall | None
    out: EmptyOutput
    workspace: EmptyOutput | None
    num_floats: int
    stats_bytes: int


@dataclass(frozen=True)
class AttendOperand:
    """launches: by ``AttendCallKey``, for arguments that have passed every check."""

    weights: AttendWeights
    launches: LaunchCache[AttendCallKey, AttendCall] = field(default_factory=LaunchCache, compare=False)
    lock: Lock = field(default_factory=Lock, compare=False)


class TritonAttend:
    """Attention of decode rows over window and entries. is_invariant: a row's bits do not depend on the others."""

    def __init__(self, is_invariant: bool) -> None:
        self._is_invariant = is_invariant

    def prepare(self, weights: AttendWeights) -> AttendOperand:
        """Makes the operand. The first call raises for weights that do not fit."""
        return AttendOperand(weights)

    def configs(self, operand: AttendOperand) -> Sequence[Config]:
        """Returns nothing: Triton compiles at the first call."""
        return ()

    def form(self, q_TNH: torch.Tensor, keys: DecodeKeys, rows: DecodeRows) -> AttendForm:
        """Returns the form of a call, which depends on shapes alone."""
        num_rows, num_heads, _ = q_TNH.shape
        tiles = most_tiles(keys, rows)
        if self._is_invariant:
            return invariant_form(num_heads, keys, tiles)
        return choose_form(num_rows, num_heads, tiles, keys.is_fp8)

    def variant(self, q_TNH: torch.Tensor, keys: DecodeKeys, rows: DecodeRows, operand: AttendOperand) -> str:
        """Returns the variant's name."""
        form = self.form(q_TNH, keys, rows)
        return variant_name("attend", ratio=keys.ratio, fp8=keys.is_fp8, heads=form.heads, splits=form.splits)

    def workspace(
        self, q_TNH: torch.Tensor, keys: DecodeKeys, rows: DecodeRows, operand: AttendOperand
    ) -> torch.Tensor | None:
        """Allocates float32 scratch for calls of this form; ``None`` if keys are not split."""
        num_floats = self._num_floats(q_TNH, keys, rows)
        return q_TNH.new_empty(num_floats, dtype=torch.float32) if num_floats else None

    def _num_floats(self, q_TNH: torch.Tensor, keys: DecodeKeys, rows: DecodeRows) -> int:
        splits = self.form(q_TNH, keys, rows).splits
        return 0 if splits == 1 else splits * q_TNH.shape[0] * q_TNH.shape[1] * (HEAD_DIM + 2)

    def run(
        self,
        q_TNH: torch.Tensor,
        cos_TF: torch.Tensor,
        sin_TF: torch.Tensor,
        keys: DecodeKeys,
        rows: DecodeRows,
        operand: AttendOperand,
        *,
        out: torch.Tensor | None = None,
        workspace: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes o [T, N, H] bfloat16, contiguous. q: its rows and heads at multiples of 16 bytes.

        Errors: ValueError naming the argument for a wrong shape, dtype, device, stride or alignment.
        """
        arguments = AttendArguments.of(q_TNH, cos_TF, sin_TF, keys, rows)
        key = arguments.key(keys.ratio)
        call, addresses = operand.launches.get(key), arguments.addresses()
        if call is None or addresses is None:
            return self._first(arguments, (keys, rows), operand, out, workspace)
        if out is None:
            out = call.out.new()
        elif out.shape != q_TNH.shape or not is_dense(out, torch.bfloat16) or out.get_device() != key[2]:
            check_out(out, q_TNH)
        if call.merge is None or call.workspace is None:
            scratch = operand.weights.sink_N.data_ptr()
        else:
            if workspace is None:
                workspace = call.workspace.new()
            elif len(workspace) < call.num_floats or not is_dense(workspace, torch.float32):
                check_workspace(workspace, call.num_floats, q_TNH.device)
            scratch = workspace.data_ptr()
        stats = scratch + call.stats_bytes
        stream = current_stream(key[2])
        with operand.lock:
            call.attend.start(stream, *addresses, out.data_ptr(), scratch, stats)
            if call.merge is not None:
                _, cos, sin, _, _, positions, _, _, _, counts = addresses
                call.merge.start(stream, cos, sin, positions, counts, scratch, stats, out.data_ptr())
        return out

    def __call__(
        self,
        q_TNH: torch.Tensor,
        cos_TF: torch.Tensor,
        sin_TF: torch.Tensor,
        keys: DecodeKeys,
        rows: DecodeRows,
        weights: AttendWeights,
    ) -> torch.Tensor:
        """Computes ``run`` with the signature of the twin."""
        return self.run(q_TNH, cos_TF, sin_TF, keys, rows, self.prepare(weights))

    def _first(
        self,
        arguments: AttendArguments,
        given: tuple[DecodeKeys, DecodeRows],
        operand: AttendOperand,
        out: torch.Tensor | None,
        workspace: torch.Tensor | None,
    ) -> torch.Tensor:
        """Checks everything, launches, and caches the launches of this form of call."""
        (keys, rows), q_TNH, weights = given, arguments.q_TNH, operand.weights
        check_call(q_TNH, (arguments.cos_TF, arguments.sin_TF), keys, rows, weights, INTERPRETED)
        if out is None:
            out = torch.empty(q_TNH.shape, dtype=q_TNH.dtype, device=q_TNH.device)
        check_out(out, q_TNH)
        if not len(q_TNH):
            return out
        num_floats = self._num_floats(q_TNH, keys, rows)
        if workspace is None:
            workspace = q_TNH.new_empty(num_floats, dtype=torch.float32)
        check_workspace(workspace, num_floats, q_TNH.device)
        form, num_sums = self.form(q_TNH, keys, rows), num_floats // (HEAD_DIM + 2) * HEAD_DIM
        sums, stats = (workspace, workspace[num_sums:]) if num_floats else (weights.sink_N, weights.sink_N)
        sizes = most_entries(keys, rows), q_TNH.shape[1], form.splits, form.chunk
        attend = _launch_attend(arguments, keys, (form, sizes), weights, (out, sums, stats))
        merge = _launch_merge(arguments, keys.ratio, sizes, weights, (sums, stats, out)) if num_floats else None
        if attend is not None:
            device = q_TNH.get_device()
            empty = EmptyOutput((num_floats,), torch.float32, device) if num_floats else None
            made = EmptyOutput(q_TNH.shape, q_TNH.dtype, device)
            call = AttendCall(attend, merge, made, empty, num_floats, 4 * num_sums)
            operand.launches.add(arguments.key(keys.ratio), call)
        return out


Sizes = tuple[int, int, int, int]
"""Most entries, heads, splits, and tiles of a split."""


def _launch_attend(
    arguments: AttendArguments,
    keys: DecodeKeys,
    chosen: tuple[AttendForm, Sizes],
    weights: AttendWeights,
    written: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> TritonCall | None:
    q_TNH, (form, sizes), pdl = arguments.q_TNH, chosen, not INTERPRETED
    num_rows, num_heads, _ = q_TNH.shape
    widths = arguments.blocks_TB.shape[1], arguments.selected_TK.shape[-1]
    scalars = (*q_TNH.stride()[:2], *widths, *sizes, weights.softmax_scale * LOG2E, weights.eps)
    return launch(
        attend_kernel,
        (triton.cdiv(num_heads, form.heads), form.splits, num_rows),
        (*arguments, weights.sink_N, *written, *scalars),
        {
            "N": form.heads,
            "RATIO": keys.ratio,
            "BLOCK_BITS": (keys.per_block or WINDOW_ROWS).bit_length() - 1,
            "SPARE": weights.spare,
            "FP8": keys.is_fp8,
            "IS_SPLIT": form.splits > 1,
            "STAGES": form.stages,
            "STEPWISE": weights.is_stepwise,
            "PDL": pdl,
            "num_warps": WARPS,
            "launch_pdl": pdl,
        },
        moving=(*range(10), 11, 12, 13),
    )


def _launch_merge(
    arguments: AttendArguments,
    ratio: int,
    sizes: Sizes,
    weights: AttendWeights,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> TritonCall | None:
    (num_rows, num_heads, _), pdl = arguments.q_TNH.shape, not INTERPRETED
    places = arguments.cos_TF, arguments.sin_TF, arguments.positions_T, arguments.num_selected_T
    return launch(
        merge_splits_kernel,
        (num_heads, num_rows),
        (*places, weights.sink_N, *tensors, *sizes),
        {"RATIO": ratio, "PDL": pdl, "num_warps": 4, "launch_pdl": pdl},
        moving=(0, 1, 2, 3, 5, 6, 7),
    )


ATTEND = TritonAttend(is_invariant=False)
"""Decode attention; splits depend on the number of rows and the longest context."""
ATTEND_INVARIANT = TritonAttend(is_invariant=True)
"""Decode attention; splits depend on the row's own length."""
