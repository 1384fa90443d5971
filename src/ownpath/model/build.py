"""Puts a model together from runners (by slot) and tensors used as stored (by checkpoint key)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ownpath.config import CSA_RATIO, EngineConfig, ModelConfig
from ownpath.model.attention import Attention
from ownpath.model.block import Block
from ownpath.model.caches import CacheSpec
from ownpath.model.compressor import Compressor
from ownpath.model.hyper import HyperConnection, HyperHead
from ownpath.model.indexer import Indexer
from ownpath.model.model import Model
from ownpath.model.moe import MoE
from ownpath.model.norm import RMSNorm
from ownpath.model.rope import Rope
from ownpath.model.router import Router
from ownpath.runners import Ledger, SwigluMlp

Runners = Mapping[str, Any]
Params = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Builder:
    """The materials of one model."""

    config: ModelConfig
    engine: EngineConfig
    runners: Runners
    params: Params
    ledger: Ledger

    def model(self) -> Model:
        config, device = self.config, torch.device(self.engine.device)
        sliding = Rope.for_layer(config, compressing=False, device=device)
        compress = Rope.for_layer(config, compressing=True, device=device)
        return Model(
            config=config,
            embed_VD=self.params["embed.weight"],
            blocks=tuple(self._block(layer_idx, compress) for layer_idx in range(config.num_hidden_layers)),
            hc_head=HyperHead(*self._hyper_tensors("hc_head"), config.hc_eps, config.rms_norm_eps),
            norm=self._norm("norm"),
            head=self.runners["head"],
            sliding_rope=sliding,
            compress_rope=compress,
            cache_spec=CacheSpec.of(config, self.engine),
            ledger=self.ledger,
        )

    def _norm(self, name: str) -> RMSNorm:
        return RMSNorm(self.params[f"{name}.weight"], self.config.rms_norm_eps)

    def _hyper_tensors(self, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.params[f"{name}_fn"], self.params[f"{name}_base"], self.params[f"{name}_scale"]

    def _hyper(self, name: str) -> HyperConnection:
        return HyperConnection(
            *self._hyper_tensors(name),
            num_streams=self.config.hc_mult,
            num_iters=self.config.hc_sinkhorn_iters,
            eps=self.config.hc_eps,
            norm_eps=self.config.rms_norm_eps,
        )

    def _block(self, layer_idx: int, compress_rope: Rope) -> Block:
        layer = f"layers.{layer_idx}"
        return Block(
            hc_attn=self._hyper(f"{layer}.hc_attn"),
            attn_norm=self._norm(f"{layer}.attn_norm"),
            attn=self._attention(layer_idx, compress_rope),
            hc_ffn=self._hyper(f"{layer}.hc_ffn"),
            ffn_norm=self._norm(f"{layer}.ffn_norm"),
            ffn=self._moe(layer_idx),
        )

    def _attention(self, layer_idx: int, compress_rope: Rope) -> Attention:
        attn = f"layers.{layer_idx}.attn"
        ratio = self.config.compress_ratios[layer_idx]
        return Attention(
            config=self.config,
            layer_idx=layer_idx,
            wqa_wkv=self.runners[f"{attn}.wqa_wkv"],
            wq_b=self.runners[f"{attn}.wq_b"],
            wo_a=self.runners[f"{attn}.wo_a"],
            wo_b=self.runners[f"{attn}.wo_b"],
            q_norm=self._norm(f"{attn}.q_norm"),
            kv_norm=self._norm(f"{attn}.kv_norm"),
            sink_N=self.params[f"{attn}.attn_sink"],
            compressor=self._compressor(f"{attn}.compressor", ratio, compress_rope) if ratio else None,
            indexer=self._indexer(f"{attn}.indexer", compress_rope) if ratio == CSA_RATIO else None,
        )

    def _compressor(self, name: str, ratio: int, rope: Rope) -> Compressor:
        projection = self.runners[f"{name}.wkv_wgate"]
        return Compressor(projection, self.params[f"{name}.ape"], self._norm(f"{name}.norm"), rope, ratio)

    def _indexer(self, name: str, rope: Rope) -> Indexer:
        return Indexer(
            wq_b=self.runners[f"{name}.wq_b"],
            weights_proj=self.runners[f"{name}.weights_proj"],
            compressor=self._compressor(f"{name}.compressor", CSA_RATIO, rope),
            num_heads=self.config.index_n_heads,
            head_dim=self.config.index_head_dim,
            topk=self.config.index_topk,
        )

    def _moe(self, layer_idx: int) -> MoE:
        ffn = f"layers.{layer_idx}.ffn"
        shared = f"{ffn}.shared_experts"
        router = Router(
            gate=self.runners[f"{ffn}.gate"],
            num_experts_per_tok=self.config.num_experts_per_tok,
            routed_scaling_factor=self.config.routed_scaling_factor,
            bias_E=self.params.get(f"{ffn}.gate.bias"),
            tid2eid_VK=self.params.get(f"{ffn}.gate.tid2eid"),
        )
        mlp = SwigluMlp(self.runners[f"{shared}.w13"], self.runners[f"{shared}.w2"], self.config.swiglu_limit)
        return MoE(router, self.runners[f"{ffn}.experts"], mlp)
