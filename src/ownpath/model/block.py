"""One decoder layer: attention, then the mixture of experts, each behind a boundary of the hyper-connections."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ownpath.attention.interface import PreparedStep
from ownpath.attention.rope import Rotation
from ownpath.cache.tables import StepTables
from ownpath.model.attention import Attention
from ownpath.model.ranks import FeedForward
from ownpath.runners import HyperBoundary, HyperOut, Mix


@dataclass(frozen=True)
class Residual:
    """The residual between two sublayers: S streams, and the last sublayer's output, which is still to be mixed into
    them.

    x [T, S, D]; y [T, D] and its mix are ``None`` before the first sublayer. other [T, D]: the second part of an output
    that is y + other.
    """

    x_TSD: torch.Tensor
    y_TD: torch.Tensor | None = None
    mix: Mix | None = None
    other_TD: torch.Tensor | None = None

    @classmethod
    def of_embedding(cls, h_TD: torch.Tensor, num_streams: int) -> "Residual":
        """Starts before the first layer: every stream is the token's embedding."""
        return cls(h_TD.unsqueeze(1).expand(-1, num_streams, -1).contiguous())

    def rows(self, ids_R: torch.Tensor) -> "Residual":
        """Selects the residual of some tokens."""
        assert self.y_TD is not None
        assert self.mix is not None
        other_RD = None if self.other_TD is None else self.other_TD[ids_R]
        return Residual(self.x_TSD[ids_R], self.y_TD[ids_R], self.mix.rows(ids_R), other_RD)

    @property
    def parts(self) -> list[torch.Tensor]:
        """All tensors, behind a sublayer."""
        assert self.y_TD is not None
        assert self.mix is not None
        return [self.x_TSD, self.y_TD, *self.mix, *([] if self.other_TD is None else [self.other_TD])]

    @classmethod
    def of_parts(cls, parts: Sequence[torch.Tensor]) -> "Residual":
        """Makes one of such tensors."""
        x_TSD, y_TD, post_TS, comb_TSS, *other = parts
        return cls(x_TSD, y_TD, Mix(post_TS, comb_TSS), *other)

    def first(self, num_rows: int) -> "Residual":
        """Returns the residual of the first tokens, as views."""
        return Residual.of_parts([part[:num_rows] for part in self.parts])

    def enter(self, boundary: HyperBoundary) -> HyperOut:
        """Passes the boundary behind the last sublayer."""
        return boundary(self.x_TSD, self.y_TD, self.mix, self.other_TD)


@dataclass(frozen=True)
class Hidden:
    """The result of the last block: streams_TSD after it, and h_TD, collapsed and normed for the head."""

    streams_TSD: torch.Tensor
    h_TD: torch.Tensor


@dataclass(frozen=True)
class Block:
    """Maps a residual to the next. Each boundary mixes the previous output into the streams and makes the next
    input."""

    hc_attn: HyperBoundary
    attn: Attention
    hc_ffn: HyperBoundary
    ffn: FeedForward

    def prepare(self, tables: StepTables) -> PreparedStep:
        """Prepares a step for this layer's attention, which serves all layers of the model."""
        return self.attn.backend.prepare(tables)

    def __call__(
        self, residual: Residual, rotation: Rotation, token_ids_T: torch.Tensor, step: PreparedStep
    ) -> Residual:
        """Runs the layer. step: prepared from the tables of these rows."""
        at = residual.enter(self.hc_attn)
        y_TD = self.attn(at.h_TD, rotation, step)
        at = self.hc_ffn(at.x_TSD, y_TD, at.mix)
        routed_TD, shared_TD = self.ffn(at.h_TD, token_ids_T, step)
        return Residual(at.x_TSD, routed_TD, at.mix, shared_TD)
