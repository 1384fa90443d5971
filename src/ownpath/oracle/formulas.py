"""The formulas of docs/forward.md on plain tensors, each once, without intermediate rounding.

Callers that round in between compose a formula from its parts here.

Legend: T tokens, S streams, D hidden, N heads, H head dim, K keys, E experts, F frequencies.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ownpath.config import ModelConfig

QUERIES_AT_ONCE = 256
"""Queries scored at a time: scores of all heads over all keys are the largest tensors there are."""


def rms(x: Tensor, eps: float) -> Tensor:
    """Divides x by the root of its mean square, over the last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """Computes silu(min(gate, limit)) times up clamped to [-limit, limit]."""
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def frequencies(config: ModelConfig, ratio: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns radians per position for each pair of channels [F]: YaRN's in layers that compress, plain ones elsewhere.

    Pair i of F turns by theta^(-i / F) a position. YaRN divides the frequencies of pairs that turn less than
    ``beta_slow`` times over the original context by ``factor``, leaves those above ``beta_fast`` turns, and goes
    linearly over the pairs between. dtype: float32 is the model's own arithmetic.
    """
    dim, yarn = config.qk_rope_head_dim, config.yarn
    theta = config.compress_rope_theta if ratio else config.rope_theta
    plain = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=dtype) / dim)
    if yarn is None or not ratio:
        return plain
    lengths = (
        yarn.original_max_position_embeddings / (turns * 2 * math.pi) for turns in (yarn.beta_fast, yarn.beta_slow)
    )
    low, high = (dim * math.log(length) / (2 * math.log(theta)) for length in lengths)
    low, high = max(math.floor(low), 0), min(math.ceil(high), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=dtype) - low) / max(high - low, 0.001)).clamp(0, 1)
    return plain / yarn.factor * ramp + plain * (1 - ramp)


def rotate(x: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """Rotates the last 2F channels of x [T, ..., H] in pairs of neighbours; the others stay as they are. F may be 0."""
    shape, num_passed = (len(x), *[1] * (x.ndim - 2), cos_TF.shape[-1]), x.shape[-1] - 2 * cos_TF.shape[-1]
    turn = torch.complex(cos_TF.to(x.dtype), sin_TF.to(x.dtype)).view(shape)
    pairs = torch.view_as_complex(x[..., num_passed:].contiguous().unflatten(-1, (cos_TF.shape[-1], 2)))
    return torch.cat((x[..., :num_passed], torch.view_as_real(pairs * turn).flatten(-2)), -1)


def rotate_to(x: Tensor, positions_T: Tensor, config: ModelConfig, ratio: int, *, inverse: bool = False) -> Tensor:
    """Rotates x [T, ..., H] by position times frequency, angles in float32; ``inverse`` rotates back."""
    angles_TF = positions_T[:, None].float() * frequencies(config, ratio).to(x.device)
    return rotate(x, angles_TF.cos(), angles_TF.sin() * (-1 if inverse else 1))


def attention_weights(scores_TNK: Tensor, visible_TK: Tensor, sink_N: Tensor) -> Tensor:
    """Softmax over the visible keys and the sink, which adds nothing: [T, N, K]."""
    scores = scores_TNK.masked_fill(~visible_TK[:, None], -math.inf)
    sink = sink_N.expand(len(scores), -1)[..., None]
    return torch.cat((scores, sink), -1).softmax(-1)[..., :-1]


def index_scores(q_TIH: Tensor, k_CH: Tensor, weights_TI: Tensor) -> Tensor:
    """Sums w relu(q . k) over index heads: [T, C]. In slices of queries: [T, I, C] of a long text is gigabytes."""
    parts = zip(q_TIH.split(QUERIES_AT_ONCE), weights_TI.split(QUERIES_AT_ONCE), strict=True)
    return torch.cat([(torch.einsum("tih,ch->tic", q, k_CH).relu() * w[..., None]).sum(1) for q, w in parts])


def expert_scores(logits_TE: Tensor) -> Tensor:
    """Computes the router's scores, without its bias."""
    return F.softplus(logits_TE).sqrt()


def top_indices(ranked_TE: Tensor, num_chosen: int) -> Tensor:
    """Returns the indices of the largest of each row [T, num_chosen]; the lower index first at a tie."""
    return ranked_TE.sort(dim=-1, descending=True, stable=True).indices[:, :num_chosen]


def routing_weights(scores_TE: Tensor, ids_TK: Tensor, factor: float) -> Tensor:
    """Divides the chosen experts' scores by their sum, times ``routed_scaling_factor``."""
    weights_TK = scores_TE.gather(1, ids_TK)
    return weights_TK / weights_TK.sum(1, keepdim=True) * factor


@dataclass(frozen=True)
class Mixing:
    """One boundary's weights: fn [M, S * D], scale [3] (or [1], where nothing follows), base [M]; M = 2 S + S * S."""

    fn: Tensor
    scale: Tensor
    base: Tensor
    num_iters: int
    hc_eps: float
    norm_eps: float

    def logits(self, x_TSD: Tensor) -> Tensor:
        """Computes the mixing logits [T, M], before scale and base."""
        flat = x_TSD.flatten(1)
        return (flat @ self.fn.T) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + self.norm_eps)

    def pre(self, logits_TM: Tensor, num_streams: int) -> Tensor:
        """Computes the weight of each stream in the sublayer's input [T, S]."""
        logits, base = logits_TM[:, :num_streams], self.base[:num_streams]
        return torch.sigmoid(logits * self.scale[0] + base) + self.hc_eps

    def post(self, logits_TM: Tensor, num_streams: int) -> Tensor:
        """Computes the weight of the sublayer's output in each stream [T, S]."""
        part = slice(num_streams, 2 * num_streams)
        return 2 * torch.sigmoid(logits_TM[:, part] * self.scale[1] + self.base[part])

    def comb(self, logits_TM: Tensor, num_streams: int) -> Tensor:
        """Computes the weight of each stream in each new one [T, S from, S to], by alternating Sinkhorn steps."""
        logits, base = logits_TM[:, 2 * num_streams :], self.base[2 * num_streams :]
        comb = (logits * self.scale[2] + base).view(-1, num_streams, num_streams).softmax(-1) + self.hc_eps
        comb = comb / (comb.sum(1, keepdim=True) + self.hc_eps)
        for _ in range(self.num_iters - 1):
            comb = comb / (comb.sum(2, keepdim=True) + self.hc_eps)
            comb = comb / (comb.sum(1, keepdim=True) + self.hc_eps)
        return comb


def collapse(x_TSD: Tensor, pre_TS: Tensor) -> Tensor:
    """Computes a sublayer's input from the streams, before its norm: [T, D]."""
    return (pre_TS[..., None] * x_TSD).sum(1)


def write_streams(x_TSD: Tensor, y_TD: Tensor, post_TS: Tensor, comb_TSS: Tensor) -> Tensor:
    """Computes the new streams: stream k = post_k * y + sum over j of comb[j, k] * stream j."""
    return post_TS[..., None] * y_TD[:, None] + torch.einsum("tjk,tjd->tkd", comb_TSS, x_TSD)
