"""Attention over chunks: one launch, each row and up to 64 of its heads at a time.

How it works. Queries are normed and rotated as they are loaded and kept in shared memory. Keys come in tiles of 64:
first the window's, rows of ``near`` that follow each other, then the entries', rows of the pool that a list or a table
names; a key is read once, for scores and for values. Softmax runs in float32. The epilogue divides, rotates back and
rounds. Neighbouring rows run at the same time and find most of their keys in L2.

Three forms. On Hopper, with 64 heads or more, a program an SM takes rows in turn: warps that bring keys, BF16 or of
FP8 pages, run ahead of those that make weights, and these of those that sum over values (``hopper``, ``producer``,
``halves``). Where rows have their window alone, the program keeps it from row to row (``window``, ``queries``). Where
the keys' norms bound the scores, no maximum is taken away from them. Elsewhere a program has one row, and Triton lays
it out (``kernel``).

Roofline. 4 * N * H flops a key on the tensor cores; where a row has 128 keys alone, its queries and results: 4 * N * H
bytes. 64 heads by 512 channels of float32 sums are half of an SM's registers, 64 queries and two tiles of keys nearly
all of its shared memory. Limits. H = 512 with 64 rotary channels, up to 128 heads. No part of a row's work depends on
another row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime.jit import JITFunction

from ownpath.kernels.attend.checks import check_out
from ownpath.kernels.attend.types import WINDOW_ROWS, AttendWeights
from ownpath.kernels.checks import VECTOR_BYTES, is_dense
from ownpath.kernels.chunks.checks import check_call
from ownpath.kernels.chunks.hopper import attend_chunk_hopper_kernel
from ownpath.kernels.chunks.kernel import attend_chunk_kernel
from ownpath.kernels.chunks.types import ChunkKeys, ChunkRows
from ownpath.kernels.chunks.window import attend_chunk_window_kernel
from ownpath.kernels.contract import Config
from ownpath.kernels.dsl.driver import current_stream
from ownpath.kernels.dsl.triton import TritonCall, launch
from ownpath.kernels.empty import EmptyOutput
from ownpath.kernels.launch_cache import LaunchCache
from ownpath.kernels.variants import variant_name

INTERPRETED = triton.knobs.runtime.interpret
LOG2E = 1.4426950408889634
HOPPER_HEADS, FEW_HEADS = 64, 16
WARPS, TILE, STAGES = 8, 64, 2
NUM_SMS = 132
"""Of an H200: programs on Hopper, one an SM, take rows in turn."""
REGISTERS, SCORE_REGISTERS = (72, 112), (104, 80)
"""Of a thread that brings keys, BF16 or FP8, and of one that makes weights beside it."""


class ChunkForm(NamedTuple):
    """The form of a call. is_window: Hopper's, for windows alone. heads: of a program. tile, stages: keys of a tile,
    and tiles on their way, where Triton lays them out."""

    is_hopper: bool
    is_window: bool
    heads: int
    tile: int = TILE
    stages: int = STAGES

    @property
    def function(self) -> "JITFunction[Any]":
        """The Triton or Gluon function."""
        if not self.is_hopper:
            return attend_chunk_kernel
        return attend_chunk_window_kernel if self.is_window else attend_chunk_hopper_kernel


class ChunkArguments(NamedTuple):
    """The tensors of a call. An absent one is replaced by one that is not read."""

    q_TNH: torch.Tensor
    cos_TF: torch.Tensor
    sin_TF: torch.Tensor
    near_WH: torch.Tensor
    entries: torch.Tensor
    positions_T: torch.Tensor
    places_T: torch.Tensor
    requests_T: torch.Tensor
    blocks_RB: torch.Tensor
    selected_TK: torch.Tensor
    num_selected_T: torch.Tensor

    @classmethod
    def of(
        cls, q_TNH: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], keys: ChunkKeys, rows: ChunkRows
    ) -> "ChunkArguments":
        entries = keys.near_WH if keys.entries is None else keys.entries
        selection = (rows.positions_T if part is None else part for part in (rows.selected_TK, rows.num_selected_T))
        return cls(q_TNH, *angles, keys.near_WH, entries, *rows[:4], *selection)

    def key(self, ratio: int) -> tuple[object, ...]:
        """Returns the key of the prepared call."""
        others = tuple((tensor.shape, tensor.dtype) for tensor in self[1:])
        return self.q_TNH.shape, self.q_TNH.stride(), self.q_TNH.get_device(), ratio, others

    def addresses(self) -> list[int] | None:
        """Returns their addresses; ``None`` if one is not aligned, or one but q not contiguous."""
        found, together = [tensor.data_ptr() for tensor in self], 0
        for address in found:
            together |= address
        return None if together % VECTOR_BYTES or not all(tensor.is_contiguous() for tensor in self[1:]) else found


@dataclass(frozen=True)
class ChunkCall:
    """The prepared launch of one form of call."""

    attend: TritonCall
    out: EmptyOutput


@dataclass(frozen=True)
class ChunkOperand:
    """launches: by ``ChunkArguments.key``, for arguments that have passed every check."""

    weights: AttendWeights
    launches: LaunchCache[tuple[object, ...], ChunkCall] = field(default_factory=LaunchCache, compare=False)
    lock: Lock = field(default_factory=Lock, compare=False)


class TritonAttendChunk:
    """Attention of chunks over near keys and entries. on_hopper: runs calls that fit in the form of Hopper's own."""

    def __init__(self, on_hopper: bool) -> None:
        self._on_hopper = on_hopper

    def prepare(self, weights: AttendWeights) -> ChunkOperand:
        """Makes the operand. The first call raises for weights that do not fit."""
        return ChunkOperand(weights)

    def configs(self, operand: ChunkOperand) -> Sequence[Config]:
        """Returns nothing: Triton compiles at the first call."""
        return ()

    def form(self, q_TNH: torch.Tensor, keys: ChunkKeys) -> ChunkForm:
        """Returns the form of a call, which depends on heads and formats alone."""
        num_heads = q_TNH.shape[1]
        if self._on_hopper and num_heads >= HOPPER_HEADS:
            return ChunkForm(True, keys.ratio == 0, HOPPER_HEADS)
        return ChunkForm(False, False, FEW_HEADS if num_heads <= FEW_HEADS else HOPPER_HEADS)

    def variant(self, q_TNH: torch.Tensor, keys: ChunkKeys, rows: ChunkRows, operand: ChunkOperand) -> str:
        """Returns the variant's name."""
        form = self.form(q_TNH, keys)
        name = "attend_chunk_hopper" if form.is_hopper else "attend_chunk"
        return variant_name(name, ratio=keys.ratio, fp8=keys.is_fp8, heads=form.heads)

    def run(
        self,
        q_TNH: torch.Tensor,
        cos_TF: torch.Tensor,
        sin_TF: torch.Tensor,
        keys: ChunkKeys,
        rows: ChunkRows,
        operand: ChunkOperand,
        *,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes o [T, N, H] bfloat16, contiguous. q: its rows and heads at multiples of 16 bytes.

        Errors: ValueError naming the argument for a wrong shape, dtype, device, stride or alignment.
        """
        arguments = ChunkArguments.of(q_TNH, (cos_TF, sin_TF), keys, rows)
        key = arguments.key(keys.ratio)
        call, addresses = operand.launches.get(key), arguments.addresses()
        if call is None or addresses is None:
            return self._first(arguments, (keys, rows), operand, out)
        if out is None:
            out = call.out.new()
        elif out.shape != q_TNH.shape or not is_dense(out, torch.bfloat16) or out.get_device() != key[2]:
            check_out(out, q_TNH)
        with operand.lock:
            call.attend.start(current_stream(q_TNH.get_device()), *addresses, out.data_ptr())
        return out

    def __call__(
        self,
        q_TNH: torch.Tensor,
        cos_TF: torch.Tensor,
        sin_TF: torch.Tensor,
        keys: ChunkKeys,
        rows: ChunkRows,
        weights: AttendWeights,
    ) -> torch.Tensor:
        """Computes ``run`` with the signature of the twin."""
        return self.run(q_TNH, cos_TF, sin_TF, keys, rows, self.prepare(weights))

    def _first(
        self,
        arguments: ChunkArguments,
        given: tuple[ChunkKeys, ChunkRows],
        operand: ChunkOperand,
        out: torch.Tensor | None,
    ) -> torch.Tensor:
        """Checks everything, launches, and caches the launch of this form of call."""
        (keys, rows), q_TNH = given, arguments.q_TNH
        check_call(q_TNH, (arguments.cos_TF, arguments.sin_TF), keys, rows, operand.weights, INTERPRETED)
        if out is None:
            out = torch.empty(q_TNH.shape, dtype=q_TNH.dtype, device=q_TNH.device)
        check_out(out, q_TNH)
        if len(q_TNH):
            call = _launch(arguments, keys, self.form(q_TNH, keys), operand.weights, out)
            if call is not None:
                made = EmptyOutput(q_TNH.shape, q_TNH.dtype, q_TNH.get_device())
                operand.launches.add(arguments.key(keys.ratio), ChunkCall(call, made))
        return out


def _launch(
    arguments: ChunkArguments, keys: ChunkKeys, form: ChunkForm, weights: AttendWeights, out: torch.Tensor
) -> TritonCall | None:
    num_rows, num_heads, _ = arguments.q_TNH.shape
    widths = arguments.blocks_RB.shape[1], arguments.selected_TK.shape[-1]
    most_entries = widths[1] if keys.ratio == 4 else widths[0] * keys.per_block
    sizes: tuple[int, ...] = (*arguments.q_TNH.stride()[:2], *widths, most_entries, num_heads)
    block_bits = (keys.per_block or WINDOW_ROWS).bit_length() - 1
    num_parts = triton.cdiv(num_heads, form.heads) * num_rows
    constants: dict[str, int] = {"RATIO": keys.ratio, "BLOCK_BITS": block_bits}
    if form.is_window:
        constants = {}
    constants |= {"STEPWISE": weights.is_stepwise}
    if form.is_hopper:
        sizes = *sizes, num_parts
        constants |= {"BOUNDED": weights.is_bounded, "REGISTERS": REGISTERS[keys.is_fp8]}
        if not form.is_window:
            constants |= {"FP8": keys.is_fp8, "SCORE_REGISTERS": SCORE_REGISTERS[keys.is_fp8]}
    else:
        constants |= {"N": form.heads, "FP8": keys.is_fp8, "TILE": form.tile, "STAGES": form.stages}
    return launch(
        form.function,
        (min(num_parts, NUM_SMS) if form.is_hopper else num_parts,),
        (*arguments, weights.sink_N, out, *sizes, weights.softmax_scale * LOG2E, weights.eps),
        constants | {"num_warps": WARPS},
        moving=(*range(len(arguments)), len(arguments) + 1),
    )


ATTEND_CHUNK = TritonAttendChunk(on_hopper=False)
"""Attention over chunks, laid out by Triton."""
ATTEND_CHUNK_HOPPER = TritonAttendChunk(on_hopper=True)
"""Attention over chunks; on Hopper's own form where a call fits it."""
