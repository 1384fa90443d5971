"""MTP by its definition, in float64, over a whole sequence at once: no cache, no kernel, nothing of the model's code.

Attention is a mask over all of a sequence's tokens; an expert is three dense matrices; each token's experts are taken
one by one. Rotary angles are float32, as every public implementation computes them.

Legend: T tokens, S streams, D hidden, N heads, H head dim, F frequencies.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import silu, softplus

from support.checkpoints import Checkpoint

Tensor = torch.Tensor


@dataclass(frozen=True)
class MtpReference:
    """One module of a checkpoint, over the float64 values that its tensors mean."""

    checkpoint: Checkpoint
    prefix: str = "mtp.0"

    def draft(self, streams_TSD: Tensor, next_ids_T: Tensor) -> tuple[Tensor, Tensor]:
        """The module's streams [T, S, D] and logits [T, vocab] of one sequence that starts at position 0."""
        e_TD = self.norm(self.top("embed.weight")[next_ids_T], "enorm") @ self.weight("e_proj").T
        h_TSD = self.norm(streams_TSD.double(), "hnorm") @ self.weight("h_proj").T
        x_TSD = e_TD[:, None, :] + h_TSD
        for hyper, norm, sublayer in (
            ("hc_attn", "attn_norm", self.attention),
            ("hc_ffn", "ffn_norm", self.ffn),
        ):
            pre, post, comb = self.mixing(x_TSD, hyper)
            y_TD = sublayer(self.norm((pre[:, :, None] * x_TSD).sum(1), norm))
            x_TSD = post[:, :, None] * y_TD[:, None, :] + torch.einsum("tjk,tjd->tkd", comb, x_TSD)
        return x_TSD, self.norm(self.collapsed(x_TSD), "norm") @ self.top("head").T

    def top(self, name: str) -> Tensor:
        return self.checkpoint.decoded[name].double()

    def weight(self, name: str) -> Tensor:
        return self.top(f"{self.prefix}.{name}")

    @property
    def fields(self) -> dict[str, Any]:
        return self.checkpoint.fields

    def rms(self, x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.fields["rms_norm_eps"]).sqrt()

    def norm(self, x: Tensor, name: str) -> Tensor:
        return self.rms(x) * self.weight(f"{name}.weight")

    def mixing(self, x_TSD: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """pre [T, S], post [T, S] and the doubly stochastic comb [T, from, to] of one boundary."""
        s, eps = self.fields["hc_mult"], self.fields["hc_eps"]
        mixed = self.rms(x_TSD.reshape(len(x_TSD), -1)) @ self.weight(f"{name}_fn").T
        scale, base = self.weight(f"{name}_scale"), self.weight(f"{name}_base")
        pre = torch.sigmoid(mixed[:, :s] * scale[0] + base[:s]) + eps
        post = 2 * torch.sigmoid(mixed[:, s : 2 * s] * scale[1] + base[s : 2 * s])
        comb = (mixed[:, 2 * s :] * scale[2] + base[2 * s :]).reshape(-1, s, s).softmax(dim=2) + eps
        for iteration in range(self.fields["hc_sinkhorn_iters"]):
            comb = comb if iteration == 0 else comb / (comb.sum(dim=2, keepdim=True) + eps)
            comb = comb / (comb.sum(dim=1, keepdim=True) + eps)
        return pre, post, comb

    def collapsed(self, x_TSD: Tensor) -> Tensor:
        mixed = self.rms(x_TSD.reshape(len(x_TSD), -1)) @ self.weight("hc_head_fn").T
        pre = torch.sigmoid(mixed * self.weight("hc_head_scale") + self.weight("hc_head_base")) + self.fields["hc_eps"]
        return (pre[:, :, None] * x_TSD).sum(1)

    def attention(self, x_TD: Tensor) -> Tensor:
        num_heads, dim = self.fields["num_attention_heads"], self.fields["head_dim"]
        low_rank = self.norm(x_TD @ self.weight("attn.wq_a").T, "attn.q_norm")
        q_TNH = self.rms((low_rank @ self.weight("attn.wq_b").T).reshape(-1, num_heads, dim))
        kv_TH = self.norm(x_TD @ self.weight("attn.wkv").T, "attn.kv_norm")
        q_TNH, kv_TH = self.turned(q_TNH, 1), self.turned(kv_TH[:, None, :], 1)[:, 0]
        scores_NTT = torch.einsum("inh,jh->nij", q_TNH, kv_TH) / dim**0.5
        age = torch.arange(len(x_TD))[:, None] - torch.arange(len(x_TD))
        is_hidden = (age < 0) | (age >= self.fields["sliding_window"])
        weights_NTT = scores_NTT.masked_fill(is_hidden, -torch.inf).exp()
        sink_N = self.weight("attn.attn_sink").exp()
        weights_NTT = weights_NTT / (weights_NTT.sum(-1, keepdim=True) + sink_N[:, None, None])
        o_TNH = self.turned(torch.einsum("nij,jh->inh", weights_NTT, kv_TH), -1)
        groups = self.fields["o_groups"]
        wo_a = self.weight("attn.wo_a").reshape(groups, self.fields["o_lora_rank"], -1)
        o = torch.einsum("tgi,gri->tgr", o_TNH.reshape(len(x_TD), groups, -1), wo_a)
        return o.reshape(len(x_TD), -1) @ self.weight("attn.wo_b").T

    def turned(self, x_TNH: Tensor, sign: int) -> Tensor:
        """The last channels, as complex numbers, times exp(±i angle): a window-only layer's base, without YaRN."""
        rotary = self.fields["qk_rope_head_dim"]
        frequencies_F = self.fields["rope_theta"] ** (-torch.arange(0, rotary, 2, dtype=torch.float32) / rotary)
        angles_TF = (torch.arange(len(x_TNH), dtype=torch.float32)[:, None] * frequencies_F).double()
        turn_TF = torch.polar(torch.ones_like(angles_TF), sign * angles_TF)
        kept, last = x_TNH[..., :-rotary], x_TNH[..., -rotary:]
        pairs = torch.view_as_complex(last.reshape(*last.shape[:-1], -1, 2).contiguous())
        return torch.cat((kept, torch.view_as_real(pairs * turn_TF[:, None, :]).flatten(-2)), dim=-1)

    def ffn(self, x_TD: Tensor) -> Tensor:
        scores_TE = softplus(x_TD @ self.weight("ffn.gate").T).sqrt()
        chosen_TK = (scores_TE + self.weight("ffn.gate.bias")).topk(self.fields["num_experts_per_tok"], dim=1).indices
        y_TD = self.swiglu(x_TD, "ffn.shared_experts")
        for token, chosen in enumerate(chosen_TK.tolist()):
            total = scores_TE[token, chosen].sum()
            for expert in chosen:
                weight = self.fields["routed_scaling_factor"] * scores_TE[token, expert] / total
                y_TD[token] += weight * self.swiglu(x_TD[token], f"ffn.experts.{expert}")
        return y_TD

    def swiglu(self, x: Tensor, name: str) -> Tensor:
        limit = self.fields["swiglu_limit"]
        gate, up = x @ self.weight(f"{name}.w1").T, x @ self.weight(f"{name}.w3").T
        return (silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)) @ self.weight(f"{name}.w2").T

    def num_summed(self) -> int:
        """Terms of all the sums that a number passes through on its way to a logit, one after the other."""
        f = self.fields
        dim, streams, head_dim = f["hidden_size"], f["hc_mult"], f["head_dim"]
        boundary = 2 * streams * dim + dim + 2 * streams * f["hc_sinkhorn_iters"] + 2 * streams
        attention = 3 * dim + 3 * f["q_lora_rank"] + 3 * head_dim + f["sliding_window"]
        attention += f["num_attention_heads"] * head_dim // f["o_groups"] + f["o_groups"] * f["o_lora_rank"]
        ffn = 2 * dim + f["moe_intermediate_size"] + f["num_experts_per_tok"] + 1
        return 3 * dim + 3 * boundary + attention + ffn + dim
