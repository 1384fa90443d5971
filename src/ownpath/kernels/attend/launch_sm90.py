"""Decode attention on Hopper in the CuTe DSL: one launch where a row's keys stay in a CTA or a cluster, else two.

``attend_sm90`` and ``combine_sm90`` tell how the kernels work. The number of CTAs that share a row's keys depends on T
and the longest context that the arrays allow, never on positions, so a call can be captured; in the invariant kernel on
the ratio alone. A row's bits depend on that number and the row.

Roofline. Bytes: 1024 a key, 584 in FP8 pages. Limits. sm_90a; H = 512 with 64 rotary channels; up to 128 heads; 1 +
spare rows of a request in a call. Positions, slots and block tables must not be written by launches that may start
early.
"""

from collections.abc import Sequence
from ctypes import c_float, c_int
from dataclasses import dataclass, field, replace
from threading import Lock

from torch import Tensor, float32

from ownpath.kernels.attend.arguments import AttendArguments, AttendCallKey
from ownpath.kernels.attend.checks import check_call, check_out, check_workspace
from ownpath.kernels.attend.choose_sm90 import AttendPlan, choose_plan, invariant_plan, most_tiles, reachable_configs
from ownpath.kernels.attend.config_sm90 import HEAD_DIM, TILE_HEADS, AttendCombineConfig
from ownpath.kernels.attend.types import AttendWeights, DecodeKeys, DecodeRows
from ownpath.kernels.contract import Config
from ownpath.kernels.dsl.cache import load
from ownpath.kernels.dsl.driver import Launch, Pointers, current_stream, num_sms
from ownpath.kernels.empty import EmptyOutput
from ownpath.kernels.launch_cache import LaunchCache
from ownpath.kernels.variants import variant_name


