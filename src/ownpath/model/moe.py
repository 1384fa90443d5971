"""The feed-forward block: routed experts plus the shared expert."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ownpath.runners import SwigluMlp


@dataclass(frozen=True)
class MoE:
    """Adds routed and shared experts: y = experts(x, routed) + shared_experts(x), both clamped SwiGLU.

    router: (x [T, D], token_ids [T]) -> expert ids and weights [T, K].
    experts: (x [T, D], ids [T, K], weights [T, K]) -> y [T, D].
    """

    router: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    experts: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    shared_experts: SwigluMlp

    def __call__(self, x_TD: torch.Tensor, token_ids_T: torch.Tensor) -> torch.Tensor:
        topk_ids, topk_weights = self.router(x_TD, token_ids_T)
        return self.experts(x_TD, topk_ids, topk_weights) + self.shared_experts(x_TD)
