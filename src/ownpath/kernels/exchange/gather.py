"""Rows or columns of all ranks on GPUs that map each other's memory: pushed, awaited and copied in one launch.

``layout`` has the protocol, ``rows`` the device code. Bits travel as they are, in any dtype of 2, 4 or 8 bytes. Up to
three tensors of as many rows go together: a token with its experts and their weights.

Roofline: (N - 1) times a rank's bytes leave it, and as many arrive; what has arrived is written once more.

Limits. Every rank calls it in the same order with tensors of the same shapes, which is not checked: a rank that does
not know others' rows cannot ask for them without a trip. Where a rank was lost, the others' part of the output is NaN.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock

import torch
import triton
from torch import Tensor

from ownpath.kernels.checks import check, check_rank
from ownpath.kernels.contract import Config
from ownpath.kernels.dsl.driver import current_stream
from ownpath.kernels.dsl.triton import TritonCall, launch
from ownpath.kernels.exchange.layout import SHARE_MULTIPLE
from ownpath.kernels.exchange.rows import gather_rows
from ownpath.kernels.exchange.window import INTERPRETED, Window
from ownpath.kernels.launch_cache import LaunchCache
from ownpath.kernels.variants import variant_name

MAX_PARTS = 3
MAX_BLOCK = 4096
"""Words of a program's step: two loads of 16 bytes in each of 256 threads."""

GatherKey = tuple[tuple[tuple[torch.Size, torch.dtype], ...], bool]
"""Shape and dtype of each tensor; True by columns."""


@dataclass(frozen=True)
class GatherOperand:
    """launches: for tensors that have passed every check."""

    window: Window
    launches: LaunchCache[GatherKey, TritonCall] = field(default_factory=LaunchCache, compare=False)
    lock: Lock = field(default_factory=Lock, compare=False)


def as_words(x: Tensor) -> Tensor:
    """Returns the elements as words of 16 bits, whatever they mean."""
    return x.view(torch.int16).view(-1)


