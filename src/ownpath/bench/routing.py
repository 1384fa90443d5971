"""Random routing of a benchmark's tokens."""

from dataclasses import dataclass

import torch

from ownpath.bench.shapes import MoeShape


@dataclass(frozen=True)
class TopkRouting:
    """Shapes: topk_ids int32 [T, K], the experts of one token distinct; topk_weights float32 [T, K], rows sum to 1."""

    topk_ids: torch.Tensor
    topk_weights: torch.Tensor

    @property
    def distinct_experts(self) -> int:
        """Number of experts that get at least one token."""
        return int(self.topk_ids.unique().numel())


def uniform_routing(shape: MoeShape, num_tokens: int, seed: int, device: str) -> TopkRouting:
    """Draws each token's experts uniformly without replacement; the same for a seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_tokens, shape.num_experts, generator=generator)
    weights = torch.rand(num_tokens, shape.top_k, generator=generator) + 0.5
    return TopkRouting(
        scores.topk(shape.top_k, dim=-1).indices.to(device=device, dtype=torch.int32),
        (weights / weights.sum(dim=-1, keepdim=True)).to(device),
    )
