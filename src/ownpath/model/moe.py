"""The feed-forward block: routed experts plus the shared expert."""

from dataclasses import dataclass

import torch

from ownpath.model.router import Router
from ownpath.runners import Nvfp4MoE, SwigluMlp


@dataclass(frozen=True)
class MoE:
    """y = experts(x, routed) + shared_experts(x), both clamped SwiGLU."""

    router: Router
    experts: Nvfp4MoE
    shared_experts: SwigluMlp

    def __call__(self, x_TD: torch.Tensor, token_ids_T: torch.Tensor) -> torch.Tensor:
        topk_ids, topk_weights = self.router(x_TD, token_ids_T)
        return self.experts(x_TD, topk_ids, topk_weights) + self.shared_experts(x_TD)
