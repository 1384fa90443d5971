"""Torch reference of manifold-constrained hyper-connections (mHC): the residual as several streams.

Each token carries S streams. A small projection derives three sets of weights from them: ``pre`` collapses the streams
into a sublayer's input, ``post`` spreads the sublayer's output over the streams, and ``comb``, brought close to a
doubly stochastic matrix by Sinkhorn iterations, mixes the streams.

The boundary between two sublayers is post of the one before, then pre and RMS norm of the one after.

Legend: T tokens, S streams, D hidden, M = (2 + S) * S mixing weights. All mixing is at least float32.
Source: mHC (Xie et al.), as DeepSeek-V4's published inference code orders the steps.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F

from ownpath.kernels.contract import Kernel, Operand
from ownpath.kernels.mixture import sum_dtype
from ownpath.kernels.norms.ref import rms_norm
from ownpath.kernels.reference import Reference


class Mix(NamedTuple):
    """The weights that pre derives for post: post_TS, and comb_TSS [from stream, to stream]; at least float32."""

    post_TS: torch.Tensor
    comb_TSS: torch.Tensor

    def rows(self, ids_R: torch.Tensor) -> "Mix":
        """Returns the mix of some tokens."""
        return Mix(self.post_TS[ids_R], self.comb_TSS[ids_R])


@dataclass(frozen=True)
class HyperWeights:
    """One boundary's weights. After the last sublayer there is no mix to derive: M is S, and scale has one entry.

    Shapes: fn float32 [M, S*D]; base float32 [M]; scale float32 [3] (pre, post, comb) or [1]; norm_weight [D].
    num_iters: Sinkhorn iterations; eps: added to pre and to Sinkhorn's divisors; mix_norm_eps and norm_eps: of the
        root mean square in front of fn, and of the sublayer's norm.
    """

    fn: torch.Tensor
    base: torch.Tensor
    scale: torch.Tensor
    norm_weight: torch.Tensor
    num_iters: int
    eps: float
    mix_norm_eps: float
    norm_eps: float


class HyperOut(NamedTuple):
    """A boundary's results: new streams [T, S, D], the next sublayer's normed input [T, D], and its mix."""

    x_TSD: torch.Tensor
    h_TD: torch.Tensor
    mix: Mix | None


class BoundaryKernel(Kernel[Operand], Protocol[Operand]):
    """Post of the sublayer that made y (none before the first), pre of the coming one, and its norm."""

    def prepare(self, weights: HyperWeights) -> Operand:
        """Makes the operand."""

    def variant(self, x_TSD: torch.Tensor, operand: Operand) -> str | None:
        """Returns the names of the variants that a call launches; ``None`` without variants."""

    def workspace(self, operand: Operand, num_tokens: int) -> torch.Tensor | None:
        """Allocates scratch for calls of up to ``num_tokens`` tokens; ``None`` if the kernel needs none."""

    def run(
        self,
        x_TSD: torch.Tensor,
        y_TD: torch.Tensor | None,
        mix: Mix | None,
        operand: Operand,
        other_TD: torch.Tensor | None = None,
        *,
        out: HyperOut | None = None,
        workspace: torch.Tensor | None = None,
    ) -> HyperOut:
        """Computes the boundary. other: what is to be added to y. Errors: ValueError naming an operand that the kernel
        refuses."""


def sinkhorn(logits_TSS: torch.Tensor, num_iters: int, eps: float) -> torch.Tensor:
    """Applies row softmax, then ``num_iters`` column normalisations with row normalisations between them.

    Rows are summed over dim -1, columns over dim -2; the last step makes sums over dim -2 equal to 1 up to eps.
    """
    # Tokens last: a step of the loop works on whole rows of them.
    comb_SST = torch.softmax(logits_TSS, dim=-1).add_(eps).movedim(0, -1).contiguous()
    rows_ST, columns_ST = comb_SST.sum(1, keepdim=True), comb_SST.sum(0, keepdim=True)
    comb_SST.div_(columns_ST.add_(eps))
    for _ in range(num_iters - 1):
        comb_SST.div_(torch.sum(comb_SST, 1, keepdim=True, out=rows_ST).add_(eps))
        comb_SST.div_(torch.sum(comb_SST, 0, keepdim=True, out=columns_ST).add_(eps))
    return comb_SST.movedim(-1, 0).contiguous()


def hyper_post(x_TSD: torch.Tensor, y_TD: torch.Tensor, mix: Mix) -> torch.Tensor:
    """Computes stream k = post_k * y + sum over j of comb[j, k] * stream j, rounded once to the streams' dtype."""
    wide = mix.comb_TSS.dtype
    spread_TSD = mix.post_TS.unsqueeze(-1) * y_TD.to(wide).unsqueeze(-2)
    mixed_TSD = mix.comb_TSS.transpose(-1, -2) @ x_TSD.to(wide)
    return (spread_TSD + mixed_TSD).to(x_TSD.dtype)


