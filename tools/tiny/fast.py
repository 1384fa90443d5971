"""Replaces parts of the network for faster training: fewer kernels, and no device-to-host copies, for CUDA graphs.

Each replacement computes what transformers' code computes, up to the order of the sums:

- routed experts: one product over all experts, weighted by the routing, instead of a loop over the chosen ones;
- hyper-connections and the query norm: the oracle's formulas on tensors, so that one compilation serves every layer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts, DeepseekV4TopKRouter

from ownpath.oracle import formulas

_Function = Callable[..., Any]


@dataclass
class ExpertCounts:
    """Tokens that each expert of a top-k routed layer got since the last reset."""

    router: DeepseekV4TopKRouter
    counts: Tensor

    def balance(self, step_size: float) -> None:
        """Lowers the selection bias of busy experts and raises that of idle ones by ``step_size``; resets the counts.

        Source: auxiliary-loss-free balancing of DeepSeek-V3, which V4's ``noaux_tc`` names.
        """
        self.router.e_score_correction_bias += step_size * torch.sign(self.counts.mean() - self.counts)
        self.counts.zero_()


@dataclass(frozen=True)
class _Functions:
    hyper: _Function
    mix: _Function
    gated: _Function
    unit_norm: _Function


def make_fast(network: Any, compiled: bool) -> list[ExpertCounts]:
    """Installs the replacements on every layer; returns the counts of layers whose router has a selection bias.

    compiled: also compile the element-wise parts (worth it on a GPU).
    """
    functions = _Functions(hyper_weights, mix_streams, gated_activation, unit_norm)
    if compiled:
        parts = (functions.hyper, functions.mix, functions.gated, functions.unit_norm)
        functions = _Functions(*(torch.compile(part) for part in parts))
    counters = []
    for layer in network.model.layers:
        layer.forward = partial(_layer_forward, layer, functions)
        q_norm = layer.self_attn.q_b_norm
        q_norm.forward = partial(functions.unit_norm, eps=q_norm.eps)
        router, experts = layer.mlp.gate, layer.mlp.experts
        counts = torch.zeros(experts.num_experts, device=router.weight.device)
        experts.forward = _DenseExperts(experts, counts, functions.gated)
        if isinstance(router, DeepseekV4TopKRouter):
            counters.append(ExpertCounts(router, counts))
    return counters


def _layer_forward(layer: Any, functions: _Functions, streams: Tensor, input_ids: Tensor, **kwargs: Any) -> Tensor:
    """Computes transformers' decoder layer on flat tokens. Shapes: streams [B, S, 4, D] -> the same."""
    rows, width = streams.shape[:2]
    streams = streams.flatten(0, 1)
    post, comb, collapsed = _hyper(layer.attn_hc, functions, streams)
    x = layer.input_layernorm(collapsed).unflatten(0, (rows, width))
    output, _ = layer.self_attn(x, **kwargs)
    streams = functions.mix(post, comb, output.flatten(0, 1), streams)
    post, comb, collapsed = _hyper(layer.ffn_hc, functions, streams)
    x = layer.post_attention_layernorm(collapsed).unflatten(0, (rows, width))
    output = layer.mlp(x, input_ids=input_ids)
    mixed: Tensor = functions.mix(post, comb, output.flatten(0, 1), streams)
    return mixed.view(rows, width, *mixed.shape[1:])


def _hyper(module: Any, functions: _Functions, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    eps = (module.hc_eps, module.input_norm.eps)
    found = functions.hyper(streams, module.fn, module.base, module.scale, module.hc_sinkhorn_iters, eps)
    post, comb, collapsed = found
    return post, comb, collapsed


def hyper_weights(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, num_rounds: int, eps: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes each token's hyper-connection weights and the sublayer's input.

    Shapes: streams [T, 4, D], fn [24, 4 * D] -> post [T, 4], comb [T, 4, 4], input [T, D].
    """
    wide, num_streams = streams.float(), streams.shape[1]
    mixing = formulas.Mixing(fn, scale, base, num_rounds, *eps)
    logits = mixing.logits(wide)
    collapsed = formulas.collapse(wide, mixing.pre(logits, num_streams)).to(streams.dtype)
    return mixing.post(logits, num_streams), mixing.comb(logits, num_streams), collapsed


def mix_streams(post: Tensor, comb: Tensor, output: Tensor, streams: Tensor) -> Tensor:
    """Computes new residual streams. Shapes: post [T, 4], comb [T, 4, 4], output [T, D], streams [T, 4, D]."""
    return formulas.write_streams(streams.float(), output.float(), post, comb).to(streams.dtype)


def gated_activation(gate_up: Tensor, weight: Tensor, limit: float) -> Tensor:
    """Computes clamped SwiGLU times the routing weight. Shapes: gate_up [E, T, 2F], weight [T, E] -> [E, T, F]."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (formulas.swiglu(gate, up, limit) * weight.t().unsqueeze(-1)).to(gate_up.dtype)


def unit_norm(x: Tensor, eps: float) -> Tensor:
    """Computes RMS norm without a weight, over the last dimension."""
    return formulas.rms(x.float(), eps).to(x.dtype)


class _DenseExperts:
    """Legend: T tokens, E experts, D model width, F expert width."""

    def __init__(self, experts: DeepseekV4Experts, counts: Tensor, gated: _Function) -> None:
        self.experts, self.counts, self.gated = experts, counts, gated

    def __call__(self, x_TD: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        experts = self.experts
        weight_TE = torch.zeros(x_TD.shape[0], experts.num_experts, dtype=torch.float32, device=x_TD.device)
        weight_TE = weight_TE.scatter(1, top_k_index, top_k_weights.float())
        with torch.no_grad():
            self.counts += (weight_TE > 0).sum(dim=0)
        gate_up_ETF = torch.matmul(x_TD, experts.gate_up_proj.transpose(1, 2))
        h_ETF = self.gated(gate_up_ETF, weight_TE, experts.limit)
        return torch.bmm(h_ETF, experts.down_proj.transpose(1, 2)).sum(dim=0)
