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

    def queries(self, qr_TR: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        """Projects and rotates index queries: [T, I, H]."""
        q_TIH: torch.Tensor = self.wq_b(qr_TR).unflatten(-1, (self.num_heads, self.head_dim))
        return self.tap_q(self.quantize_index(rotation.apply(q_TIH)))

    def head_weights(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Projects head weights w [T, I], with both softmax scales folded in."""
        weights_TI = self.weights_proj(x_TD)
        scale: float = self.head_dim**-0.5 * self.num_heads**-0.5
        return self.tap_weights(weights_TI.to(wide_dtype(weights_TI.dtype)) * scale)
