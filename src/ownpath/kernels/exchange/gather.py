"""Rows or columns of all ranks on GPUs that map each other's memory: pushed and awaited in one launch.

``layout`` has the protocol, ``rows`` the device code. Bits travel as they are, in any dtype of 2, 4 or 8 bytes.
``run`` copies what has arrived to an output. ``rows`` pushes up to three tensors, a token with its experts and their
weights, straight to where they are read, and copies nothing. Few rows or columns travel as tagged words (``tagged``),
which a rank copies to where they are read, in the same launch.

Roofline: (N - 1) times a rank's bytes leave it, and as many arrive; ``run`` writes what has arrived once more.

Limits. Every rank calls it in the same order with tensors of the same shapes, which is not checked: a rank that does
not know others' rows cannot ask for them without a trip. Where a rank was lost, the others' part of an output is NaN,
and rows are whatever was there.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch
import triton
from torch import Tensor

from ownpath.kernels.checks import VECTOR_BYTES, check, check_rank
from ownpath.kernels.contract import Config
from ownpath.kernels.dsl.driver import current_stream
from ownpath.kernels.dsl.triton import TritonCall, launch
from ownpath.kernels.exchange.layout import SHARE_MULTIPLE
from ownpath.kernels.exchange.rows import gather_rows, place_rows
from ownpath.kernels.exchange.tagged_rows import gather_words
from ownpath.kernels.exchange.window import INTERPRETED, Window, tagged_block, tagged_options
from ownpath.kernels.launch_cache import LaunchCache
from ownpath.kernels.variants import variant_name

MAX_PARTS = 3
MAX_BLOCK = 4096
"""Words of a program's step: two loads of 16 bytes in each of 256 threads."""

GatherKey = tuple[tuple[tuple[torch.Size, torch.dtype], ...], str]
"""Shape and dtype of each tensor, and the form: columns, copies of rows, or rows in place."""


@dataclass(frozen=True)
class GatherCall:
    """A prepared launch. views: all ranks' rows in the window, if they stay there."""

    launch: TritonCall | None
    views: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class GatherOperand:
    """launches: for tensors that have passed every check."""

    window: Window
    launches: LaunchCache[GatherKey, GatherCall] = field(default_factory=LaunchCache, compare=False)
    lock: Lock = field(default_factory=Lock, compare=False)


def as_words(x: Tensor) -> Tensor:
    """Returns the elements as words of 16 bits, whatever they mean."""
    return x.view(torch.int16).view(-1)


