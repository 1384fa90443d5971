"""Runners of the exchanges between ranks."""

from typing import TYPE_CHECKING, Any

import torch

from ownpath.kernels.exchange.ref import (
    AllGather,
    AllReduce,
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
    from ownpath.kernels.exchange.window import Window


class Exchange(KernelRunner):
    """The base of exchanges: a kernel among these peers, under the slot that the plan names.

    window: of this rank, for kernels that push into the other ranks' memory.
    """

    def __init__(self, peers: Peers, slot: str, window: "Window | None" = None, *, kernel: KernelOrName) -> None:
        self.spec, self.slot = chosen_spec(kernel), slot
        self.kernel: Any = KERNELS[self.spec.name]
        if self.spec.is_pushed and window is None:
            raise ValueError(f"{slot}: {self.spec.name} needs windows of all ranks, and there are none")
        self.window = window if self.spec.is_pushed else None
        self.operand: Any = self.kernel.prepare(self.window or ExchangeOperand(peers, slot))

    def variant(self, x: torch.Tensor, *_: object) -> str | None:
        """Returns the names of the variants that a call launches; ``None`` for a kernel without variants."""
        return None if self.window is None else self.kernel.variant(x, self.operand)


class Reduce(Exchange):
    """x [T, C], or x + other -> their sum over all ranks, on every rank the same bits."""

    kernel: AllReduce

    def __call__(self, x_TC: torch.Tensor, other_TC: torch.Tensor | None = None) -> torch.Tensor:
        return self.kernel.run(x_TC, self.operand, other_TC)


class GatherColumns(Exchange):
    """x [T, C] -> the columns of all ranks [T, N * C]."""

    kernel: AllGather

    def __call__(self, x_TC: torch.Tensor) -> torch.Tensor:
        return self.kernel.run(x_TC, self.operand, dim=-1)


class GatherRows(Exchange):
    """Several tensors of T rows -> those of all ranks, of B rows, and how many rows each rank has."""

    kernel: AllGather

    def __call__(self, *rows: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...]]:
        return self.kernel.rows(rows, self.operand)


class Scatter(Exchange):
    """x [B, C] and the ranks' counts of rows -> this rank's rows [T, C] of the sum over all ranks, plus other."""

    kernel: ReduceScatter

    def __call__(
        self, x_BC: torch.Tensor, counts: tuple[int, ...], other_TC: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.kernel.run(x_BC, self.operand, counts, other_TD=other_TC)


class Turn(Exchange):
    """Columns x [B, C] of all rows, and the ranks' counts of rows -> this rank's rows, whole [T, N * C]."""

    kernel: AllToAll

    def __call__(self, x_BC: torch.Tensor, counts: tuple[int, ...]) -> torch.Tensor:
        return self.kernel.run(x_BC, self.operand, counts)


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
