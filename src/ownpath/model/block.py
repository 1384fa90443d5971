"""One decoder layer: attention, then the mixture of experts, each between its hyper-connection's pre and post."""

from dataclasses import dataclass

import torch

from ownpath.model.attention import Attention
from ownpath.model.batch import ForwardBatch
from ownpath.model.hyper import HyperConnection
from ownpath.model.moe import MoE
from ownpath.model.norm import RMSNorm
from ownpath.model.rope import Rotation


@dataclass(frozen=True)
class Block:
    """x [T, S, D] -> [T, S, D]: S residual streams of D channels."""

    hc_attn: HyperConnection
    attn_norm: RMSNorm
    attn: Attention
    hc_ffn: HyperConnection
    ffn_norm: RMSNorm
    ffn: MoE

    def __call__(self, x_TSD: torch.Tensor, rotation: Rotation, batch: ForwardBatch) -> torch.Tensor:
        h_TD, mix = self.hc_attn.pre(x_TSD)
        x_TSD = self.hc_attn.post(self.attn(self.attn_norm(h_TD), rotation, batch), x_TSD, mix)
        h_TD, mix = self.hc_ffn.pre(x_TSD)
        return self.hc_ffn.post(self.ffn(self.ffn_norm(h_TD), batch.token_ids_T), x_TSD, mix)