def starts_of(xs: Sequence[Tensor]) -> list[int]:
    """Returns where each tensor begins in a rank's place of an inbox, in words, and behind them the words in all."""
    starts = [0]
    for x in xs:
        num_words = x.numel() * x.itemsize // 2
        starts.append(starts[-1] + -(-num_words // SHARE_MULTIPLE) * SHARE_MULTIPLE)
    return starts


def start_gather(
    window: Window, xs: Sequence[Tensor], outs: Sequence[Tensor], by_columns: bool, pushes: bool, takes: bool
) -> TritonCall | None:
    """Launches, and returns the prepared launch. pushes, takes: both halves in one launch, or one of them. Later calls
    move xs and outs, each three."""
    share = max(window.layout.share(as_words(x).numel()) for x in xs)
    block, starts = min(MAX_BLOCK, int(triton.next_power_of_2(share))), starts_of(xs)
    given, taken = (padded([as_words(x) for x in tensors]) for tensors in (xs, outs))
    counts = [as_words(x).numel() if idx < len(xs) else 0 for idx, x in enumerate(padded(xs))]
    width = xs[0].shape[1] * xs[0].itemsize // 2
    ends = [starts[idx] if idx < len(xs) else 0 for idx in (1, 2)]
    options = {
        "PARTS": len(xs),
        "COLUMNS": by_columns,
        "PUSHES": pushes,
        "TAKES": takes,
        "BLOCK": block,
        "PDL": not INTERPRETED,
        "num_warps": max(1, min(8, block // 256)),
        "launch_pdl": not INTERPRETED,
    }
    tensors = *given, *taken, window.words, window.peers, window.record
    arguments = *tensors, window.rank, *counts, *ends, width, window.layout.max_elements
    return launch(
        gather_rows, (window.layout.num_programs,), arguments, options | window.constants(), moving=range(2 * MAX_PARTS)
    )


def padded(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns ``MAX_PARTS`` tensors: the first one again in the place of those that are not there."""
    return [*tensors, *[tensors[0]] * (MAX_PARTS - len(tensors))]


class PushedGather:
    """The rows or columns of all ranks, in the order of ranks. Every rank calls it in the same order with tensors of
    the same shapes."""

    def prepare(self, window: Window) -> GatherOperand:
        """Makes the operand. Exchanges of one window share its epochs: all are on one stream."""
        return GatherOperand(window)

    def configs(self, operand: GatherOperand) -> Sequence[Config]:
        """Returns nothing: Triton compiles at the first call."""
        return ()

    def variant(self, x_TC: Tensor, operand: GatherOperand) -> str:
        """Returns the variant's name, which depends on the number of elements."""
        share = operand.window.layout.share(x_TC.numel() * x_TC.itemsize // 2)
        return variant_name("pushed", block=min(MAX_BLOCK, int(triton.next_power_of_2(share))))

    def run(self, x_TC: Tensor, operand: GatherOperand, *, dim: int = -1, out: Tensor | None = None) -> Tensor:
        """Returns all ranks' columns [T, N * C] (dim -1), or rows [N * T, C] (dim 0), of x [T, C], which is 2, 4 or 8
        bytes an element.

        Errors: ValueError naming the operand for a wrong shape, dtype, device, stride or alignment, or a size beyond
        the window, before any launch.
        """
        if dim not in (-1, 0, 1):
            raise ValueError(f"dim must be 0, or -1 for columns, found {dim}")
        (gathered,) = self._gather((x_TC,), operand, None if out is None else (out,), by_columns=dim != 0)
        return gathered

    def rows(
        self, xs: Sequence[Tensor], operand: GatherOperand, *, outs: Sequence[Tensor] | None = None
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Returns all ranks' rows of each of up to three tensors, and how many each rank has: as many as this one.

        Errors: as ``run``.
        """
        gathered = self._gather(tuple(xs), operand, outs, by_columns=False)
        return gathered, (len(xs[0]),) * operand.window.layout.size

    def _gather(
        self, xs: tuple[Tensor, ...], operand: GatherOperand, outs: Sequence[Tensor] | None, by_columns: bool
    ) -> tuple[Tensor, ...]:
        check_gathered(xs, operand.window)
        size = operand.window.layout.size
        shapes = [(len(x), size * x.shape[1]) if by_columns else (size * len(x), x.shape[1]) for x in xs]
        if outs is None:
            outs = [x.new_empty(shape) for x, shape in zip(xs, shapes, strict=True)]
        for x, shape, out in zip(xs, shapes, outs, strict=True):
            check("out", out, (x.dtype,), shape, x.device)
        if len(xs[0]):
            self._start(xs, tuple(outs), operand, by_columns)
        return tuple(outs)

    @staticmethod
    def _start(xs: tuple[Tensor, ...], outs: tuple[Tensor, ...], operand: GatherOperand, by_columns: bool) -> None:
        key = tuple((x.shape, x.dtype) for x in xs), by_columns
        with operand.lock:
            prepared = operand.launches.get(key)
            if prepared is not None:
                addresses = [tensor.data_ptr() for tensor in (*padded(xs), *padded(outs))]
                prepared.start(current_stream(xs[0].get_device()), *addresses)
                return
            call = start_gather(operand.window, xs, outs, by_columns, pushes=True, takes=True)
            if call is not None:
                operand.launches.add(key, call)


def check_gathered(xs: Sequence[Tensor], window: Window) -> None:
    """Checks a rank's tensors. Errors: ValueError naming the one that does not fit."""
    if not 1 <= len(xs) <= MAX_PARTS:
        raise ValueError(f"1 to {MAX_PARTS} tensors are gathered together, found {len(xs)}")
    for idx, x in enumerate(xs):
        name = "x_TC" if len(xs) == 1 else f"tensor {idx}"
        check_rank(name, x, 2, INTERPRETED)
        if x.itemsize not in (2, 4, 8):
            raise ValueError(f"{name} must have 2, 4 or 8 bytes an element, found {x.dtype}")
        check(name, x, (x.dtype,), (len(xs[0]), x.shape[1]), window.words.device)
    window.require_room(starts_of(xs)[-1])


PUSHED_GATHER = PushedGather()
