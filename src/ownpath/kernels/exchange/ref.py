"""Torch references of the exchanges: every rank gives every other all that it has, and computes from that.

Sums are added in the order of ranks, in at least float32, and rounded once: the same bits on every rank. Were they not,
routers would choose other experts on one rank than on another.

Legend: N ranks, B rows of all ranks, T rows of this one, C columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ownpath.kernels.mixture import sum_dtype
from ownpath.kernels.reference import Reference
from ownpath.ranks.peers import Peers


@dataclass(frozen=True)
class ExchangeOperand:
    """An exchange of one model. slot: the plan's name of it."""

    peers: Peers
    slot: str


def all_reduce(parts_N: Sequence[Tensor]) -> Tensor:
    """Adds the ranks' parts in the order of ranks, and rounds once."""
    total = parts_N[0].to(sum_dtype(parts_N[0]))
    for part in parts_N[1:]:
        total = total + part
    return total.to(parts_N[0].dtype)


def own_rows(counts_N: Sequence[int], rank: int) -> slice:
    """Returns a rank's rows among those of all ranks."""
    start = sum(counts_N[:rank])
    return slice(start, start + counts_N[rank])


class ExchangeKernel(Reference):
    """The methods that all exchanges share. The operand is the exchange."""

    def prepare(self, stored: ExchangeOperand) -> ExchangeOperand:
        """Returns the operand."""
        return stored

    def variant(self, x: Tensor, operand: ExchangeOperand) -> None:
        """Returns ``None``: the kernel has no variants."""


class AllReduce(ExchangeKernel):
    """The sum of the ranks' parts."""

    def run(self, x_TC: Tensor, operand: ExchangeOperand, other_TC: Tensor | None = None) -> Tensor:
        """Computes the sum over ranks of x, or of x + other: the same [T, C] on every rank."""
        part = x_TC if other_TC is None else x_TC.to(sum_dtype(x_TC)) + other_TC
        parts = operand.peers.swap(operand.slot, (part,))
        return all_reduce([given for (given,) in parts]).to(x_TC.dtype)


class AllGather(ExchangeKernel):
    """The rows or columns of all ranks, side by side."""

    def run(self, x: Tensor, operand: ExchangeOperand, *, dim: int = 0) -> Tensor:
        """Returns all ranks' rows (dim 0) or columns (dim -1), in the order of ranks."""
        return torch.cat([given for (given,) in operand.peers.swap(operand.slot, (x,))], dim=dim)

    def rows(self, rows: tuple[Tensor, ...], operand: ExchangeOperand) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Returns all ranks' rows of each tensor, in the order of ranks, and how many each rank has."""
        given = operand.peers.swap(operand.slot, rows)
        counts = tuple(len(of_rank[0]) for of_rank in given)
        return tuple(torch.cat(column) for column in zip(*given, strict=True)), counts


class ReduceScatter(ExchangeKernel):
    """The sum of the ranks' parts, of a rank's own rows."""

    def run(self, x_BC: Tensor, operand: ExchangeOperand, counts: tuple[int, ...]) -> Tensor:
        """Returns this rank's rows [T, C] of the sum over ranks of x [B, C]. counts: rows of each rank."""
        mine = own_rows(counts, operand.peers.rank)
        return all_reduce([given[mine] for (given,) in operand.peers.swap(operand.slot, (x_BC,))])


class AllToAll(ExchangeKernel):
    """A rank's own rows, whole."""

    def run(self, x_BC: Tensor, operand: ExchangeOperand, counts: tuple[int, ...]) -> Tensor:
        """Returns this rank's rows [T, N * C] from columns [B, C] of all rows. counts: rows of each rank."""
        mine = own_rows(counts, operand.peers.rank)
        return torch.cat([given[mine] for (given,) in operand.peers.swap(operand.slot, (x_BC,))], dim=-1)


REDUCE, GATHER, SCATTER, TURN = AllReduce(), AllGather(), ReduceScatter(), AllToAll()
