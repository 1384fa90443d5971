"""Which experts a token goes to, and with what weight: by score with a selection bias, or by token id.

Legend: T tokens, E experts, K experts per token.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ownpath.model.norm import wide_dtype
from ownpath.runners import Linear


@dataclass(frozen=True)
class Router:
    """Scores are sqrt(softplus(gate x)). Exactly one of ``bias_E`` and ``tid2eid_VK`` is given.

    bias_E float32 [E] shifts the scores for the selection only, never the weights. tid2eid_VK int64 [vocab, K] names
    the experts of each token id (hash-routed layers).
    """

    gate: Linear
    num_experts_per_tok: int
    routed_scaling_factor: float
    bias_E: torch.Tensor | None
    tid2eid_VK: torch.Tensor | None

    def __call__(self, x_TD: torch.Tensor, token_ids_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns expert ids int64 [T, K] and weights [T, K] that sum to ``routed_scaling_factor``.

        Router arithmetic is at least float32 from the hidden states on.
        """
        scores_TE = F.softplus(self.gate(x_TD.to(wide_dtype(x_TD.dtype)))).sqrt()
        if self.tid2eid_VK is not None:
            ids_TK = self.tid2eid_VK[token_ids_T]
        else:
            assert self.bias_E is not None
            # A stable sort: the lower expert id wins an exact tie, on every device.
            ranked_TE = (scores_TE + self.bias_E).sort(dim=-1, descending=True, stable=True).indices
            ids_TK = ranked_TE[:, : self.num_experts_per_tok]
        weights_TK = scores_TE.gather(1, ids_TK)
        return ids_TK, weights_TK / weights_TK.sum(-1, keepdim=True) * self.routed_scaling_factor
