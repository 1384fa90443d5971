"""Torch references of the exchanges: every rank gives every other what that one needs, in one trip, and adds up itself.

Sums are added in the order of ranks, in at least float32, and rounded once: the same bits on every rank. Were they not,
routers would choose other experts on one rank than on another.

Legend: N ranks, B rows of all ranks, T rows of this one, S rows that came to this one, C columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ownpath.kernels.mixture import sum_dtype
from ownpath.kernels.reference import Reference
from ownpath.ranks.peers import Peers, RanksDiffer


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


def reduce_scatter(parts_N: Sequence[Tensor], rank: int) -> Tensor:
    """Adds a rank's rows of the ranks' parts, as ``all_reduce`` does; each rank has as many."""
    return all_reduce([part.chunk(len(parts_N))[rank] for part in parts_N])


def all_gather(parts_N: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Puts the ranks' rows (dim 0), or columns (dim -1), side by side in the order of ranks."""
    return torch.cat(list(parts_N), dim=dim)


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
        """Computes the sum over ranks of x, or of x + other, rounded: the same [T, C] on every rank."""
        part = _with_other(x_TC, other_TC)
        parts = operand.peers.swap(operand.slot, (part,))
        _require_alike(operand, parts, dims=0)
        return all_reduce([given for (given,) in parts])


class AllGather(ExchangeKernel):
    """The rows or columns of all ranks, side by side."""

    def run(self, x: Tensor, operand: ExchangeOperand, *, dim: int = 0) -> Tensor:
        """Returns all ranks' rows (dim 0) or columns (dim -1), in the order of ranks."""
        return all_gather([given for (given,) in operand.peers.swap(operand.slot, (x,))], dim)

    def rows(self, rows: tuple[Tensor, ...], operand: ExchangeOperand) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Returns all ranks' rows of each tensor, in the order of ranks, and how many each rank has."""
        given = operand.peers.swap(operand.slot, rows)
        _require_alike(operand, given)
        counts = tuple(len(of_rank[0]) for of_rank in given)
        return tuple(all_gather(column) for column in zip(*given, strict=True)), counts


class ReduceScatter(ExchangeKernel):
    """The sum of the ranks' parts, of a rank's own rows."""

    def run(
        self, x_BC: Tensor, operand: ExchangeOperand, counts: tuple[int, ...], *, other_TD: Tensor | None = None
    ) -> Tensor:
        """Returns this rank's rows [T, C] of the sum over ranks of x [B, C], plus other, rounded again. counts: rows of
        each rank."""
        y_TC = all_reduce([given for (given,) in operand.peers.trade(operand.slot, _by_rank(x_BC, counts))])
        return _with_other(y_TC, other_TD)


class AllToAll(ExchangeKernel):
    """A rank's own rows, whole."""

    def run(self, x_BC: Tensor, operand: ExchangeOperand, counts: tuple[int, ...]) -> Tensor:
        """Returns this rank's rows [T, N * C] from columns [B, C] of all rows. counts: rows of each rank."""
        return torch.cat([given for (given,) in operand.peers.trade(operand.slot, _by_rank(x_BC, counts))], dim=-1)

    def everywhere(self, x_BC: Tensor, operand: ExchangeOperand) -> Tensor:
        """Returns all ranks' rows, whole [B, N * C]."""
        return all_gather([given for (given,) in operand.peers.swap(operand.slot, (x_BC,))], dim=-1)


class RoutedDispatch(ExchangeKernel):
    """Rows to the ranks that have one of their experts."""

    def run(
        self, rows: tuple[Tensor, ...], goes_NT: Tensor, operand: ExchangeOperand
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Sends each tensor's row t to the ranks for which goes [N, T] is True.

        Returns the rows [S, ...] that came to this rank, in the order of ranks and of each one's rows, and how many
        each rank sent.
        """
        given = operand.peers.trade(operand.slot, [tuple(part[goes_T] for part in rows) for goes_T in goes_NT])
        _require_alike(operand, given)
        counts = tuple(len(of_rank[0]) for of_rank in given)
        return tuple(torch.cat(column) for column in zip(*given, strict=True)), counts


class RoutedCombine(ExchangeKernel):
    """The sums of rows that were dispatched, back where they came from."""

    def run(
        self,
        x_SC: Tensor,
        operand: ExchangeOperand,
        counts: tuple[int, ...],
        goes_NT: Tensor,
        other_TC: Tensor | None = None,
    ) -> Tensor:
        """Returns the sum over ranks [T, C] of this rank's rows, plus other, rounded again; a rank that a row did not
        go to has zeros for it.

        x [S, C], counts: of what came to this rank. goes: as this rank's rows were sent.
        """
        parts = operand.peers.trade(operand.slot, _by_rank(x_SC, counts))
        total_TC = all_reduce([_spread(part, goes_T) for (part,), goes_T in zip(parts, goes_NT, strict=True)])
        return _with_other(total_TC, other_TC)


def _with_other(y_TC: Tensor, other_TC: Tensor | None) -> Tensor:
    """Adds what is there to rounded sums, and rounds again."""
    return y_TC if other_TC is None else (y_TC.to(sum_dtype(y_TC)) + other_TC).to(y_TC.dtype)


def _by_rank(x_BC: Tensor, counts: Sequence[int]) -> list[tuple[Tensor]]:
    return [(part,) for part in x_BC.split(tuple(counts))]


def _spread(part_SC: Tensor, goes_T: Tensor) -> Tensor:
    """Returns rows at their places among all of a rank's rows [T, C], and zeros at the others."""
    spread_TC = part_SC.new_zeros((len(goes_T), part_SC.shape[1]))
    spread_TC[goes_T] = part_SC
    return spread_TC


def _require_alike(operand: ExchangeOperand, parts: Sequence[Sequence[Tensor]], dims: int = 1) -> None:
    """Checks that all ranks gave tensors of the same dtypes and shapes, but for ``dims``. Errors: RanksDiffer."""
    kinds = [[(tensor.dtype, tuple(tensor.shape[dims:])) for tensor in tensors] for tensors in parts]
    own, rank = kinds[operand.peers.rank], operand.peers.rank
    for other, found in enumerate(kinds):
        if found != own:
            raise RanksDiffer(f"rank {other} gives {_told(found)} in {operand.slot}, rank {rank} {_told(own)}")


def _told(kinds: Sequence[tuple[torch.dtype, tuple[int, ...]]]) -> str:
    return ", ".join(f"{str(dtype).removeprefix('torch.')} {list(shape)}" for dtype, shape in kinds)


REDUCE, GATHER, SCATTER, TURN = AllReduce(), AllGather(), ReduceScatter(), AllToAll()
DISPATCH, COMBINE = RoutedDispatch(), RoutedCombine()
