"""The lightning indexer's projections, from which a CSA layer's compressed entries are scored.

Legend: T tokens, I index heads, H index head dim, P compressor width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ownpath.attention.rope import Rotation
from ownpath.numerics import wide_dtype
from ownpath.runners import Linear
from ownpath.trace import Tap


@dataclass(frozen=True)
class Indexer:
    """wq_b: low-rank query -> [I*H]; weights_proj: hidden -> [I]; compressor: hidden -> raw rows of its keys [T, 2P].

    quantize_index: rounds queries to the format of the index keys; the identity without one.
    """

    wq_b: Linear
    weights_proj: Linear
    compressor: Linear
    num_heads: int
    head_dim: int
    quantize_index: Callable[[torch.Tensor], torch.Tensor]
    tap_q: Tap
    tap_weights: Tap

    def multiply(self, x_TD: torch.Tensor, qr_TR: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Projects index queries [T, I, H] and head weights [T, I]."""
        q_TIH: torch.Tensor = self.wq_b(qr_TR).unflatten(-1, (self.num_heads, self.head_dim))
        return q_TIH, self.weights_proj(x_TD)

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
