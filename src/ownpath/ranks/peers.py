"""The interface between a rank and the others: it gives tensors, and gets theirs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class PeerLost(RuntimeError):
    """Raised where another rank does not answer any more. Nothing goes on from here: ranks may have run other steps.

    rank: the one that is lost. where: the exchange, by its slot.
    """

    def __init__(self, rank: int, where: str, why: str) -> None:
        super().__init__(f"rank {rank} is lost, in {where}: {why}")
        self.rank, self.where, self.why = rank, where, why


class RanksDiffer(RuntimeError):
    """Raised where ranks that should do the same do not; the message names the rank and what it does."""


class Peers(Protocol):
    """The ranks that run one model together, seen from one of them."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def swap(self, slot: str, tensors: "Sequence[Tensor]") -> "list[tuple[Tensor, ...]]":
        """Gives every rank these tensors, and returns each rank's, in the order of ranks. Every rank calls it, with as
        many tensors of the same dtypes; sizes may differ.

        slot: the exchange, by the name that the plan has for it.
        Errors: PeerLost; RanksDiffer for a rank that is in another exchange.
        """
        ...

    def trade(self, slot: str, parts: "Sequence[Sequence[Tensor]]") -> "list[tuple[Tensor, ...]]":
        """Gives each rank the tensors that are for it, in the order of ranks, and returns each rank's for this one.

        Otherwise as ``swap``, which gives all ranks the same.
        """
        ...


class Alone:
    """The peers of a model that one rank runs."""

    rank, size = 0, 1

    def swap(self, slot: str, tensors: "Sequence[Tensor]") -> "list[tuple[Tensor, ...]]":
        """Returns this rank's tensors, copied."""
        return [tuple(tensor.clone() for tensor in tensors)]

    def trade(self, slot: str, parts: "Sequence[Sequence[Tensor]]") -> "list[tuple[Tensor, ...]]":
        """Returns what this rank has for itself, copied."""
        return self.swap(slot, parts[0])