def hyper_pre(x_TSD: torch.Tensor, weights: HyperWeights) -> tuple[torch.Tensor, Mix | None]:
    """Collapses the streams into [T, D] and derives the weights for post; ``None`` after the last sublayer."""
    s = x_TSD.shape[1]
    flat = x_TSD.flatten(1).to(sum_dtype(x_TSD))
    logits_TM = F.linear(rms_norm(flat, None, weights.mix_norm_eps), weights.fn.to(flat.dtype))
    sizes = (s, s, s * s) if logits_TM.shape[1] > s else (s,)
    parts = zip(logits_TM.split(sizes, dim=-1), weights.scale, weights.base.split(sizes), strict=True)
    pre, *rest = (logits * scale + base for logits, scale, base in parts)
    pre = torch.sigmoid(pre) + weights.eps
    h_TD = (pre.unsqueeze(-1) * x_TSD.to(pre.dtype)).sum(1).to(x_TSD.dtype)
    if not rest:
        return h_TD, None
    post, comb = rest
    comb_TSS = sinkhorn(comb.unflatten(-1, (s, s)), weights.num_iters, weights.eps)
    return h_TD, Mix(2 * torch.sigmoid(post), comb_TSS)


def hyper_boundary(
    x_TSD: torch.Tensor,
    y_TD: torch.Tensor | None,
    mix: Mix | None,
    weights: HyperWeights,
    other_TD: torch.Tensor | None = None,
    out: HyperOut | None = None,
    workspace: torch.Tensor | None = None,
) -> HyperOut:
    """Computes post of the sublayer that made ``y_TD`` (none before the first), pre of the next one, and its norm.

    Rounded where the separate steps round, to the dtype of the streams: streams, collapsed input, normed input.
    Shapes: x [T, S, D]; y [T, D]; other [T, D], the second part of the sublayer's output, which is first added to y and
    rounded to its dtype. ``workspace`` is for kernels that need one.
    """
    if y_TD is None:
        assert other_TD is None
    else:
        assert mix is not None
        y_TD = y_TD if other_TD is None else y_TD + other_TD
        x_TSD = hyper_post(x_TSD, y_TD, mix)
    h_TD, new_mix = hyper_pre(x_TSD, weights)
    found = HyperOut(x_TSD, rms_norm(h_TD, weights.norm_weight, weights.norm_eps), new_mix)
    if out is None:
        return found
    out.x_TSD.copy_(found.x_TSD)
    out.h_TD.copy_(found.h_TD)
    if new_mix is not None:
        assert out.mix is not None
        out.mix.post_TS.copy_(new_mix.post_TS)
        out.mix.comb_TSS.copy_(new_mix.comb_TSS)
    return out


class HyperBoundaryReference(Reference):
    """``hyper_boundary`` as a kernel. The operand is the weights."""

    def prepare(self, weights: HyperWeights) -> HyperWeights:
        """Returns the weights unchanged."""
        return weights

    def variant(self, x_TSD: torch.Tensor, operand: HyperWeights) -> None:
        """Returns ``None``: the kernel has no variants."""

    def workspace(self, operand: HyperWeights, num_tokens: int) -> None:
        """Returns ``None``: no call needs scratch."""

    def run(
        self,
        x_TSD: torch.Tensor,
        y_TD: torch.Tensor | None,
        mix: Mix | None,
        operand: HyperWeights,
        other_TD: torch.Tensor | None = None,
        *,
        out: HyperOut | None = None,
        workspace: torch.Tensor | None = None,
    ) -> HyperOut:
        """Computes new streams, the next sublayer's normed input, and its mix."""
        return hyper_boundary(x_TSD, y_TD, mix, operand, other_TD, out, workspace)

    def __call__(
        self,
        x_TSD: torch.Tensor,
        y_TD: torch.Tensor | None,
        mix: Mix | None,
        weights: HyperWeights,
        other_TD: torch.Tensor | None = None,
        out: HyperOut | None = None,
        workspace: torch.Tensor | None = None,
    ) -> HyperOut:
        """Computes ``hyper_boundary``."""
        return hyper_boundary(x_TSD, y_TD, mix, weights, other_TD, out, workspace)


HYPER_BOUNDARY = HyperBoundaryReference()
