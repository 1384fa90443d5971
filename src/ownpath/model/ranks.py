"""Parts of the model whose work several ranks divide: what stands in for a product, the experts or the head.

Legend: T tokens of this rank, B of all ranks, D hidden, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from ownpath.attention.interface import PreparedStep
from ownpath.model.moe import MoE
from ownpath.runners import GatherRows, Linear, Turn, TurnToAll

Product = Callable[[torch.Tensor], torch.Tensor]
"""A product whose result is whole on every rank."""


class FeedForward(Protocol):
    """A block's feed-forward part: its output in one part or two, [T, D] each."""

    @property
    def moe(self) -> MoE: ...

    def __call__(
        self, x_TD: torch.Tensor, token_ids_T: torch.Tensor, step: PreparedStep
    ) -> tuple[torch.Tensor, torch.Tensor | None]: ...


@dataclass(frozen=True)
class FollowedLinear:
    """A product of which each rank has a part, and the exchange that makes it whole."""

    linear: Linear
    exchange: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.exchange(self.linear(x))


@dataclass(frozen=True)
class ReducedMoE:
    """Every rank routes all tokens and computes its part of the sum; one exchange adds up both kinds of experts."""

    moe: MoE
    reduce: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

    def __call__(self, x_TD: torch.Tensor, token_ids_T: torch.Tensor, step: PreparedStep) -> tuple[torch.Tensor, None]:
        """Returns the output, in one part."""
        return self.reduce(*self.moe(x_TD, token_ids_T, step)), None


@dataclass(frozen=True)
class GatheredHead:
    """Each rank has rows of the vocabulary's matrix, and its own tokens: all tokens' columns go back to where the token
    is, or to all ranks."""

    head: Linear
    gather: GatherRows
    turn: Turn
    turn_to_all: TurnToAll

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        (h_BD,), counts = self.gather(x)
        return self.turn(self.head(h_BD), counts)

    def everywhere(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the logits of all ranks' rows [B, V], in the order of ranks, on every rank."""
        (h_BD,), _ = self.gather(x)
        return self.turn_to_all(self.head(h_BD))
