"""The lightning indexer's projections on the way to attention, from which a CSA layer's compressed entries are scored.

Legend: T tokens, I index heads, H index head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ownpath.attention.rope import Rotation
from ownpath.numerics import wide_dtype
from ownpath.trace import Tap


@dataclass(frozen=True)
class Indexer:
    """quantize_index: rounds queries to the format of the index keys; the identity without one."""

    num_heads: int
    head_dim: int
    quantize_index: Callable[[torch.Tensor], torch.Tensor]
    tap_q: Tap
    tap_weights: Tap

    def queries(self, q_TIH: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        """Rotates index queries and rounds them to the index keys' format."""
        return self.tap_q(self.quantize_index(rotation.apply(q_TIH)))

    def head_weights(self, weights_TI: torch.Tensor) -> torch.Tensor:
        """Scales head weights by both softmax scales, in at least float32."""
        return self.tap_weights(weights_TI.to(wide_dtype(weights_TI.dtype)) * self.weight_scale)

    @property
    def weight_scale(self) -> float:
        scale: float = self.head_dim**-0.5 * self.num_heads**-0.5
        return scale
