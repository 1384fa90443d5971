"""Synthetic decoder layers of the published shapes, and random values for what goes into them."""

from dataclasses import dataclass
from types import MappingProxyType

import torch

from ownpath.bench.published import ONE_LAYER, SHAPES, SMALL_VOCAB
from ownpath.config import ModelConfig

RATIOS = MappingProxyType({"sliding": 0, "csa": 4, "hca": 128})


def layer_config(shape: str, layer: str, routing: str) -> ModelConfig:
    """Returns one layer's config at a published shape. layer: "sliding", "csa", "hca"; routing: "hash" or "score"."""
    own = {"compress_ratios": [RATIOS[layer]], "num_hash_layers": int(routing == "hash")}
    return ModelConfig.from_dict(SHAPES[shape] | ONE_LAYER | SMALL_VOCAB | own)


@dataclass(frozen=True)
class Values:
    """Random values on a device, reproducible: they depend on the seed and on the order of calls."""

    device: torch.device
    generator: torch.Generator

    @classmethod
    def of_seed(cls, device: torch.device, seed: int) -> "Values":
        return cls(device, torch.Generator(device).manual_seed(seed))

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def integers(self, low: int, high: int, shape: torch.Size) -> torch.Tensor:
        """Returns uint8 in [low, high)."""
        return torch.randint(low, high, shape, generator=self.generator, device=self.device, dtype=torch.uint8)
