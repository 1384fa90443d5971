"""DSpark by its definition, in float64: no cache, no kernel, nothing of the model's code.

The context is the target layers' rows of a whole sequence; one block stands behind it. What a stage shares with an MTP
module's layer (hyper-connections, experts, norms) is ``MtpReference``'s, over the stage's own tensors.

Legend: T positions of the context, B rows of the block, S streams, D hidden, C target layers * D, N heads, H head dim.
Source: the inference code published with DeepSeek-V4-Flash-0731, as public ports describe it line by line: what a block
attends to is the last ``sliding_window`` positions and the whole block; the confidence reads the collapsed streams in
front of their norm.
"""

from dataclasses import dataclass

import torch

from support.checkpoints import Checkpoint
from support.mtp_reference import MtpReference

Tensor = torch.Tensor


@dataclass(frozen=True)
class DSparkReference:
    """All stages of a checkpoint, over the float64 values that its tensors mean."""

    checkpoint: Checkpoint

    @property
    def stages(self) -> list[MtpReference]:
        fields = self.checkpoint.fields
        count = len(fields["compress_ratios"]) - fields["num_hidden_layers"]
        return [MtpReference(self.checkpoint, f"mtp.{stage}") for stage in range(count)]

    def guess(self, targets_TC: Tensor, token_id: int) -> tuple[list[int], Tensor, Tensor]:
        """Greedy guesses, their logits [B, vocab] and confidences [B], behind a sequence and its next token."""
        stages, fields = self.stages, self.checkpoint.fields
        main_TD = stages[0].norm(targets_TC.double() @ stages[0].weight("main_proj").T, "main_norm")
        ids = [token_id] + [fields["dspark_noise_token_id"]] * (fields["dspark_block_size"] - 1)
        x_BSD = stages[0].top("embed.weight")[ids][:, None, :].repeat(1, fields["hc_mult"], 1)
        for stage in stages:
            x_BSD = self.layer(stage, x_BSD, main_TD)
        last = stages[-1]
        collapsed_BD = last.collapsed(x_BSD)
        logits = last.norm(collapsed_BD, "norm") @ last.top("head").T
        guesses, confidences = [token_id], []
        for row in range(len(ids)):
            known = last.weight("markov_head.markov_w1.weight")[guesses[-1]]
            logits[row] += last.weight("markov_head.markov_w2") @ known
            guesses.append(int(logits[row].argmax()))
            joined = torch.cat((collapsed_BD[row], known))
            confidences.append(last.weight("confidence_head.proj.weight")[0] @ joined)
        return guesses[1:], logits, torch.stack(confidences)

    def layer(self, stage: MtpReference, x_BSD: Tensor, main_TD: Tensor) -> Tensor:
        for hyper, norm, sublayer in (
            ("hc_attn", "attn_norm", lambda x: self.attention(stage, x, main_TD)),
            ("hc_ffn", "ffn_norm", stage.ffn),
        ):
            pre, post, comb = stage.mixing(x_BSD, hyper)
            y_BD = sublayer(stage.norm((pre[:, :, None] * x_BSD).sum(1), norm))
            x_BSD = post[:, :, None] * y_BD[:, None, :] + torch.einsum("tjk,tjd->tkd", comb, x_BSD)
        return x_BSD

    def attention(self, stage: MtpReference, x_BD: Tensor, main_TD: Tensor) -> Tensor:
        f, num_positions = self.checkpoint.fields, len(main_TD)
        low_rank = stage.norm(x_BD @ stage.weight("attn.wq_a").T, "attn.q_norm")
        q_BNH = stage.rms((low_rank @ stage.weight("attn.wq_b").T).unflatten(1, (-1, f["head_dim"])))
        block = range(num_positions, num_positions + len(x_BD))
        context = range(max(0, num_positions - f["sliding_window"]), num_positions)
        rows = ((main_TD[context.start :], context), (x_BD, block))
        keys = [stage.norm(h @ stage.weight("attn.wkv").T, "attn.kv_norm")[:, None, :] for h, _ in rows]
        keys_KH = torch.cat([self.turned(k, at, 1) for k, (_, at) in zip(keys, rows, strict=True)])[:, 0]
        scores_BNK = torch.einsum("bnh,kh->bnk", self.turned(q_BNH, block, 1), keys_KH) / f["head_dim"] ** 0.5
        weights_BNK = scores_BNK.exp()
        sink_N = stage.weight("attn.attn_sink").exp()
        weights_BNK = weights_BNK / (weights_BNK.sum(-1, keepdim=True) + sink_N[None, :, None])
        o_BNH = self.turned(torch.einsum("bnk,kh->bnh", weights_BNK, keys_KH), block, -1)
        wo_a = stage.weight("attn.wo_a").reshape(f["o_groups"], f["o_lora_rank"], -1)
        o = torch.einsum("tgi,gri->tgr", o_BNH.reshape(len(x_BD), f["o_groups"], -1), wo_a)
        return o.reshape(len(x_BD), -1) @ stage.weight("attn.wo_b").T

    def turned(self, x_TNH: Tensor, positions: range, sign: int) -> Tensor:
        """The last channels, as complex numbers, times exp(±i angle): a window-only layer's base, without YaRN."""
        rotary = self.checkpoint.fields["qk_rope_head_dim"]
        exponents = -torch.arange(0, rotary, 2, dtype=torch.float32) / rotary
        frequencies_F = self.checkpoint.fields["rope_theta"] ** exponents
        angles_TF = (torch.tensor(list(positions), dtype=torch.float32)[:, None] * frequencies_F).double()
        turn_TF = torch.polar(torch.ones_like(angles_TF), sign * angles_TF)
        kept, last = x_TNH[..., :-rotary], x_TNH[..., -rotary:]
        pairs = torch.view_as_complex(last.reshape(*last.shape[:-1], -1, 2).contiguous())
        return torch.cat((kept, torch.view_as_real(pairs * turn_TF[:, None, :]).flatten(-2)), dim=-1)

    def num_summed(self) -> int:
        """Terms of all the sums that a number passes through on its way to a logit, one after the other."""
        f, stages = self.checkpoint.fields, self.stages
        into = f["hidden_size"] * (len(f["dspark_target_layer_ids"]) + 1)
        return into + len(stages) * (stages[0].num_summed() + f["dspark_block_size"]) + f["dspark_markov_rank"]
