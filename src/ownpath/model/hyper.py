"""Manifold-constrained hyper-connections (mHC): the residual as several streams, mixed before and after each block.

Each token carries S streams. From them a small projection derives three sets of weights: ``pre`` collapses the
streams into the block's input, ``post`` spreads the block's output over the streams, and ``comb``, pushed towards a
doubly stochastic matrix by Sinkhorn iterations, mixes the streams with each other.

Legend: T tokens, S streams, D hidden, M = (2 + S) * S mixing weights. All mixing is at least float32.
Source: mHC (Xie et al.), as DeepSeek-V4's published inference code orders the steps.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ownpath.model.norm import unweighted_rms_norm, wide_dtype


@dataclass(frozen=True)
class Mix:
    """What ``pre`` leaves for ``post``: post_TS, and comb_TSS indexed [from stream, to stream]."""

    post_TS: torch.Tensor
    comb_TSS: torch.Tensor


def sinkhorn(logits_TSS: torch.Tensor, num_iters: int, eps: float) -> torch.Tensor:
    """Row softmax, then ``num_iters`` column normalisations with row normalisations between them.

    Rows are the second, columns the last but one dimension summed over: after it, sums over dim -2 are 1 up to eps.
    """
    comb_TSS = torch.softmax(logits_TSS, dim=-1) + eps
    comb_TSS = comb_TSS / (comb_TSS.sum(-2, keepdim=True) + eps)
    for _ in range(num_iters - 1):
        comb_TSS = comb_TSS / (comb_TSS.sum(-1, keepdim=True) + eps)
        comb_TSS = comb_TSS / (comb_TSS.sum(-2, keepdim=True) + eps)
    return comb_TSS


def _mixing_logits(x_TSD: torch.Tensor, fn: torch.Tensor, norm_eps: float) -> torch.Tensor:
    flat = x_TSD.flatten(1).to(wide_dtype(x_TSD.dtype))
    return F.linear(unweighted_rms_norm(flat, norm_eps), fn.to(flat.dtype))


def _collapse(pre_TS: torch.Tensor, x_TSD: torch.Tensor) -> torch.Tensor:
    return (pre_TS.unsqueeze(-1) * x_TSD.to(pre_TS.dtype)).sum(1).to(x_TSD.dtype)


@dataclass(frozen=True)
class HyperConnection:
    """The connection around one block. fn float32 [M, S*D], base float32 [M], scale float32 [3]."""

    fn: torch.Tensor
    base: torch.Tensor
    scale: torch.Tensor
    num_streams: int
    num_iters: int
    eps: float
    norm_eps: float

    def pre(self, x_TSD: torch.Tensor) -> tuple[torch.Tensor, Mix]:
        """Collapses the streams into the block's input [T, D] and derives the weights for ``post``."""
        s = self.num_streams
        logits_TM = _mixing_logits(x_TSD, self.fn, self.norm_eps)
        sizes = (s, s, s * s)
        parts = zip(logits_TM.split(sizes, dim=-1), self.scale, self.base.split(sizes), strict=True)
        pre, post, comb = (logits * scale + base for logits, scale, base in parts)
        comb_TSS = sinkhorn(comb.unflatten(-1, (s, s)), self.num_iters, self.eps)
        y_TD = _collapse(torch.sigmoid(pre) + self.eps, x_TSD)
        return y_TD, Mix(2 * torch.sigmoid(post), comb_TSS)

    def post(self, y_TD: torch.Tensor, x_TSD: torch.Tensor, mix: Mix) -> torch.Tensor:
        """stream k = post_k * y + sum over j of comb[j, k] * stream j, rounded once, to the dtype of the streams."""
        wide = mix.comb_TSS.dtype
        spread_TSD = mix.post_TS.unsqueeze(-1) * y_TD.to(wide).unsqueeze(-2)
        mixed_TSD = mix.comb_TSS.transpose(-1, -2) @ x_TSD.to(wide)
        return (spread_TSD + mixed_TSD).to(x_TSD.dtype)


@dataclass(frozen=True)
class HyperHead:
    """The last collapse, before the final norm. fn float32 [S, S*D], base float32 [S], scale float32 [1]."""

    fn: torch.Tensor
    base: torch.Tensor
    scale: torch.Tensor
    eps: float
    norm_eps: float

    def __call__(self, x_TSD: torch.Tensor) -> torch.Tensor:
        logits_TS = _mixing_logits(x_TSD, self.fn, self.norm_eps) * self.scale + self.base
        return _collapse(torch.sigmoid(logits_TS) + self.eps, x_TSD)
