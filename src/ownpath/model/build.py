"""Builds a model from runners (by slot), tensors used as stored (by checkpoint key) and planned companions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch

from ownpath.attention.chunks import ChunkLayer
from ownpath.attention.compress import Compressor
from ownpath.attention.decode import DecodeLayer, PagedAttention
from ownpath.attention.interface import AttentionLayer
from ownpath.attention.reference import ReferenceAttention
from ownpath.attention.rope import Rope
from ownpath.attention.select import EntrySelector
from ownpath.cache.layout import spare_rows, windows_per_entry
from ownpath.cache.pools import CacheSpec
from ownpath.config import CSA_RATIO, EngineConfig, Layer, ModelConfig
from ownpath.model.attention import Attention, AttentionCore
from ownpath.model.block import Block
from ownpath.model.build_drafts import dspark, mtp_modules
from ownpath.model.indexer import Indexer
from ownpath.model.joint import JointProducts
from ownpath.model.key_norms import largest_key_norm
from ownpath.model.model import Model
from ownpath.model.moe import MoE
from ownpath.model.ranks import FeedForward, FollowedLinear, GatheredHead, Product, ReducedMoE
from ownpath.model.taps import tap_names
from ownpath.official import Step
from ownpath.ranks.peers import Alone, Peers
from ownpath.runners import (
    CacheEntries,
    ChunkAttention,
    ChunkEntries,
    ChunkRings,
    DecodeAttention,
    Exchange,
    GatherColumns,
    GatheredExperts,
    GatherRows,
    HeldExperts,
    HyperBoundary,
    HyperWeights,
    IndexQuantizer,
    IndexScores,
    KeyQuantizer,
    Linear,
    MoeRunner,
    Reduce,
    RMSNorm,
    RotaryAngles,
    Route,
    Router,
    RouterWeights,
    RouteWeights,
    Runner,
    Scatter,
    Select,
    SharedKeyAttention,
    SwiGLU,
    SwigluMlp,
    Turn,
    TurnToAll,
)
from ownpath.runners.decode import (
    AttendWeights,
    CompressorWeights,
    EntriesWeights,
    Frequencies,
    KeyRounding,
    NormWeights,
)
from ownpath.runners.linear import LinearRunner
from ownpath.runners.runner import KernelOrName, chosen_spec
from ownpath.splits import DRAWN, ExpertSplit
from ownpath.trace import Ledger, Tap

if TYPE_CHECKING:
    from ownpath.runners.exchange import Window

Runners = dict[str, Runner]
Params = Mapping[str, torch.Tensor]
ALONE = Alone()
Quantizer = Callable[[torch.Tensor], torch.Tensor]


def _identity(x: torch.Tensor) -> torch.Tensor:
    """Returns x: plain numerics round keys to no other format."""
    return x


@dataclass(frozen=True)
class Builder:
    """The materials of one model. specs: the kernel that the plan chose for each companion, by slot.

    peers: the ranks that run it together. window: where kernels push what they exchange.
    """

    config: ModelConfig
    engine: EngineConfig
    runners: Runners
    specs: Mapping[str, KernelOrName]
    params: Params
    ledger: Ledger
    peers: Peers = ALONE
    window: "Window | None" = None

    def model(self) -> Model:
        """Builds the model; the ledger watches every runner and companion."""
        return self._model(self.config.num_hidden_layers)

    def without_backbone(self) -> Model:
        """Builds a model of its ends and drafts alone: another's hidden goes into these."""
        return self._model(0)

    def _model(self, num_layers: int) -> Model:
        config, device = self.config, torch.device(self.engine.device)
        sliding, compress = (Rope.for_layer(config, compressing=one, device=device) for one in (False, True))
        hc_head, head = self.ends()
        return Model(
            config=config,
            embed_VD=self.params["embed.weight"],
            blocks=tuple(self.block(layer_idx, compress) for layer_idx in range(num_layers)),
            hc_head=hc_head,
            head=head,
            sliding_rope=sliding,
            compress_rope=compress,
            paged=self._paged,
            cache_spec=CacheSpec.of(config, self.engine),
            ledger=self.ledger,
            drafts=tuple(mtp_modules(self, sliding, compress)),
            dspark=dspark(self, head, sliding, compress),
            share=self._exchange(DRAWN, Reduce) if DRAWN in self.specs else None,
            window=self.window,
        )

    @property
    def _layers(self) -> tuple[Layer, ...]:
        """The layers that have caches: the backbone's, then the drafts'."""
        return (*self.config.backbone_layers(), *self.config.draft_layers())

    def block(self, layer_idx: int, compress_rope: Rope) -> Block:
        """Builds one decoder layer; the drafts' come after the backbone's."""
        layer = self._layers[layer_idx].name
        return Block(
            hc_attn=self._boundary(f"{layer}.hc_attn", f"{layer}.attn_norm"),
            attn=self._attention(layer_idx, compress_rope),
            hc_ffn=self._boundary(f"{layer}.hc_ffn", f"{layer}.ffn_norm"),
            ffn=self._ffn(f"{layer}.ffn"),
        )

    def ends(self) -> tuple[HyperBoundary, Product]:
        """Builds what follows the last layer: its boundary, and the head's product."""
        boundary, head = self._boundary("hc_head", "norm"), self._runner("head")
        if "head.turn" in self.specs:
            turns = (self._exchange("head.turn", make) for make in (Turn, TurnToAll))
            return boundary, GatheredHead(head, self._exchange("head.gather", GatherRows), *turns)
        return boundary, self._followed(head, "head.gather", GatherColumns)

    def _exchange(self, slot: str, make: type[Exchange]) -> Any:
        return self.ledger.watch(slot, make(self.peers, slot, self.window, kernel=self.specs[slot]))

    def _followed(self, linear: Linear, slot: str, make: type[Exchange]) -> Product:
        """Returns a product, with the exchange behind it where one is planned."""
        return FollowedLinear(linear, self._exchange(slot, make)) if slot in self.specs else linear

    def _runner(self, slot: str) -> Any:
        return self.ledger.watch(slot, self.runners[slot])

    def _tap(self, layer: Layer, name: str) -> Tap:
        assert f"{layer.name}.{name}" in tap_names(layer), name
        return self.ledger.tap(f"{layer.name}.{name}")

    def _boundary(self, slot: str, norm: str) -> Any:
        return self.ledger.watch(slot, HyperBoundary(self._hyper_weights(slot, norm), kernel=self.specs[slot]))

    def _hyper_weights(self, slot: str, norm: str) -> HyperWeights:
        config = self.config
        return HyperWeights(
            fn=self.params[f"{slot}_fn"],
            base=self.params[f"{slot}_base"],
            scale=self.params[f"{slot}_scale"],
            norm_weight=self.params[f"{norm}.weight"],
            num_iters=config.hc_sinkhorn_iters,
            eps=config.hc_eps,
            mix_norm_eps=config.rms_norm_eps,
            norm_eps=config.rms_norm_eps,
        )

    def _norm(self, slot: str, weight: torch.Tensor | None) -> Any:
        return self.ledger.watch(slot, RMSNorm(weight, self.config.rms_norm_eps, kernel=self.specs[slot]))

    def _attention(self, layer_idx: int, compress_rope: Rope) -> Attention:
        layer = self._layers[layer_idx]
        attn, is_csa = f"{layer.name}.attn", layer.ratio == CSA_RATIO
        quantize_kv = self._key_quantizer(f"{attn}.key_quantizer")
        return Attention(
            config=self.config,
            wqa_wkv=self._runner(f"{attn}.wqa_wkv"),
            queries=self._queries(attn, is_csa),
            x_products=self._x_products(attn, layer.ratio) if layer.ratio else None,
            wo_a=self._runner(f"{attn}.wo_a"),
            wo_b=self._followed(self._runner(f"{attn}.wo_b"), f"{attn}.reduce", Reduce),
            q_norm=self._norm(f"{attn}.q_norm", self.params[f"{attn}.q_norm.weight"]),
            kv_norm=self._norm(f"{attn}.kv_norm", self.params[f"{attn}.kv_norm.weight"]),
            q_head_norm=self._norm(f"{attn}.q_head_norm", None),
            quantize_kv=self._watch(f"{attn}.key_quantizer", quantize_kv),
            indexer=self._indexer(layer) if is_csa else None,
            core=self.ledger.watch(f"{attn}.core", self._core(layer_idx, compress_rope, quantize_kv)),
            decode=self._decode(layer_idx),
            chunk=self._chunk(layer_idx),
            backend=self._paged or ReferenceAttention(self.config.sliding_window),
            tap_q=self._tap(layer, "attn.q"),
            tap_kv=self._tap(layer, "attn.kv"),
        )

    def _queries(self, attn: str, is_csa: bool) -> JointProducts:
        widths = {f"{attn}.wq_b": len(self.params[f"{attn}.attn_sink"]) * self.config.head_dim}
        if is_csa:
            widths[f"{attn}.indexer.wq_b"] = self.config.index_n_heads * self.config.index_head_dim
        return JointProducts.of(f"{attn}.queries", widths, self.runners, self._runner)

    def _x_products(self, attn: str, ratio: int) -> JointProducts:
        config, indexer = self.config, f"{attn}.indexer"
        rows_of_head = 2 * windows_per_entry(ratio)
        widths = {f"{attn}.compressor.wkv_wgate": rows_of_head * config.head_dim}
        if ratio == CSA_RATIO:
            widths[f"{indexer}.weights_proj"] = config.index_n_heads
            widths[f"{indexer}.compressor.wkv_wgate"] = rows_of_head * config.index_head_dim
        return JointProducts.of(f"{attn}.x_products", widths, self.runners, self._runner)

    @cached_property
    def _paged(self) -> PagedAttention | None:
        """The backend of all layers if decode steps are planned."""
        slot = "attn.decode.angles"
        if slot not in self.specs:
            return None
        config, device = self.config, torch.device(self.engine.device)
        frequencies = Frequencies(*(Rope.for_layer(config, one, device).freqs_F for one in (False, True)))
        angles = self.ledger.watch(slot, RotaryAngles(frequencies, kernel=self.specs[slot]))
        has_chunks = any(slot.endswith(".attn.chunk.attend") for slot in self.specs)
        return PagedAttention(ReferenceAttention(config.sliding_window), angles, has_chunks)

    def _decode(self, layer_idx: int) -> DecodeLayer | None:
        """Builds a layer's line of a decode step; ``None`` where none is planned."""
        layer = self._layers[layer_idx]
        attn, is_csa = f"{layer.name}.attn", layer.ratio == CSA_RATIO
        if f"{attn}.decode.attend" not in self.specs:
            return None
        watch = partial(self._of_line, f"{attn}.decode")
        return DecodeLayer(
            layer_idx,
            layer.ratio,
            write=watch("entries", CacheEntries, self._entries_weights(layer, "decode")),
            attend=watch("attend", DecodeAttention, self._attend_weights(attn, "decode")),
            score=watch("scores", IndexScores) if is_csa else None,
            select=watch("select", Select, self.config.index_topk) if is_csa else None,
        )

    def _chunk(self, layer_idx: int) -> ChunkLayer | None:
        """Builds a layer's line of a step with chunks; ``None`` where none is planned."""
        layer = self._layers[layer_idx]
        attn, is_csa = f"{layer.name}.attn", layer.ratio == CSA_RATIO
        if f"{attn}.chunk.attend" not in self.specs:
            return None
        watch = partial(self._of_line, f"{attn}.chunk")
        return ChunkLayer(
            layer_idx,
            layer.ratio,
            write=watch("entries", ChunkEntries, self._entries_weights(layer, "chunk")),
            attend=watch("attend", ChunkAttention, self._attend_weights(attn, "chunk")),
            score=watch("scores", IndexScores) if is_csa else None,
            select=watch("select", Select, self.config.index_topk) if is_csa else None,
            keep=watch("rings", ChunkRings, self._entries_weights(layer, "chunk")),
        )

    def _of_line(self, line: str, name: str, make: Callable[..., Runner], *args: object) -> Any:
        """Makes a runner of a line, watched."""
        return self.ledger.watch(f"{line}.{name}", make(*args, kernel=self.specs[f"{line}.{name}"]))

    def _attend_weights(self, attn: str, line: str) -> AttendWeights:
        config, is_stepwise = self.config, Step.Q_HEAD_NORM in self._steps(f"{attn}.{line}.attend")
        fixed = config.softmax_scale, config.rms_norm_eps, config.qk_rope_head_dim, is_stepwise
        spare, norm = spare_rows(self.engine.rows_per_request), largest_key_norm(self.params, attn, config.head_dim)
        return AttendWeights(self.params[f"{attn}.attn_sink"], *fixed, spare, norm)

    def _entries_weights(self, layer: Layer, line: str) -> EntriesWeights:
        """Returns what a line's cache writes of a layer read."""
        attn, is_csa = f"{layer.name}.attn", layer.ratio == CSA_RATIO
        norm = NormWeights(self.params[f"{attn}.kv_norm.weight"], self.config.rms_norm_eps)
        main = self._compressor_weights(f"{attn}.compressor", layer.ratio) if layer.ratio else None
        index = self._compressor_weights(f"{attn}.indexer.compressor", layer.ratio) if is_csa else None
        steps = self._steps(f"{attn}.{line}.entries")
        keys = KeyRounding.FP8 if Step.KV in steps else KeyRounding.NONE
        index_keys = KeyRounding.FP4 if Step.INDEXER in steps else KeyRounding.NONE
        spare = spare_rows(self.engine.rows_per_request)
        return EntriesWeights(norm, main, index, keys=keys, index_keys=index_keys, spare=spare)

    def _steps(self, slot: str) -> frozenset[Step]:
        """Returns the steps that a companion's kernel computes as the published code does."""
        return chosen_spec(self.specs[slot]).official

    def _compressor_weights(self, name: str, ratio: int) -> CompressorWeights:
        norm = NormWeights(self.params[f"{name}.norm.weight"], self.config.rms_norm_eps)
        return CompressorWeights(ratio, self.params[f"{name}.ape"], norm)

    def _core(self, layer_idx: int, rope: Rope, quantize_kv: Quantizer) -> AttentionCore:
        layer = self._layers[layer_idx]
        attn, ratio = f"{layer.name}.attn", layer.ratio
        sink_N, kernel = self.params[f"{attn}.attn_sink"], self.specs[f"{attn}.core"]
        softmax = SharedKeyAttention(sink_N, self.config.softmax_scale, kernel=kernel)
        compressor = self._compressor(f"{attn}.compressor", ratio, rope, quantize_kv) if ratio else None
        if ratio != CSA_RATIO:
            return AttentionCore(AttentionLayer(layer_idx, softmax, compressor))
        quantize_index = self._index_quantizer(f"{attn}.indexer.quantizer")
        index_compressor = self._compressor(f"{attn}.indexer.compressor", ratio, rope, quantize_index)
        selector, tap_mask = EntrySelector(self.config.index_topk), self._tap(layer, "attn.indexer.mask")
        return AttentionCore(AttentionLayer(layer_idx, softmax, compressor, index_compressor, selector, tap_mask))

    def _key_quantizer(self, slot: str) -> Quantizer:
        """Returns the rounding of keys to the cache's format, or the identity where the plan has none."""
        return KeyQuantizer(self.config.qk_rope_head_dim, kernel=self.specs[slot]) if slot in self.specs else _identity

    def _index_quantizer(self, slot: str) -> Quantizer:
        """Returns the rounding of index queries and keys, or the identity where the plan has none."""
        return IndexQuantizer(kernel=self.specs[slot]) if slot in self.specs else _identity

    def _watch(self, slot: str, quantize: Quantizer) -> Quantizer:
        return self.ledger.watch(slot, quantize) if slot in self.specs else quantize

    def _compressor(self, name: str, ratio: int, rope: Rope, quantize_kv: Quantizer) -> Compressor:
        """Builds a compressor. Its norm and ``quantize_kv`` run only when a window is complete, inside attention, so
        neither counts as a call of its slot."""
        attn = name.partition(".attn.")[0] + ".attn"
        weight, kernel = self.params[f"{name}.norm.weight"], self.specs[f"{attn}.kv_norm"]
        norm = RMSNorm(weight, self.config.rms_norm_eps, kernel=kernel)
        return Compressor(self.params[f"{name}.ape"], norm, rope, ratio, quantize_kv)

    def _indexer(self, layer: Layer) -> Indexer:
        name = f"{layer.name}.attn.indexer"
        slot = f"{name}.quantizer"
        return Indexer(
            num_heads=self.config.index_n_heads,
            head_dim=self.config.index_head_dim,
            quantize_index=self._watch(slot, self._index_quantizer(slot)),
            tap_q=self._tap(layer, "attn.indexer.q"),
            tap_weights=self._tap(layer, "attn.indexer.weights"),
        )

    def _ffn(self, ffn: str) -> FeedForward:
        """Builds a feed-forward part, with the exchanges that are planned for it."""
        moe = self._moe(ffn)
        if f"{ffn}.reduce" in self.specs:
            return ReducedMoE(moe, self._exchange(f"{ffn}.reduce", Reduce))
        if f"{ffn}.gather" in self.specs:
            gather = self._exchange(f"{ffn}.gather", GatherRows)
            scatter = self._exchange(f"{ffn}.scatter", Scatter)
            return replace(moe, experts=GatheredExperts(moe.experts, gather, scatter))
        return moe

    def _experts(self, slot: str) -> Any:
        """Returns the routed experts; where ranks have experts of their own, with the map of all to these."""
        parallel, runner, count = self.engine.parallel, self.runners[slot], self.config.n_routed_experts
        if parallel.experts is ExpertSplit.IDS and parallel.size > 1:
            assert isinstance(runner, MoeRunner), slot
            return self.ledger.watch(slot, HeldExperts(runner, parallel.share(count), count))
        return self._runner(slot)

    def _moe(self, ffn: str) -> MoE:
        shared = f"{ffn}.shared_experts"
        router = Router(
            gate=self._runner(f"{ffn}.gate"),
            num_experts_per_tok=self.config.num_experts_per_tok,
            routed_scaling_factor=self.config.routed_scaling_factor,
            bias_E=self.params.get(f"{ffn}.gate.bias"),
            tid2eid_VK=self.params.get(f"{ffn}.gate.tid2eid"),
            kernel=self.specs[f"{ffn}.router"],
        )
        limit = self.config.swiglu_limit
        activation = self.ledger.watch(f"{shared}.swiglu", SwiGLU(limit, kernel=self.specs[f"{shared}.swiglu"]))
        mlp = SwigluMlp(self._runner(f"{shared}.w13"), self._runner(f"{shared}.w2"), limit, activation=activation)
        route, watch = self._route(ffn), self.ledger.watch
        decode = (None, 0) if route is None else (watch(f"{ffn}.decode.route", route), route.max_rows)
        return MoE(watch(f"{ffn}.router", router), self._experts(f"{ffn}.experts"), mlp, *decode)

    def _route(self, ffn: str) -> Route | None:
        """Builds gate and router of decode steps in one, on the gate's own matrix; ``None`` where it is not planned."""
        slot, config = f"{ffn}.decode.route", self.config
        if slot not in self.specs:
            return None
        (gate,) = self.runners[f"{ffn}.gate"].leaves
        assert isinstance(gate, LinearRunner)
        (matrix,) = gate.stored()
        choice = self.params.get(f"{ffn}.gate.bias"), self.params.get(f"{ffn}.gate.tid2eid")
        weights = RouterWeights(config.num_experts_per_tok, config.routed_scaling_factor, *choice)
        return Route(RouteWeights(matrix.qdata, weights), kernel=self.specs[slot])
