"""Decode attention on Hopper in the CuTe DSL: one launch where a CTA takes a row's keys alone, two where several do.

``attend_sm90`` and ``combine_sm90`` tell how the kernels work. The number of CTAs that share a row's keys depends on T
and the longest context that the arrays allow, never on positions, so a call can be captured. A call's bits depend on
that number alone.

Roofline. Bytes: 1024 a key. Limits. sm_90a; bfloat16 pools; H = 512 with 64 rotary channels; one row of a request.
"""

from ctypes import c_float, c_int
from dataclasses import dataclass, field
from threading import Lock
from typing import NamedTuple

from torch import Tensor, float32

from ownpath.kernels.attend.config_sm90 import (
    HEAD_DIM,
    TILE_HEADS,
    AttendCombineConfig,
    AttendConfig,
    num_splits,
)
from ownpath.kernels.attend.types import WINDOW_ROWS, AttendWeights, DecodeKeys, DecodeRows
from ownpath.kernels.dsl.cache import load
from ownpath.kernels.dsl.driver import Launch, Pointers, current_stream, num_sms
from ownpath.kernels.launch_cache import LaunchCache


class AttendForm(NamedTuple):
    """The sizes that a prepared call is for. width: blocks or selected rows of a row's table."""

    num_rows: int
    num_heads: int
    q_strides: tuple[int, int]
    per_block: int
    width: int
    selected: bool
    splits: int
    device_index: int


class AttendCall:
    """Prepared launches for one form: kernels, grids and arguments are in place, addresses come with each call."""

    def __init__(self, form: AttendForm, weights: AttendWeights) -> None:
        self._pointers = Pointers(13)
        self._sums = 4 * form.num_rows * form.splits * form.num_heads * HEAD_DIM
        self._sink = weights.sink_N.data_ptr()
        arguments = self._pointers.arguments
        config = AttendConfig(form.per_block, form.selected, form.splits > 1)
        groups = -(-form.num_heads // TILE_HEADS)
        sizes = (c_int(form.num_heads), *map(c_int, form.q_strides), c_int(form.width))
        reals = (c_float(weights.softmax_scale), c_float(weights.eps))
        grid = (groups, form.splits, form.num_rows)
        self._launches = [Launch(load(config, form.device_index), grid, (*arguments, *sizes, *reals))]
        if form.splits > 1:
            _, cos, sin, _, _, _, _, _, _, sink, out, sums, stats = arguments
            combine = load(AttendCombineConfig(), form.device_index)
            args = (sums, stats, sink, cos, sin, out, c_int(form.splits))
            self._launches.append(Launch(combine, (form.num_heads, form.num_rows, 1), args))

    def start(
        self, q: Tensor, angles: tuple[Tensor, Tensor], keys: DecodeKeys, rows: DecodeRows, out: Tensor,
        workspace: int, stream: int,
    ) -> None:  # fmt: skip
        """Launches with the given tensors. workspace: address of the partial sums and statistics."""
        cos, sin = angles
        window = keys.window.data_ptr()
        entries = window if keys.entries is None else keys.entries.data_ptr()
        table = rows.blocks_TB if rows.selected_TK is None else rows.selected_TK
        counts = rows.positions_T if rows.num_selected_T is None else rows.num_selected_T
        self._pointers.set(
            q.data_ptr(), cos.data_ptr(), sin.data_ptr(), window, entries, rows.positions_T.data_ptr(),
            rows.slots_T.data_ptr(), table.data_ptr(), counts.data_ptr(), self._sink, out.data_ptr(),
            workspace, workspace + self._sums,
        )  # fmt: skip
        for launch in self._launches:
            launch.start(stream)


@dataclass(frozen=True)
class CuteAttendOperand:
    """The weights and the calls that were prepared with them."""

    weights: AttendWeights
    calls: LaunchCache[AttendForm, AttendCall] = field(default_factory=LaunchCache)
    lock: Lock = field(default_factory=Lock)


def form_of(q_TNH: Tensor, keys: DecodeKeys, rows: DecodeRows) -> AttendForm:
    """Returns the form of a call."""
    num_rows, num_heads, _ = q_TNH.shape
    row, head, _ = q_TNH.stride()
    selected = rows.selected_TK is not None
    table = rows.blocks_TB if rows.selected_TK is None else rows.selected_TK
    width = table.shape[1]
    most = WINDOW_ROWS
    if keys.entries is not None:
        most += width if selected else width * keys.per_block
    device_index = q_TNH.get_device()
    splits = num_splits(num_rows, -(-num_heads // TILE_HEADS), most, num_sms(device_index))
    per_block = 0 if keys.entries is None else keys.per_block
    return AttendForm(num_rows, num_heads, (row, head), per_block, width, selected, splits, device_index)


class CuteAttend:
    """The kernel object. docs/kernels.md compares it with the Triton form."""

    def prepare(self, weights: AttendWeights) -> CuteAttendOperand:
        """Makes the operand."""
        return CuteAttendOperand(weights)

    def workspace(self, q_TNH: Tensor, keys: DecodeKeys, rows: DecodeRows, operand: CuteAttendOperand) -> Tensor | None:
        """Allocates the partial sums and statistics of a call's splits; ``None`` if there is one."""
        form = form_of(q_TNH, keys, rows)
        if form.splits == 1:
            return None
        return q_TNH.new_empty(form.splits * form.num_rows * form.num_heads * (HEAD_DIM + 2), dtype=float32)

    def run(
        self,
        q_TNH: Tensor,
        cos_TF: Tensor,
        sin_TF: Tensor,
        keys: DecodeKeys,
        rows: DecodeRows,
        operand: CuteAttendOperand,
        *,
        out: Tensor | None = None,
        workspace: Tensor | None = None,
    ) -> Tensor:
        """Computes o [T, N, H] bfloat16."""
        form = form_of(q_TNH, keys, rows)
        with operand.lock:
            call = operand.calls.get(form) or operand.calls.add(form, AttendCall(form, operand.weights))
            if out is None:
                out = q_TNH.new_empty(q_TNH.shape)
            if form.splits > 1 and workspace is None:
                workspace = self.workspace(q_TNH, keys, rows, operand)
            place = 0 if workspace is None else workspace.data_ptr()
            call.start(q_TNH, (cos_TF, sin_TF), keys, rows, out, place, current_stream(form.device_index))
        return out
