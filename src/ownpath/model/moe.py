"""The feed-forward block: routed experts plus the shared expert."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ownpath.attention.interface import DecodeStep, PreparedStep
from ownpath.runners import SwigluMlp

ChooseExperts = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(x [T, D], token ids [T]) -> expert ids and weights [T, K]."""


@dataclass(frozen=True)
class MoE:
    """Runs routed and shared experts, both clamped SwiGLU, whose sum is the block's output.

    The boundary that follows adds the two as it reads them, rounded as their sum would be.

    router: (x [T, D], token_ids [T]) -> expert ids and weights [T, K].
    experts: (x [T, D], ids [T, K], weights [T, K]) -> y [T, D].
    decode_router: computes what ``router`` does, in decode steps of up to ``decode_rows`` rows.
    """

    router: ChooseExperts
    experts: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    shared_experts: SwigluMlp
    decode_router: ChooseExperts | None = None
    decode_rows: int = 0

    @property
    def moe(self) -> "MoE":
        """This part itself, which no exchange surrounds."""
        return self

    def __call__(
        self, x_TD: torch.Tensor, token_ids_T: torch.Tensor, step: PreparedStep
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the output of the routed experts and of the shared one, [T, D] each."""
        return self.experts(x_TD, *self.route(x_TD, token_ids_T, step)), self.shared_experts(x_TD)

    def route(
        self, x_TD: torch.Tensor, token_ids_T: torch.Tensor, step: PreparedStep
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns expert ids and weights [T, K]."""
        router = self.router
        if self.decode_router is not None and isinstance(step, DecodeStep) and len(x_TD) <= self.decode_rows:
            router = self.decode_router
        return router(x_TD, token_ids_T)