def block_options(window: Window, num_elements: int) -> dict[str, Any]:
    """Returns the step of a program that pushes so many elements with others, and other options of every launch."""
    block = min(MAX_BLOCK, int(triton.next_power_of_2(window.layout.share(num_elements))))
    pdl = not INTERPRETED
    return {"BLOCK": block, "PDL": pdl, "num_warps": max(1, min(8, block // 256)), "launch_pdl": pdl}


def start_gather(
    window: Window, x_TC: Tensor, out: Tensor, by_columns: bool, pushes: bool, takes: bool
) -> TritonCall | None:
    """Launches, and returns the prepared launch. pushes, takes: both halves in one launch, or one of them. Later calls
    move x and out."""
    x = as_words(x_TC)
    width = x_TC.shape[1] * x_TC.itemsize // 2
    options = {"COLUMNS": by_columns, "PUSHES": pushes, "TAKES": takes, **block_options(window, x.numel())}
    arguments = (
        *(x, as_words(out), window.words, window.peers, window.record, window.rank),
        *(x.numel(), width, window.layout.max_elements),
    )
    grid = (window.layout.num_programs,)
    return launch(gather_rows, grid, arguments, options | window.constants(), moving=(0, 1))


def row_starts(xs: Sequence[Tensor], size: int) -> list[int]:
    """Returns where all ranks' rows of each tensor begin, in words of 16 bits, and behind them the words in all."""
    starts = [0]
    for x in xs:
        num_words = size * x.numel() * x.itemsize // 2
        starts.append(starts[-1] + -(-num_words // SHARE_MULTIPLE) * SHARE_MULTIPLE)
    return starts


def start_rows(window: Window, xs: Sequence[Tensor], pushes: bool, awaits: bool) -> TritonCall | None:
    """Launches, and returns the prepared launch. pushes, awaits: both halves in one launch, or one of them. Later calls
    move up to three tensors."""
    words, starts = [as_words(x) for x in xs], row_starts(xs, window.layout.size)
    absent = MAX_PARTS - len(xs)
    counts, ends = [*(x.numel() for x in words), *[0] * absent], [*starts[1 : len(xs)], *[0] * absent]
    options = {
        "PARTS": len(xs),
        "PUSHES": pushes,
        "AWAITS": awaits,
        "ROWS_AT": window.layout.rows_at,
        **block_options(window, max(counts)),
    }
    arguments = (*padded(words), window.words, window.peers, window.record, window.rank, *counts, *ends)
    grid = (window.layout.num_programs,)
    return launch(place_rows, grid, arguments, options | window.constants(), moving=range(MAX_PARTS))


def start_tagged_gather(
    window: Window, x_TC: Tensor, out: Tensor, by_columns: bool, pushes: bool, takes: bool
) -> TritonCall | None:
    """Launches the exchange by tagged words, of a tensor that ``travels_tagged``; as ``start_gather``."""
    return _start_tagged(window, (x_TC,), out, (0, 3), by_columns, pushes, takes)


def start_tagged_rows(window: Window, xs: Sequence[Tensor], pushes: bool, awaits: bool) -> TritonCall | None:
    """Launches the exchange by tagged words, of tensors that ``travels_tagged``; as ``start_rows``."""
    rows = window.words[window.layout.rows_at :]
    return _start_tagged(window, xs, rows, range(MAX_PARTS), by_columns=False, pushes=pushes, takes=awaits)


def _start_tagged(
    window: Window,
    xs: Sequence[Tensor],
    out: Tensor,
    moving: Collection[int],
    by_columns: bool,
    pushes: bool,
    takes: bool,
) -> TritonCall | None:
    layout, words = window.layout, [_as_pairs(x) for x in xs]
    absent, firsts = (0,) * (MAX_PARTS - len(xs)), row_starts(xs, 1)
    options = {"PARTS": len(xs), "COLUMNS": by_columns, "PUSHES": pushes, "TAKES": takes}
    num_words = firsts[-1] // 2
    arguments = (
        *(*padded(words), _as_pairs(out), window.words, window.peers, window.record, window.rank),
        *(*(x.numel() for x in words), *absent),
        *(*(first // 2 for first in firsts[1:-1]), *absent),
        *(*(start // 2 for start in row_starts(xs, layout.size)[1:-1]), *absent),
        *(words[0].numel() // len(xs[0]), num_words, layout.share(2 * num_words) // 2, layout.tagged_elements // 2),
    )
    options |= tagged_options(window, num_words)
    return launch(gather_words, (layout.num_programs,), arguments, options, moving=moving)


def travels_tagged(window: Window, xs: Sequence[Tensor], by_columns: bool = False) -> bool:
    """Returns True for tensors of few rows, each of whole words of two elements; by columns each row is."""
    sizes = [x.itemsize * (x.shape[1] if by_columns else x.numel()) for x in xs]
    return all(size % 4 == 0 for size in sizes) and row_starts(xs, 1)[-1] <= window.layout.tagged_elements


def _as_pairs(x: Tensor) -> Tensor:
    """Returns the elements as words of two, of 32 bits."""
    return x.view(-1).view(torch.int32)


def padded(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns ``MAX_PARTS`` tensors: the first one again in the place of those that are not there."""
    return [*tensors, *[tensors[0]] * (MAX_PARTS - len(tensors))]


def rows_in_place(window: Window, xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Returns all ranks' rows of each tensor, as they lie in this rank's window."""
    size, words = window.layout.size, window.words[window.layout.rows_at :].view(torch.int16)
    found = []
    for x, start in zip(xs, row_starts(xs, size), strict=False):
        num_words = size * x.numel() * x.itemsize // 2
        found.append(words[start : start + num_words].view(x.dtype).view(size * len(x), x.shape[1]))
    return tuple(found)


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
        num_elements = x_TC.numel() * x_TC.itemsize // 2
        if travels_tagged(operand.window, (x_TC,), by_columns=True):
            return variant_name("tagged", block=tagged_block(operand.window, num_elements // 2))
        return variant_name("pushed", block=block_options(operand.window, num_elements)["BLOCK"])

    def run(self, x_TC: Tensor, operand: GatherOperand, *, dim: int = -1, out: Tensor | None = None) -> Tensor:
        """Returns all ranks' columns [T, N * C] (dim -1), or rows [N * T, C] (dim 0), of x [T, C], which has 2, 4 or 8
        bytes an element.

        Errors: ValueError naming the operand for a wrong shape, dtype, device, stride or alignment, or a size beyond
        the window, before any launch.
        """
        if dim not in (-1, 0, 1):
            raise ValueError(f"dim must be 0, or -1 for columns, found {dim}")
        _check_tensors((x_TC,), operand.window)
        operand.window.require_room(x_TC.numel() * x_TC.itemsize // 2)
        (num_rows, width), size, by_columns = x_TC.shape, operand.window.layout.size, dim != 0
        shape = (num_rows, size * width) if by_columns else (size * num_rows, width)
        if out is None:
            out = x_TC.new_empty(shape)
        check("out", out, (x_TC.dtype,), shape, x_TC.device)
        if num_rows:
            given, to = x_TC, out
            start = start_tagged_gather if travels_tagged(operand.window, (x_TC,), by_columns) else start_gather
            key = ((x_TC.shape, x_TC.dtype),), "columns" if by_columns else "copies"
            self._start(
                operand, key, (x_TC, out),
                lambda: GatherCall(start(operand.window, given, to, by_columns, pushes=True, takes=True)),
            )  # fmt: skip
        return out

    def rows(self, xs: Sequence[Tensor], operand: GatherOperand) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Returns all ranks' rows [N * T, C] of each of up to three tensors [T, C], and how many each rank has: as many
        as this one.

        They lie in the window, at an address that depends on shapes alone, and hold until this rank's next exchange,
        whichever: what reads them is launched in front of it. Another exchange of the window, on all ranks, must lie
        between two calls. A tensor that is not contiguous, or at no multiple of 16 bytes, is copied first. Errors: as
        ``run``.
        """
        xs = tuple(_dense(x) for x in xs)
        _check_tensors(xs, operand.window)
        layout = operand.window.layout
        if row_starts(xs, layout.size)[-1] > layout.size * layout.row_elements:
            told = ", ".join(f"{x.dtype} {list(x.shape)}" for x in xs)
            raise ValueError(f"rows {told} of each rank do not fit a window of {layout.row_elements} elements")
        counts = (len(xs[0]),) * layout.size
        if not len(xs[0]):
            return tuple(xs), counts
        key = tuple((x.shape, x.dtype) for x in xs), "rows"
        start = start_tagged_rows if travels_tagged(operand.window, xs) else start_rows
        call = self._start(
            operand, key, padded(xs),
            lambda: GatherCall(start(operand.window, xs, pushes=True, awaits=True), rows_in_place(operand.window, xs)),
        )  # fmt: skip
        return call.views, counts

    @staticmethod
    def _start(
        operand: GatherOperand, key: GatherKey, moving: Sequence[Tensor], first: Callable[[], GatherCall]
    ) -> GatherCall:
        """Launches; for a new key as ``first`` does."""
        with operand.lock:
            prepared = operand.launches.get(key)
            if prepared is None:
                prepared = first()
                if prepared.launch is not None:
                    operand.launches.add(key, prepared)
            else:
                assert prepared.launch is not None
                addresses = [tensor.data_ptr() for tensor in moving]
                prepared.launch.start(current_stream(moving[0].get_device()), *addresses)
            return prepared


def _dense(x: Tensor) -> Tensor:
    """Returns a tensor as kernels read it, copied if it lies otherwise: some tokens' ids are seldom at 16 bytes."""
    lies_so = x.is_contiguous() and not x.data_ptr() % VECTOR_BYTES
    return x if lies_so else x.clone(memory_format=torch.contiguous_format)


def _check_tensors(xs: Sequence[Tensor], window: Window) -> None:
    """Checks a rank's tensors. Errors: ValueError naming the one that does not fit."""
    if not 1 <= len(xs) <= MAX_PARTS:
        raise ValueError(f"1 to {MAX_PARTS} tensors are gathered together, found {len(xs)}")
    for idx, x in enumerate(xs):
        name = "x_TC" if len(xs) == 1 else f"tensor {idx}"
        check_rank(name, x, 2, INTERPRETED)
        if x.itemsize not in (2, 4, 8):
            raise ValueError(f"{name} must have 2, 4 or 8 bytes an element, found {x.dtype}")
        check(name, x, (x.dtype,), (len(xs[0]), x.shape[1]), window.words.device)


PUSHED_GATHER, PUSHED_TURN = PushedGather(), PushedGather()
