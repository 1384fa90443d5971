"""The MTP module of tiny-v4 as training computes it: in plain torch, over whole rows, with gradients.

    x[s] = e_proj(enorm(embed(next token))) + h_proj(hnorm(streams[s]))

then one layer of the sliding-window kind, the collapse of the streams, and the norm before the backbone's head.
Weights are keyed by their names in the checkpoint without ``mtp.0.``; routed experts are two tensors, ``w13`` and
``w2`` of all of them. Everything is float32 or, under a test, float64.

Legend: B rows, W positions, S streams, D hidden, N heads, H head dim, R rotary channels, E experts, F expert width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ownpath.formats import FP8_BLOCK, NVFP4, Format
from ownpath.numerics import dequantize
from tiny.fakequant import quantize_as
from tiny.network import FIELDS

Weights = dict[str, Tensor]

EXPERTS_W13, EXPERTS_W2 = "ffn.experts.w13", "ffn.experts.w2"
STORED: dict[str, Format] = {
    **{f"attn.{name}.weight": NVFP4 for name in ("wq_a", "wq_b", "wkv", "wo_b")},
    **{f"ffn.shared_experts.{name}.weight": NVFP4 for name in ("w1", "w2", "w3")},
    EXPERTS_W13: NVFP4,
    EXPERTS_W2: NVFP4,
    **dict.fromkeys(("e_proj.weight", "h_proj.weight", "attn.wo_a.weight"), FP8_BLOCK),
}
"""The quantised weights: the backbone's formats, and FP8 blocks where published drafts have them."""
_FP32 = ("hc_", "attn.attn_sink", "ffn.gate.bias")


def stored_values(weights: Weights) -> Weights:
    """Returns the values that a reader of the checkpoint gets, in float32."""
    found = {}
    for name, weight in weights.items():
        if name in STORED:
            found[name] = dequantize(quantize_as(STORED[name], weight))
        else:
            found[name] = weight if name.startswith(_FP32) else weight.bfloat16().to(weight.dtype)
    return found


@dataclass(frozen=True)
class Places:
    """The rotation and the mask that follow from positions.

    Shapes: turn complex [W, R / 2]; hidden bool [W, W], True where not attended.
    """

    turn: Tensor
    hidden: Tensor

    @classmethod
    def of(cls, width: int, device: torch.device) -> "Places":
        rotary = FIELDS["qk_rope_head_dim"]
        frequencies = FIELDS["rope_theta"] ** (-torch.arange(0, rotary, 2, dtype=torch.float32) / rotary)
        angles = torch.arange(width, dtype=torch.float32)[:, None] * frequencies
        age = torch.arange(width)[:, None] - torch.arange(width)
        hidden = (age < 0) | (age >= FIELDS["sliding_window"])
        return cls(torch.polar(torch.ones_like(angles), angles).to(device), hidden.to(device))


def draft_hidden(w: Weights, streams: Tensor, embedded: Tensor, places: Places, see: Callable[..., None]) -> Tensor:
    """Computes the module's hidden, normed for the head: [B, W, D].

    streams: of the backbone [B, W, S, D]. embedded: of the next tokens [B, W, D].
    see: is called with the name and the input of each quantised product, and with the experts' counts.
    """
    e = norm(embedded, w["enorm.weight"])
    h = norm(streams, w["hnorm.weight"])
    see("e_proj", e)
    see("h_proj", h)
    x = F.linear(e, w["e_proj.weight"]).unsqueeze(2) + F.linear(h, w["h_proj.weight"])
    x = _sublayer(w, "hc_attn", x, lambda y: _attention(w, norm(y, w["attn_norm.weight"]), places, see))
    x = _sublayer(w, "hc_ffn", x, lambda y: _ffn(w, norm(y, w["ffn_norm.weight"]), see))
    pre = torch.sigmoid(_mixed(w, "hc_head", x) * w["hc_head_scale"] + w["hc_head_base"]) + FIELDS["hc_eps"]
    return norm((pre.unsqueeze(-1) * x).sum(2), w["norm.weight"])


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, FIELDS["rms_norm_eps"])


