"""Torch reference of attention over shared keys, which are the values too, with a learned sink per head.

Shape suffixes: t queries, N heads, H head dim, K keys.
"""

import torch

from ownpath.numerics import wide_dtype


def attend(
    q_tNH: torch.Tensor, keys_KH: torch.Tensor, visible_tK: torch.Tensor, sink_N: torch.Tensor, softmax_scale: float
) -> torch.Tensor:
    """Softmax in at least float32 over visible keys and the sink; weights rounded to the values' dtype: [t, N, H].

    The sink takes part in the softmax's sum and adds nothing to the output.
    """
    wide = wide_dtype(q_tNH.dtype)
    scores_tNK = (q_tNH @ keys_KH.T).to(wide) * softmax_scale
    scores_tNK = scores_tNK.masked_fill(~visible_tK[:, None], -torch.inf)
    sink_tN1 = sink_N.to(wide).expand(len(q_tNH), -1).unsqueeze(-1)
    weights_tNK = torch.cat((scores_tNK, sink_tN1), dim=-1).softmax(dim=-1)[..., :-1]
    return weights_tNK.to(keys_KH.dtype) @ keys_KH
