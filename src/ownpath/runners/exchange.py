"""Runners of the exchanges between ranks."""

import torch

from ownpath.kernels.exchange.ref import AllGather, AllReduce, AllToAll, ExchangeKernel, ExchangeOperand, ReduceScatter
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
