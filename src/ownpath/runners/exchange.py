"""Runners of the exchanges between ranks."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ownpath.kernels.contract import Kernel
from ownpath.kernels.exchange.ref import (
    AllGather,
    AllToAll,
    ExchangeOperand,
    ReduceScatter,
    RoutedCombine,
    RoutedDispatch,
)
from ownpath.kernels.registry import KERNELS
from ownpath.ranks.peers import Peers
from ownpath.runners.runner import KernelOrName, KernelRunner, chosen_spec

if TYPE_CHECKING:  # needs triton
    from ownpath.kernels.exchange.window import Window as Window

WORD_BYTES = 2
"""An element of a window."""


class SumKernel(Kernel[Any], Protocol):
    """A kernel of ``Reduce``."""

    def run(self, x_TC: torch.Tensor, operand: Any, other_TC: torch.Tensor | None = None, /) -> torch.Tensor: ...


class ColumnsKernel(Kernel[Any], Protocol):
    """A kernel of ``GatherColumns``. Only one that pushes takes ``out``."""

    def run(self, x_TC: torch.Tensor, operand: Any, *, dim: int, out: torch.Tensor | None = None) -> torch.Tensor: ...


class Exchange(KernelRunner):
    """The base of exchanges: a kernel among these peers, under the slot that the plan names.

    window: of this rank, for kernels that push into the other ranks' memory. Each of their calls is noted there.
    """

    def __init__(self, peers: Peers, slot: str, window: "Window | None" = None, *, kernel: KernelOrName) -> None:
        self.spec, self.slot = chosen_spec(kernel), slot
        made: Any = KERNELS[self.spec.name]
        if self.spec.is_pushed and window is None:
            raise ValueError(f"{slot}: {self.spec.name} needs windows of all ranks, and there are none")
        self.window = window if self.spec.is_pushed else None
        self.kernel, self.operand = made, made.prepare(self.window or ExchangeOperand(peers, slot))
        self._variant: Callable[..., str | None] = made.variant

    def variant(self, x: torch.Tensor, *_: object) -> str | None:
        """Returns the names of the variants that a call launches; ``None`` for a kernel without variants."""
        return None if self.window is None else self._variant(x, self.operand)


class Reduce(Exchange):
    """x [T, C], or x + other -> their sum over all ranks, on every rank the same bits."""

    kernel: SumKernel

    def __call__(self, x_TC: torch.Tensor, other_TC: torch.Tensor | None = None) -> torch.Tensor:
        if self.window is not None:
            if not len(x_TC):
                return x_TC
            self.window.note(self.slot)
        return self.kernel.run(x_TC, self.operand, other_TC)


class GatherColumns(Exchange):
    """x [T, C] -> the columns of all ranks [T, N * C]. Of more rows than a window has room for, some at a time."""

    kernel: ColumnsKernel

    def __call__(self, x_TC: torch.Tensor) -> torch.Tensor:
        if self.window is None:
            return self.kernel.run(x_TC, self.operand, dim=-1)
        num_rows, width = x_TC.shape
        most = self.window.layout.max_elements // (width * x_TC.itemsize // WORD_BYTES)
        out = x_TC.new_empty(num_rows, width * self.window.layout.size)
        for first in range(0, num_rows, most):
            some = slice(first, first + most)
            self.window.note(self.slot)
            self.kernel.run(x_TC[some], self.operand, dim=-1, out=out[some])
        return out


class GatherRows(Exchange):
    """Several tensors of T rows -> those of all ranks, of B rows, and how many rows each rank has."""

    kernel: AllGather

    def __call__(self, *rows: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...]]:
        if self.window is not None and len(rows[0]):
            self.window.note(self.slot)
        return self.kernel.rows(rows, self.operand)


class Scatter(Exchange):
    """x [B, C] and the ranks' counts of rows -> this rank's rows [T, C] of the sum over all ranks, plus other."""

    kernel: ReduceScatter

    def __call__(
        self, x_BC: torch.Tensor, counts: tuple[int, ...], other_TC: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self.window is not None and len(x_BC):
            self.window.note(self.slot)
        return self.kernel.run(x_BC, self.operand, counts, other_TD=other_TC)


class Turn(GatherColumns):
    """Columns x [B, C] of all rows, and the ranks' counts of rows -> this rank's rows, whole [T, N * C].

    By a kernel that pushes, the columns of all rows go to every rank, which keeps its own rows.
    """

    def __call__(self, x_BC: torch.Tensor, counts: tuple[int, ...]) -> torch.Tensor:  # type: ignore[override]
        if self.window is None:
            turned: torch.Tensor = self.turning.run(x_BC, self.operand, counts)
            return turned
        rank = self.window.rank
        return super().__call__(x_BC)[sum(counts[:rank]) : sum(counts[: rank + 1])]

    @property
    def turning(self) -> AllToAll:
        """The reference's kernel."""
        kernel: Any = self.kernel
        assert isinstance(kernel, AllToAll)
        return kernel


class TurnToAll(Turn):
    """Columns x [B, C] of all rows -> all rows, whole [B, N * C], on every rank: by the exchange of ``Turn``."""

    def __call__(self, x_BC: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        if self.window is None:
            return self.turning.everywhere(x_BC, self.operand)
        return GatherColumns.__call__(self, x_BC)


class DispatchRows(Exchange):
    """goes bool [N, T] and several tensors of T rows -> the rows that came here, and how many each rank sent."""

    kernel: RoutedDispatch

    def __call__(self, goes_NT: torch.Tensor, *rows: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...]]:
        return self.kernel.run(rows, goes_NT, self.operand)


class CombineRows(Exchange):
    """x [S, C] of rows that came, their counts by rank, and goes as they were sent -> the sum over ranks [T, C], plus
    other."""

    kernel: RoutedCombine

    def __call__(
        self, x_SC: torch.Tensor, counts: tuple[int, ...], goes_NT: torch.Tensor, other_TC: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.kernel.run(x_SC, self.operand, counts, goes_NT, other_TC)