def _mixed(w: Weights, name: str, x_BWSD: Tensor) -> Tensor:
    flat = x_BWSD.flatten(2)
    return F.linear(F.rms_norm(flat, flat.shape[-1:], None, FIELDS["rms_norm_eps"]), w[f"{name}_fn"])


def _sublayer(w: Weights, name: str, x_BWSD: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """Collapses the streams, computes, and mixes the result into them by a doubly stochastic matrix."""
    s, eps = FIELDS["hc_mult"], FIELDS["hc_eps"]
    mixed, scale, base = _mixed(w, name, x_BWSD), w[f"{name}_scale"], w[f"{name}_base"]
    pre = torch.sigmoid(mixed[..., :s] * scale[0] + base[:s]) + eps
    post = 2 * torch.sigmoid(mixed[..., s : 2 * s] * scale[1] + base[s : 2 * s])
    comb = (mixed[..., 2 * s :] * scale[2] + base[2 * s :]).unflatten(-1, (s, s)).softmax(dim=-1) + eps
    comb = comb / (comb.sum(dim=-2, keepdim=True) + eps)
    for _ in range(FIELDS["hc_sinkhorn_iters"] - 1):
        comb = comb / (comb.sum(dim=-1, keepdim=True) + eps)
        comb = comb / (comb.sum(dim=-2, keepdim=True) + eps)
    y = compute((pre.unsqueeze(-1) * x_BWSD).sum(2))
    mixed_in: Tensor = comb.transpose(-1, -2) @ x_BWSD
    return post.unsqueeze(-1) * y.unsqueeze(2) + mixed_in


def _attention(w: Weights, x_BWD: Tensor, places: Places, see: Callable[..., None]) -> Tensor:
    heads, dim, groups = FIELDS["num_attention_heads"], FIELDS["head_dim"], FIELDS["o_groups"]
    see("attn.wq_a", x_BWD)
    see("attn.wkv", x_BWD)
    low_rank = norm(F.linear(x_BWD, w["attn.wq_a.weight"]), w["attn.q_norm.weight"])
    see("attn.wq_b", low_rank)
    q = F.linear(low_rank, w["attn.wq_b.weight"]).unflatten(-1, (heads, dim))
    q = _turned(F.rms_norm(q, q.shape[-1:], None, FIELDS["rms_norm_eps"]), places.turn)
    kv = norm(F.linear(x_BWD, w["attn.wkv.weight"]), w["attn.kv_norm.weight"])
    kv = _turned(kv.unsqueeze(2), places.turn).squeeze(2)
    scores = torch.einsum("bwnh,bvh->bnwv", q, kv) / dim**0.5
    scores = scores.masked_fill(places.hidden, float("-inf"))
    sinks = w["attn.attn_sink"].view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    weights = torch.cat((scores, sinks), dim=-1).softmax(dim=-1)[..., :-1]
    o = _turned(torch.einsum("bnwv,bvh->bwnh", weights, kv), places.turn.conj())
    o = o.flatten(2).unflatten(-1, (groups, -1))
    o = torch.einsum("bwgi,gri->bwgr", o, w["attn.wo_a.weight"].unflatten(0, (groups, -1))).flatten(2)
    see("attn.wo_b", o)
    return F.linear(o, w["attn.wo_b.weight"])


def _turned(x_BWNH: Tensor, turn: Tensor) -> Tensor:
    """Rotates the last channels, pair by pair."""
    rotary = FIELDS["qk_rope_head_dim"]
    pairs = torch.view_as_complex(x_BWNH[..., -rotary:].unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(pairs * turn[:, None]).flatten(-2)
    return torch.cat((x_BWNH[..., :-rotary], turned.to(x_BWNH.dtype)), dim=-1)


def _ffn(w: Weights, x_BWD: Tensor, see: Callable[..., None]) -> Tensor:
    x_TD = x_BWD.flatten(0, 1)
    for name in ("w1", "w3"):
        see(f"ffn.shared_experts.{name}", x_TD)
    shared = _activated(
        F.linear(x_TD, w["ffn.shared_experts.w1.weight"]), F.linear(x_TD, w["ffn.shared_experts.w3.weight"])
    )
    see("ffn.shared_experts.w2", shared)
    y_TD = F.linear(shared, w["ffn.shared_experts.w2.weight"])
    weight_TE = _expert_weights(w, x_TD)
    up_ETF = torch.einsum("td,efd->etf", x_TD, w[EXPERTS_W13])
    inner_ETF = _activated(*up_ETF.chunk(2, dim=-1))
    see("ffn.experts", x_TD, inner_ETF, weight_TE)
    out_ETD = torch.einsum("etf,edf->etd", inner_ETF * weight_TE.T.unsqueeze(-1), w[EXPERTS_W2])
    return (y_TD + out_ETD.sum(0)).view_as(x_BWD)


def _activated(gate: Tensor, up: Tensor) -> Tensor:
    limit = FIELDS["swiglu_limit"]
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def _expert_weights(w: Weights, x_TD: Tensor) -> Tensor:
    """Returns each token's weight of every expert: 0 for those that it does not use. The bias only selects."""
    scores = F.softplus(F.linear(x_TD, w["ffn.gate.weight"])).sqrt()
    chosen = (scores.detach() + w["ffn.gate.bias"]).topk(FIELDS["num_experts_per_tok"], dim=-1).indices
    kept = torch.zeros_like(scores).scatter(1, chosen, 1.0) * scores
    factor: float = FIELDS["routed_scaling_factor"]
    return kept * factor / kept.sum(dim=-1, keepdim=True)


def unseen(*_: Any) -> None:
    """Looks at nothing."""


def first_weights(backbone: Weights, seed: int) -> Weights:
    """Returns weights to start from: the backbone's last layer, head collapse and norm, and projections near identity.

    backbone: the decoded values of its checkpoint, under their names there.
    """
    generator = torch.Generator().manual_seed(seed)
    layer, dim = f"layers.{FIELDS['num_hidden_layers'] - 1}", FIELDS["hidden_size"]
    found: Weights = {
        "norm.weight": backbone["norm.weight"],
        "enorm.weight": torch.ones(dim),
        "hnorm.weight": torch.ones(dim),
    }
    for name in ("e_proj.weight", "h_proj.weight"):
        found[name] = torch.eye(dim) * 0.7 + torch.randn(dim, dim, generator=generator) * 0.02
    for part in ("fn", "base", "scale"):
        found[f"hc_head_{part}"] = backbone[f"hc_head_{part}"]
        found |= {f"{name}_{part}": backbone[f"{layer}.{name}_{part}"] for name in ("hc_attn", "hc_ffn")}
    for name in ("attn_norm", "ffn_norm", "attn.q_norm", "attn.kv_norm", "ffn.gate"):
        found[f"{name}.weight"] = backbone[f"{layer}.{name}.weight"]
    for name in ("attn.attn_sink", "ffn.gate.bias"):
        found[name] = backbone[f"{layer}.{name}"]
    modules = [f"attn.{name}" for name in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b")]
    modules += [f"ffn.shared_experts.{name}" for name in ("w1", "w2", "w3")]
    found |= {f"{name}.weight": backbone[f"{layer}.{name}.weight"] for name in modules}
    experts = range(FIELDS["n_routed_experts"])
    w1, w2, w3 = (
        torch.stack([backbone[f"{layer}.ffn.experts.{expert}.{name}.weight"] for expert in experts])
        for name in ("w1", "w2", "w3")
    )
    found |= {EXPERTS_W13: torch.cat((w1, w3), dim=1), EXPERTS_W2: w2}
    return {name: value.detach().float().clone() for name, value in found.items()}
