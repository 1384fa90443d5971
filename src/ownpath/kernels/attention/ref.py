"""Torch reference of attention over shared keys, which are the values too, with a learned sink per head.

Shape suffixes: t queries, N heads, H head dim, K keys.
"""

from dataclasses import dataclass

import torch

from ownpath.kernels.reference import Reference
from ownpath.numerics import wide_dtype


def attend(
    q_tNH: torch.Tensor, keys_KH: torch.Tensor, visible_tK: torch.Tensor, sink_N: torch.Tensor, softmax_scale: float
) -> torch.Tensor:
    """Computes attention [t, N, H]: softmax in at least float32 over visible keys and the sink.

    Attention weights are rounded to the values' dtype.

    The sink is part of the softmax's sum and adds nothing to the output.
    """
    wide = wide_dtype(q_tNH.dtype)
    scores_tNK = (q_tNH @ keys_KH.T).to(wide) * softmax_scale
    scores_tNK = scores_tNK.masked_fill(~visible_tK[:, None], -torch.inf)
    sink_tN1 = sink_N.to(wide).expand(len(q_tNH), -1).unsqueeze(-1)
    weights_tNK = torch.cat((scores_tNK, sink_tN1), dim=-1).softmax(dim=-1)[..., :-1]
    return weights_tNK.to(keys_KH.dtype) @ keys_KH


@dataclass(frozen=True)
class AttentionWeights:
    """sink float32 [N]: a learned logit for each head; softmax_scale: of the scores."""

    sink_N: torch.Tensor
    softmax_scale: float


class AttentionReference(Reference):
    """``attend`` as a kernel. The operand is the weights."""

    def prepare(self, weights: AttentionWeights) -> AttentionWeights:
        """Returns the weights unchanged."""
        return weights

    def variant(self, q_tNH: torch.Tensor, operand: AttentionWeights) -> None:
        """Returns ``None``: the kernel has no variants."""

    def run(
        self, q_tNH: torch.Tensor, keys_KH: torch.Tensor, visible_tK: torch.Tensor, operand: AttentionWeights
    ) -> torch.Tensor:
        """Computes [t, N, H]."""
        return attend(q_tNH, keys_KH, visible_tK, operand.sink_N, operand.softmax_scale)


ATTENTION = AttentionReference()
