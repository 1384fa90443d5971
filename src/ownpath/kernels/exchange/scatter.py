"""The sum over ranks of [N * T, D], of which each rank gets its own rows [T, D], in one launch.

``layout`` has the protocol, ``rows`` the device code. A rank pushes each other rank's rows to that rank alone; its own
stay where they are. What has come is added in the order of ranks in float32 and rounded once: the bits of
``ref.reduce_scatter``. Few rows travel as tagged words (``tagged``).

Roofline: (N - 1) * 2 * T * D bytes leave a rank, and as many arrive.

Limits. bfloat16, every rank with as many rows. Where a rank was lost, the result is NaN.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock

import torch
from torch import Tensor

from ownpath.kernels.checks import check, check_rank
from ownpath.kernels.contract import Config
from ownpath.kernels.dsl.driver import current_stream
from ownpath.kernels.dsl.triton import TritonCall, launch
from ownpath.kernels.empty import EmptyOutput
from ownpath.kernels.exchange.gather import block_options
from ownpath.kernels.exchange.rows import scatter_rows
from ownpath.kernels.exchange.tagged_rows import scatter_words
from ownpath.kernels.exchange.window import INTERPRETED, Window, tagged_block, tagged_options
from ownpath.kernels.launch_cache import LaunchCache
from ownpath.kernels.variants import variant_name

ScatterKey = tuple[torch.Size, bool]
"""Shape of y, and whether something is added to the sum."""


@dataclass(frozen=True)
class ScatterOperand:
    """launches: for inputs that have passed every check."""

    window: Window
    launches: LaunchCache[ScatterKey, tuple[TritonCall, EmptyOutput]] = field(
        default_factory=LaunchCache, compare=False
    )
    lock: Lock = field(default_factory=Lock, compare=False)


def start_scatter(
    window: Window, y_BD: Tensor, other_TD: Tensor | None, out_TD: Tensor, pushes: bool, sums: bool
) -> TritonCall | None:
    """Launches, and returns the prepared launch. pushes, sums: both halves in one launch, or one of them. Later calls
    move y, other and out."""
    given = y_BD, y_BD if other_TD is None else other_TD, out_TD
    num_elements = out_TD.numel()
    options = {
        "HAS_OTHER": other_TD is not None,
        "PUSHES": pushes,
        "SUMS": sums,
        **block_options(window, num_elements),
    }
    arguments = (
        *(*given, window.words, window.peers, window.record, window.rank),
        *(num_elements, window.layout.max_elements),
    )
    grid = (window.layout.num_programs,)
    return launch(scatter_rows, grid, arguments, options | window.constants(), moving=(0, 1, 2))


def start_tagged_scatter(
    window: Window, y_BD: Tensor, other_TD: Tensor | None, out_TD: Tensor, pushes: bool, sums: bool
) -> TritonCall | None:
    """Launches the exchange by tagged words, of rows that ``travels_tagged``; as ``start_scatter``."""
    layout, num_words = window.layout, out_TD.numel() // 2
    given = (y_BD, y_BD if other_TD is None else other_TD, out_TD)
    options = {"HAS_OTHER": other_TD is not None, "PUSHES": pushes, "SUMS": sums, **tagged_options(window, num_words)}
    arguments = (
        *(part.view(-1).view(torch.int32) for part in given),
        *(window.words, window.peers, window.record, window.rank),
        *(num_words, layout.share(2 * num_words) // 2, layout.tagged_elements // 2),
    )
    return launch(scatter_words, (layout.num_programs,), arguments, options, moving=(0, 1, 2))


def travels_tagged(window: Window, num_elements: int) -> bool:
    """Returns True for a rank's rows that are few, and whole words."""
    return num_elements <= window.layout.tagged_elements and num_elements % 2 == 0


class PushedScatter:
    """This rank's rows of the sum over ranks. Every rank calls it in the same order with as many rows."""

    def prepare(self, window: Window) -> ScatterOperand:
        """Makes the operand. Exchanges of one window share its epochs: all are on one stream."""
        return ScatterOperand(window)

    def configs(self, operand: ScatterOperand) -> Sequence[Config]:
        """Returns nothing: Triton compiles at the first call."""
        return ()

    def variant(self, y_BD: Tensor, operand: ScatterOperand) -> str:
        """Returns the variant's name, which depends on the number of elements."""
        window, num_elements = operand.window, y_BD.numel() // operand.window.layout.size
        if travels_tagged(window, num_elements):
            return variant_name("tagged", block=tagged_block(window, num_elements // 2))
        return variant_name("pushed", block=block_options(window, num_elements)["BLOCK"])

    def run(
        self,
        y_BD: Tensor,
        operand: ScatterOperand,
        counts: tuple[int, ...] | None = None,
        *,
        other_TD: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Returns this rank's rows [T, D] of the sum over ranks of y [N * T, D], plus other, if it is given, rounded
        again. counts: rows of each rank, which must be the same.

        Errors: ValueError naming the operand for a wrong shape, dtype, device, stride or alignment, a size beyond the
        window, or counts that differ, before any launch.
        """
        shape = _checked_shape(y_BD, operand.window, counts)
        key = y_BD.shape, other_TD is not None
        prepared = operand.launches.get(key)
        if other_TD is not None:
            check("other_TD", other_TD, (torch.bfloat16,), shape, y_BD.device)
        if out is None:
            out = y_BD.new_empty(shape) if prepared is None else prepared[1].new()
        else:
            check("out", out, (torch.bfloat16,), shape, y_BD.device)
        if not len(y_BD):
            return out
        with operand.lock:
            if prepared is None:
                is_tagged = travels_tagged(operand.window, out.numel())
                start = start_tagged_scatter if is_tagged else start_scatter
                call = start(operand.window, y_BD, other_TD, out, pushes=True, sums=True)
                if call is not None:
                    operand.launches.add(key, (call, EmptyOutput(shape, torch.bfloat16, y_BD.get_device())))
            else:
                other = y_BD if other_TD is None else other_TD
                stream = current_stream(y_BD.get_device())
                prepared[0].start(stream, y_BD.data_ptr(), other.data_ptr(), out.data_ptr())
        return out


def _checked_shape(y_BD: Tensor, window: Window, counts: tuple[int, ...] | None) -> tuple[int, int]:
    """Returns the shape of a rank's rows. Errors: ValueError naming what does not fit."""
    check_rank("y_BD", y_BD, 2, INTERPRETED)
    check("y_BD", y_BD, (torch.bfloat16,), tuple(y_BD.shape), window.words.device)
    size, num_rows = window.layout.size, len(y_BD)
    if counts is not None and counts != (num_rows // size,) * size:
        raise ValueError(f"every rank must have as many rows, found counts {list(counts)} of {num_rows} rows")
    if num_rows % size:
        raise ValueError(f"y_BD must have as many rows for each of {size} ranks, found {num_rows}")
    window.require_room(y_BD.numel() // size)
    return num_rows // size, y_BD.shape[1]


PUSHED_SCATTER = PushedScatter()
