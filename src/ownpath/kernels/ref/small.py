"""Torch reference of the small operations around the products: router, RMS norm, SwiGLU, ``wo_a`` with inverse RoPE.

Legend: T tokens, E experts, K experts per token, V vocabulary, D width, F half of a gate_up row, N heads, H head dim,
A angles (half the rotary channels), G head groups, I = N * H / G inputs per group, R outputs per group.
"""

import torch
import torch.nn.functional as F

from ownpath.kernels.ref.linear import sum_dtype
from ownpath.kernels.ref.moe import swiglu as clamped_swiglu


def router(
    logits_TE: torch.Tensor,
    num_experts_per_tok: int,
    routed_scaling_factor: float,
    bias_E: torch.Tensor | None = None,
    token_ids_T: torch.Tensor | None = None,
    tid2eid_VK: torch.Tensor | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Expert ids [T, K] and weights [T, K] that sum to ``routed_scaling_factor``; scores are sqrt(softplus(logits)).

    Either ``bias_E`` shifts the scores for the selection (never the weights; the lower id wins an exact tie), or
    ``tid2eid_VK`` names the experts of each token id.
    """
    scores_TE = F.softplus(logits_TE).sqrt()
    if tid2eid_VK is not None:
        assert token_ids_T is not None
        ids_TK = tid2eid_VK[token_ids_T]
    else:
        assert bias_E is not None
        # A stable sort: the lower expert id wins an exact tie, on every device.
        ranked_TE = (scores_TE + bias_E).sort(dim=-1, descending=True, stable=True).indices
        ids_TK = ranked_TE[:, :num_experts_per_tok]
    weights_TK = scores_TE.gather(1, ids_TK)
    weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True) * routed_scaling_factor
    return (ids_TK, weights_TK) if out is None else (out[0].copy_(ids_TK), out[1].copy_(weights_TK))


def rms_norm(
    x: torch.Tensor, weight_D: torch.Tensor | None, eps: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """y = weight * x / sqrt(mean(x²) + eps) over the last dimension, rounded once; no weight means ones."""
    wide = x.to(sum_dtype(x))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = (y if weight_D is None else y * weight_D.to(y.dtype)).to(x.dtype)
    return y if out is None else out.copy_(y)


def swiglu(gate_up_TF2: torch.Tensor, limit: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit), gate columns first, in float32, rounded once."""
    gate, up = gate_up_TF2.to(sum_dtype(gate_up_TF2)).chunk(2, dim=-1)
    y = clamped_swiglu(gate, up, limit).to(gate_up_TF2.dtype)
    return y if out is None else out.copy_(y)


def rope_inverse(x: torch.Tensor, cos_TA: torch.Tensor, sin_TA: torch.Tensor) -> torch.Tensor:
    """Turns the last 2A channels of x [T, ..., H], in pairs (2i, 2i+1), back by their angles."""
    num_passed = x.shape[-1] - 2 * cos_TA.shape[-1]
    even, odd = x[..., num_passed:].to(sum_dtype(x)).unflatten(-1, (-1, 2)).unbind(-1)
    shape = (len(cos_TA), *[1] * (x.ndim - 2), cos_TA.shape[-1])
    cos, sin = cos_TA.view(shape), -sin_TA.view(shape)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return torch.cat((x[..., :num_passed], turned.to(x.dtype)), dim=-1)


def rope_grouped_linear(
    o_TNH: torch.Tensor,
    cos_TA: torch.Tensor,
    sin_TA: torch.Tensor,
    weight_GRI: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """y[t, g] = W[g] u[t, g], where u is the attention output with the rotation of its channels undone.

    Shapes: o [T, N, H]; cos and sin float32 [T, A]; weight [G, R, I]; y [T, G, R].
    """
    u_TGI = rope_inverse(o_TNH, cos_TA, sin_TA).flatten(1).unflatten(-1, (len(weight_GRI), -1))
    weight_GIR = weight_GRI.to(u_TGI.dtype).transpose(1, 2)
    y_TGR = torch.bmm(u_TGI.transpose(0, 1), weight_GIR).transpose(0, 1)
    return y_TGR if out is None else out.copy_(y_TGR)
