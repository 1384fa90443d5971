"""Hyper-connections: what a sublayer reads from the streams, and how its output goes back into them.

Legend: T tokens, S streams, D hidden.
"""

import torch
from torch import Tensor

from ownpath.verify.reference.arithmetic import Scope


def read_streams(scope: Scope, slot: str, norm_key: str, x_TSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sublayer's normed input [T, D], and what its output will need: post [T, S], comb [T, S from, S to]."""
    config = scope.config
    streams, eps = config.hc_mult, config.hc_eps
    scale, base = scope.stored.param(f"{slot}_scale"), scope.stored.param(f"{slot}_base")
    mixes = _mixes(scope, slot, x_TSD)
    pre = torch.sigmoid(mixes[:, :streams] * scale[0] + base[:streams]) + eps
    post = 2 * torch.sigmoid(mixes[:, streams : 2 * streams] * scale[1] + base[streams : 2 * streams])
    comb = (mixes[:, 2 * streams :] * scale[2] + base[2 * streams :]).view(-1, streams, streams).softmax(-1) + eps
    comb = comb / (comb.sum(1, keepdim=True) + eps)
    for _ in range(config.hc_sinkhorn_iters - 1):
        comb = comb / (comb.sum(2, keepdim=True) + eps)
        comb = comb / (comb.sum(1, keepdim=True) + eps)
    return _collapsed(scope, slot, norm_key, x_TSD, pre), post, comb


def read_last(scope: Scope, slot: str, norm_key: str, x_TSD: Tensor) -> Tensor:
    """What the head reads after the last sublayer: [T, D]."""
    mixes = _mixes(scope, slot, x_TSD)
    pre = torch.sigmoid(mixes * scope.stored.param(f"{slot}_scale") + scope.stored.param(f"{slot}_base"))
    return _collapsed(scope, slot, norm_key, x_TSD, pre + scope.config.hc_eps)


def write_streams(x_TSD: Tensor, y_TD: Tensor, post_TS: Tensor, comb_TSS: Tensor) -> Tensor:
    """stream k = post_k * y + sum over j of comb[j, k] * stream j."""
    return post_TS[..., None] * y_TD[:, None] + torch.einsum("tjk,tjd->tkd", comb_TSS, x_TSD)


def _mixes(scope: Scope, slot: str, x_TSD: Tensor) -> Tensor:
    flat = x_TSD.flatten(1)
    rms = torch.rsqrt(flat.square().mean(-1, keepdim=True) + scope.config.rms_norm_eps)
    return (flat @ scope.stored.param(f"{slot}_fn").T) * rms


def _collapsed(scope: Scope, slot: str, norm_key: str, x_TSD: Tensor, pre_TS: Tensor) -> Tensor:
    """Rounded before and after the norm."""
    h_TD = scope.arithmetic.rounded((pre_TS[..., None] * x_TSD).sum(1))
    return scope.norm(f"{slot}.h", h_TD, norm_key)