class CuteAttendCall:
    """Prepared launches for one form of call: kernels, grids and arguments are in place, addresses come with each.

    out, workspace: what the call allocates if it is not given; ``None`` where no partial sums are written.
    """

    def __init__(self, arguments: AttendArguments, keys: DecodeKeys, plan: AttendPlan, weights: AttendWeights) -> None:
        q_TNH = arguments.q_TNH
        (num_rows, num_heads, _), device = q_TNH.shape, q_TNH.get_device()
        self.num_floats = num_floats(q_TNH, plan)
        self.out = EmptyOutput(q_TNH.shape, q_TNH.dtype, device)
        self.workspace = EmptyOutput((self.num_floats,), float32, device) if self.num_floats else None
        self._pointers = Pointers(13)
        self._sums_bytes = 4 * plan.splits * num_rows * num_heads * HEAD_DIM
        self._sink = weights.sink_N.data_ptr()
        self._is_selected = keys.ratio == 4
        addresses = self._pointers.arguments
        function = load(plan.config(keys, weights.spare), device)
        if plan.merges:
            function = replace(function, cluster=plan.splits)
        width = (arguments.selected_TK if self._is_selected else arguments.blocks_TB).shape[1]
        sizes = (c_int(num_heads), *map(c_int, q_TNH.stride()[:2]), c_int(width))
        reals = (c_float(weights.softmax_scale), c_float(weights.eps))
        grid = (plan.splits, -(-num_heads // TILE_HEADS), num_rows)
        self._launches = [Launch(function, grid, (*addresses, *sizes, *reals))]
        if self.num_floats:
            _, cos, sin, _, _, _, _, _, _, sink, out, sums, stats = addresses
            args = (sums, stats, sink, cos, sin, out, c_int(plan.splits))
            self._launches.append(Launch(load(AttendCombineConfig(), device), (num_heads, num_rows, 1), args))

    def start(self, arguments: AttendArguments, out: Tensor, workspace: int, stream: int) -> None:
        """Launches with these tensors. workspace: address of the partial sums and statistics."""
        q, cos, sin, window, entries, positions, slots, blocks, selected, counts = arguments
        table = selected if self._is_selected else blocks
        self._pointers.set(
            q.data_ptr(), cos.data_ptr(), sin.data_ptr(), window.data_ptr(), entries.data_ptr(), positions.data_ptr(),
            slots.data_ptr(), table.data_ptr(), counts.data_ptr(), self._sink, out.data_ptr(),
            workspace, workspace + self._sums_bytes,
        )  # fmt: skip
        for launch in self._launches:
            launch.start(stream)


@dataclass(frozen=True)
class CuteAttendOperand:
    """calls: by ``AttendCallKey``, for arguments that have passed every check."""

    weights: AttendWeights
    calls: LaunchCache[AttendCallKey, CuteAttendCall] = field(default_factory=LaunchCache, compare=False)
    lock: Lock = field(default_factory=Lock, compare=False)


def num_floats(q_TNH: Tensor, plan: AttendPlan) -> int:
    """Returns the length of the workspace: sums and statistics of each split, unless a cluster merges them."""
    num_rows, num_heads, _ = q_TNH.shape
    return 0 if plan.merges or plan.splits == 1 else plan.splits * num_rows * num_heads * (HEAD_DIM + 2)


class CuteAttend:
    """Attention of decode rows over window and entries. is_invariant: a row's bits do not depend on the others."""

    def __init__(self, is_invariant: bool) -> None:
        self._is_invariant = is_invariant

    def prepare(self, weights: AttendWeights) -> CuteAttendOperand:
        """Makes the operand. The first call raises for weights that do not fit. Errors: ValueError for a norm that
        rounds after every operation."""
        if weights.is_stepwise:
            raise ValueError("is_stepwise: this kernel's norm of queries rounds once")
        return CuteAttendOperand(weights)

    def configs(self, operand: CuteAttendOperand) -> Sequence[Config]:
        """Returns the kernels for every ratio and format: an operand does not know its layer's."""
        return reachable_configs(self._is_invariant, operand.weights.spare)

    def plan(self, q_TNH: Tensor, keys: DecodeKeys, rows: DecodeRows) -> AttendPlan:
        """Returns how a call's keys are shared, which depends on shapes alone."""
        if self._is_invariant:
            return invariant_plan(keys.ratio)
        num_rows, num_heads, _ = q_TNH.shape
        sms, tiles = num_sms(q_TNH.get_device()), most_tiles(keys, rows)
        return choose_plan(max(num_rows, 1), num_heads, tiles, sms, is_fp8=keys.is_fp8)

    def variant(self, q_TNH: Tensor, keys: DecodeKeys, rows: DecodeRows, operand: CuteAttendOperand) -> str:
        """Returns the variant's name."""
        plan = self.plan(q_TNH, keys, rows)
        return variant_name(plan.config(keys, operand.weights.spare).name, splits=plan.splits)

    def workspace(self, q_TNH: Tensor, keys: DecodeKeys, rows: DecodeRows, operand: CuteAttendOperand) -> Tensor | None:
        """Allocates float32 scratch for calls of this form; ``None`` if no partial sums are written."""
        length = num_floats(q_TNH, self.plan(q_TNH, keys, rows))
        return q_TNH.new_empty(length, dtype=float32) if length else None

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
        """Computes o [T, N, H] bfloat16, contiguous. q: its rows and heads at multiples of 16 bytes.

        Errors: ValueError naming the argument for a wrong shape, dtype, device, stride or alignment.
        """
        arguments = AttendArguments.of(q_TNH, cos_TF, sin_TF, keys, rows)
        key = arguments.key(keys.ratio)
        call = operand.calls.get(key)
        if call is None or arguments.addresses() is None:
            check_call(q_TNH, (cos_TF, sin_TF), keys, rows, operand.weights, runs_on_cpu=False)
            if not len(q_TNH):
                return q_TNH.new_empty(q_TNH.shape) if out is None else out
        with operand.lock:
            if call is None:
                plan = self.plan(q_TNH, keys, rows)
                call = operand.calls.add(key, CuteAttendCall(arguments, keys, plan, operand.weights))
            if out is None:
                out = call.out.new()
            else:
                check_out(out, q_TNH)
            scratch = 0
            if call.workspace is not None:
                if workspace is None:
                    workspace = call.workspace.new()
                else:
                    check_workspace(workspace, call.num_floats, q_TNH.device)
                scratch = workspace.data_ptr()
            call.start(arguments, out, scratch, current_stream(key[2]))
        return out

    def __call__(
        self,
        q_TNH: Tensor,
        cos_TF: Tensor,
        sin_TF: Tensor,
        keys: DecodeKeys,
        rows: DecodeRows,
        weights: AttendWeights,
    ) -> Tensor:
        """Computes ``run`` with the signature of the twin."""
        return self.run(q_TNH, cos_TF, sin_TF, keys, rows, self.prepare(weights))


CUTE_ATTEND = CuteAttend(is_invariant=False)
"""Decode attention; splits depend on the number of rows and the longest context."""
CUTE_ATTEND_INVARIANT = CuteAttend(is_invariant=True)
"""Decode attention; splits depend on the ratio alone."""
