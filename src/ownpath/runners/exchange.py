"""Runners of the exchanges between ranks."""

import torch

from ownpath.kernels.exchange.ref import (
    AllGather,
    AllReduce,
    AllToAll,
    ExchangeKernel,
    ExchangeOperand,
    ReduceScatter,
    RoutedCombine,
    RoutedDispatch,
)
from ownpath.kernels.registry import KERNELS
from ownpath.ranks.peers import Peers
from ownpath.runners.runner import KernelOrName, KernelRunner, chosen_spec


class Exchange(KernelRunner):
    """The base of exchanges: a kernel among these peers, under the slot that the plan names."""

    def __init__(self, peers: Peers, slot: str, *, kernel: KernelOrName) -> None:
        self.spec = chosen_spec(kernel)
        self.kernel: ExchangeKernel = KERNELS[self.spec.name]
        self.operand: ExchangeOperand = self.kernel.prepare(ExchangeOperand(peers, slot))

    def variant(self, x: torch.Tensor, *_: object) -> str | None:
        """Returns the names of the variants that a call launches; ``None`` for a kernel without variants."""
        return None


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
    """x [B, C] and the ranks' counts of rows -> this rank's rows [T, C] of the sum over all ranks."""

    kernel: ReduceScatter

    def __call__(self, x_BC: torch.Tensor, counts: tuple[int, ...]) -> torch.Tensor:
        return self.kernel.run(x_BC, self.operand, counts)


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
    """x [S, C] of rows that came, their counts by rank, and goes as they were sent -> the sum over ranks [T, C]."""

    kernel: RoutedCombine

    def __call__(self, x_SC: torch.Tensor, counts: tuple[int, ...], goes_NT: torch.Tensor) -> torch.Tensor:
        return self.kernel.run(x_SC, self.operand, counts, goes_NT)
