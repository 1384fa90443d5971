"""The sum over ranks of [T, D] on GPUs that map each other's memory: pushed, awaited and added in one launch.

``layout`` has the protocol. Roofline: at N ranks (N - 1) * 2 * T * D bytes leave a rank and as many arrive; with N = 2
that is what every form of the sum moves, in one trip. From N = 4 on and for many rows two trips (scatter, then gather)
move less; they are not here.

Limits. bfloat16, T * D a multiple of 128. The same bits on every rank and in every repetition; a row's bits do not
depend on the other rows. Peers' memory must take atomics (NVLink).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock

import torch
import triton
from torch import Tensor

from ownpath.kernels.checks import VECTOR_BYTES, check, check_alignment, check_rank
from ownpath.kernels.contract import Config
from ownpath.kernels.dsl.driver import current_stream
from ownpath.kernels.dsl.triton import TritonCall, launch
from ownpath.kernels.empty import EmptyOutput
from ownpath.kernels.exchange.pushed import exchange_rows
from ownpath.kernels.exchange.tagged import exchange_words
from ownpath.kernels.exchange.window import INTERPRETED, Window, tagged_block, tagged_options
from ownpath.kernels.launch_cache import LaunchCache
from ownpath.kernels.variants import variant_name

MAX_BLOCK = 2048

PushKey = tuple[torch.Size, bool]
"""Shape of x, and whether there is a second part."""


@dataclass(frozen=True)
class PushedOperand:
    """launches: for inputs that have passed every check."""

    window: Window
    launches: LaunchCache[PushKey, tuple[TritonCall, EmptyOutput]] = field(default_factory=LaunchCache, compare=False)
    lock: Lock = field(default_factory=Lock, compare=False)


def start_exchange(
    window: Window, x_TD: Tensor, other_TD: Tensor | None, out_TD: Tensor, pushes: bool, sums: bool
) -> TritonCall | None:
    """Launches, and returns the prepared launch. pushes, sums: both of its parts in one launch, or one of them, for
    ranks that take turns. Later calls move x, other and out."""
    share = window.layout.share(x_TD.numel())
    block = min(MAX_BLOCK, int(triton.next_power_of_2(share)))
    words, peers, record, *sizes = window.arguments(x_TD.numel())
    tensors = x_TD, x_TD if other_TD is None else other_TD, out_TD, words, peers, record
    options = {
        "HAS_OTHER": other_TD is not None,
        "PUSHES": pushes,
        "SUMS": sums,
        "BLOCK": block,
        "PDL": not INTERPRETED,
        "num_warps": max(1, block // 256),
        "launch_pdl": not INTERPRETED,
    }
    arguments = *tensors, window.rank, x_TD.numel(), *sizes
    grid = (window.layout.num_programs,)
    return launch(exchange_rows, grid, arguments, options | window.constants(), moving=(0, 1, 2))


def start_tagged(
    window: Window, x_TD: Tensor, other_TD: Tensor | None, out_TD: Tensor, pushes: bool = True, sums: bool = True
) -> TritonCall | None:
    """Launches the exchange by tagged words, of at most ``WindowLayout.tagged_elements``; as ``start_exchange``."""
    layout, num_words = window.layout, x_TD.numel() // 2
    words, peers, record, *_ = window.arguments(x_TD.numel())
    parts = (x_TD, x_TD if other_TD is None else other_TD, out_TD)
    tensors = *(part.view(torch.int32) for part in parts), words, peers, record
    options = {"HAS_OTHER": other_TD is not None, "PUSHES": pushes, "SUMS": sums, **tagged_options(window, num_words)}
    arguments = *tensors, window.rank, num_words, layout.share(2 * num_words) // 2, layout.tagged_elements // 2
    return launch(exchange_words, (layout.num_programs,), arguments, options, moving=(0, 1, 2))


def start_sum(
    window: Window, x_TD: Tensor, other_TD: Tensor | None, out_TD: Tensor, pushes: bool = True, sums: bool = True
) -> TritonCall | None:
    """Launches the exchange in the form of its size; as ``start_exchange``."""
    start = start_tagged if x_TD.numel() <= window.layout.tagged_elements else start_exchange
    return start(window, x_TD, other_TD, out_TD, pushes=pushes, sums=sums)


class PushedReduce:
    """The ranks' parts, added in the order of ranks in float32 and rounded once. Every rank calls it in the same order
    with as many rows."""

    def prepare(self, window: Window) -> PushedOperand:
        """Makes the operand. Exchanges of one window share its epochs: all are on one stream."""
        return PushedOperand(window)

    def configs(self, operand: PushedOperand) -> Sequence[Config]:
        """Returns nothing: Triton compiles at the first call."""
        return ()

    def variant(self, x_TD: Tensor, operand: PushedOperand) -> str:
        """Returns the variant's name, which depends on the number of elements."""
        layout = operand.window.layout
        if x_TD.numel() <= layout.tagged_elements:
            return variant_name("tagged", block=tagged_block(operand.window, x_TD.numel() // 2))
        block = min(MAX_BLOCK, int(triton.next_power_of_2(layout.share(x_TD.numel()))))
        return variant_name("pushed", block=block)

    def run(
        self, x_TD: Tensor, operand: PushedOperand, other_TD: Tensor | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        """Computes the sum over ranks of x, or of x + other rounded as it would be stored. out may be x; it is NaN
        where a rank was lost, which ``Window.lost`` tells. Shapes: bfloat16 [T, D].

        Errors: ValueError naming the operand for a wrong shape, dtype, device, stride or alignment, before any launch.
        """
        key = x_TD.shape, other_TD is not None
        prepared = operand.launches.get(key)
        out = self._checked(x_TD, operand, other_TD, out, None if prepared is None else prepared[1])
        with operand.lock:
            if prepared is None:
                call = start_sum(operand.window, x_TD, other_TD, out)
                if call is not None:
                    empty = EmptyOutput(x_TD.shape, torch.bfloat16, x_TD.get_device())
                    operand.launches.add(key, (call, empty))
            else:
                other = x_TD if other_TD is None else other_TD
                prepared[0].start(current_stream(x_TD.get_device()), x_TD.data_ptr(), other.data_ptr(), out.data_ptr())
        return out

    @staticmethod
    def _checked(
        x_TD: Tensor, operand: PushedOperand, other_TD: Tensor | None, out: Tensor | None, empty: EmptyOutput | None
    ) -> Tensor:
        """Returns the output. Errors: ValueError."""
        check_parts(x_TD, other_TD, operand.window)
        if out is None:
            return torch.empty_like(x_TD) if empty is None else empty.new()
        check("out", out, (torch.bfloat16,), tuple(x_TD.shape), x_TD.device)
        return out


def check_parts(x_TD: Tensor, other_TD: Tensor | None, window: Window) -> None:
    """Checks a rank's part, its second part and the window. Errors: ValueError naming the one that does not fit."""
    check_rank("x_TD", x_TD, 2, INTERPRETED)
    for name, part in (("x_TD", x_TD), ("other_TD", other_TD)):
        if part is not None:
            check(name, part, (torch.bfloat16,), tuple(x_TD.shape), window.words.device)
    if window.words.data_ptr() % VECTOR_BYTES:
        check_alignment("window", window.words)
    window.arguments(x_TD.numel())


PUSHED_REDUCE = PushedReduce()
