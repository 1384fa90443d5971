"""The operations of V4 that need a plan: products with a stored weight matrix, and the companions between them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from ownpath.checkpoint.names import compressor_width, expert_modules
from ownpath.checkpoint.schema import ModuleSpec
from ownpath.config import CSA_RATIO, ONE_RANK, Layer, ModelConfig, Parallel
from ownpath.formats import FP8_BLOCK, MXFP4, MXFP8, NVFP4, Format
from ownpath.official import PLAIN, Step
from ownpath.ops import OpKind
from ownpath.splits import AttentionSplit

DECODE_WINDOW = 128
"""Keys of a window, which the kernels of decode steps are made for."""
STEP_ANGLES = "attn.decode.angles"
"""The slot of a decode step's angles, which is no layer's."""
INDEXER, Q_HEAD_NORM = frozenset({Step.INDEXER}), frozenset({Step.Q_HEAD_NORM})


@dataclass(frozen=True)
class OpSpec:
    """A product to plan. ``slot``: the name the model calls it by; ``modules``: its weights.

    is_wide: the result is at least float32 (router, compressors, index weights and vocabulary logits).
    inner_dims: sizes inside the matrix that a kernel's tiles must divide too.
    joins: the slot in which it is one product with others of the same input, where ``plan.joining`` allows; or empty.
    parts: of such a slot, the products that it joins.
    """

    slot: str
    kind: OpKind
    modules: tuple[ModuleSpec, ...]
    is_wide: bool = False
    inner_dims: tuple[int, ...] = ()
    joins: str = ""
    parts: tuple["OpSpec", ...] = ()

    @property
    def columns(self) -> dict[str, slice]:
        """The columns of the result that are each part's, by its slot; empty where it has no parts."""
        ends = accumulate((part.shape[0] for part in self.parts), initial=0)
        return {part.slot: slice(*span) for part, span in zip(self.parts, pairwise(ends), strict=True)}

    def of_experts(self, experts: tuple[int, ...] | None) -> "OpSpec":
        """Returns the product of some experts, in this order; of all where it is ``None``."""
        if experts is None:
            return self
        assert self.kind is OpKind.MOE, self.slot
        count = len(self.modules) // 3
        return replace(self, modules=tuple(self.modules[at * count + expert] for at in range(3) for expert in experts))

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of the fused weight (of one expert's gate_up for MOE)."""
        if self.kind is OpKind.MOE:
            inter, dim = self.modules[0].shape
            return 2 * inter, dim
        return sum(module.shape[0] for module in self.modules), self.modules[0].shape[1]

    @property
    def dims(self) -> tuple[int, ...]:
        """Every dimension of every stored matrix and inside it, each once."""
        return tuple(sorted({size for module in self.modules for size in module.shape} | set(self.inner_dims)))


@dataclass(frozen=True)
class CompanionSpec:
    """A companion to plan. ``dims``: the sizes that a kernel for it depends on.

    steps: its steps of the published code, where that rounds differently.
    """

    slot: str
    kind: OpKind
    dims: tuple[int, ...]
    steps: frozenset[Step] = PLAIN


def model_ops(config: ModelConfig) -> Iterator[OpSpec]:
    """Yields the products of the backbone and the head."""
    for layer in config.backbone_layers():
        yield from _layer_ops(config, layer)
    yield _linear("head", ("head", config.vocab_size, config.hidden_size), is_wide=True)


def draft_ops(config: ModelConfig) -> Iterator[OpSpec]:
    """Yields the products of the drafts, apart from the backbone's head, which they share."""
    dim, dspark = config.hidden_size, config.dspark
    if dspark:
        yield _linear("mtp.0.main_proj", ("mtp.0.main_proj", dim, dim * len(dspark.target_layer_ids)))
    for layer in config.draft_layers():
        if not dspark:
            for projection in (f"{layer.name}.e_proj", f"{layer.name}.h_proj"):
                yield _linear(projection, (projection, dim, dim))
        yield from _layer_ops(config, layer)
    if dspark:
        head = f"mtp.{dspark.num_stages - 1}.markov_head.markov_w2"
        yield _linear(head, (head, config.vocab_size, dspark.markov_rank), is_wide=True)


def companion_ops(config: ModelConfig, parallel: Parallel = ONE_RANK) -> Iterator[CompanionSpec]:
    """Yields the backbone's companions. Each runs once a step."""
    for layer in config.backbone_layers():
        yield from _layer_companions(config, layer.name, parallel)
    yield CompanionSpec("hc_head", OpKind.HYPER, (config.hc_mult, config.hidden_size))


def draft_companions(config: ModelConfig, parallel: Parallel = ONE_RANK) -> Iterator[CompanionSpec]:
    """Yields the drafts' companions."""
    if config.dspark:
        yield CompanionSpec("mtp.0.main_norm", OpKind.NORM, (config.hidden_size,))
        for layer in config.draft_layers():
            yield from _layer_companions(config, layer.name, parallel)
        last = f"mtp.{config.dspark.num_stages - 1}"
        yield CompanionSpec(f"{last}.hc_head", OpKind.HYPER, (config.hc_mult, config.hidden_size))
        return
    for layer in config.draft_layers():
        yield CompanionSpec(f"{layer.name}.enorm", OpKind.NORM, (config.hidden_size,))
        yield CompanionSpec(f"{layer.name}.hnorm", OpKind.NORM, (config.hidden_size,))
        yield from _layer_companions(config, layer.name, parallel)
        yield CompanionSpec(f"{layer.name}.hc_head", OpKind.HYPER, (config.hc_mult, config.hidden_size))


def _layer_companions(config: ModelConfig, layer: str, parallel: Parallel) -> Iterator[CompanionSpec]:
    num_ranks = parallel.size if parallel.attention is AttentionSplit.HEADS else 1
    num_heads, width = config.num_attention_heads // num_ranks, config.moe_intermediate_size // num_ranks
    boundary = (config.hc_mult, config.hidden_size)
    yield CompanionSpec(f"{layer}.hc_attn", OpKind.HYPER, boundary)
    yield CompanionSpec(f"{layer}.attn.q_norm", OpKind.NORM, (config.q_lora_rank,))
    yield CompanionSpec(f"{layer}.attn.kv_norm", OpKind.NORM, (config.head_dim,))
    yield CompanionSpec(f"{layer}.attn.q_head_norm", OpKind.NORM, (config.head_dim,), Q_HEAD_NORM)
    yield CompanionSpec(f"{layer}.attn.core", OpKind.ATTENTION, (num_heads, config.head_dim))
    yield CompanionSpec(f"{layer}.hc_ffn", OpKind.HYPER, boundary)
    yield CompanionSpec(f"{layer}.ffn.router", OpKind.ROUTER, (config.n_routed_experts, config.num_experts_per_tok))
    yield CompanionSpec(f"{layer}.ffn.shared_experts.swiglu", OpKind.SWIGLU, (width,))


def official_ops(config: ModelConfig, layer: Layer, official: frozenset[Step]) -> Iterator[CompanionSpec]:
    """Yields the companions of a layer that only official numerics have."""
    attn = f"{layer.name}.attn"
    if Step.KV in official:
        key_dims = (config.head_dim, config.qk_rope_head_dim)
        yield CompanionSpec(f"{attn}.key_quantizer", OpKind.KEY_QUANTIZER, key_dims, frozenset({Step.KV}))
    if Step.INDEXER in official and layer.ratio == CSA_RATIO:
        index_dims = (config.index_head_dim,)
        yield CompanionSpec(f"{attn}.indexer.quantizer", OpKind.INDEX_QUANTIZER, index_dims, INDEXER)


def angles_op(config: ModelConfig) -> CompanionSpec:
    """Returns what a decode step computes once, before its layers: the angles of its positions."""
    return CompanionSpec(STEP_ANGLES, OpKind.STEP_ANGLES, (config.qk_rope_head_dim,))


def decode_ops(config: ModelConfig, layer: Layer) -> Iterator[CompanionSpec]:
    """Yields what takes the place of norms, rotations and ``attn.core`` in a step of one row for each request."""
    attn, key_dims = f"{layer.name}.attn.decode", (config.head_dim, config.qk_rope_head_dim)
    is_csa = layer.ratio == CSA_RATIO
    writes = frozenset({Step.KV, Step.INDEXER} if is_csa else {Step.KV})
    yield CompanionSpec(f"{attn}.entries", OpKind.ENTRIES, key_dims, writes)
    if is_csa:
        index_dims = config.index_head_dim, config.qk_rope_head_dim
        yield CompanionSpec(f"{attn}.scores", OpKind.INDEX_SCORES, index_dims, INDEXER)
        yield CompanionSpec(f"{attn}.select", OpKind.SELECT, (config.index_topk,))
    yield CompanionSpec(f"{attn}.attend", OpKind.ATTEND, key_dims, Q_HEAD_NORM)


def chunk_ops(config: ModelConfig, layer: Layer) -> Iterator[CompanionSpec]:
    """Yields what takes the place of norms and rotations of queries and of ``attn.core`` in any other step."""
    attn, is_csa = f"{layer.name}.attn.chunk", layer.ratio == CSA_RATIO
    key_dims = config.head_dim, config.qk_rope_head_dim
    writes = frozenset({Step.KV, Step.INDEXER} if is_csa else {Step.KV})
    yield CompanionSpec(f"{attn}.entries", OpKind.CHUNK_ENTRIES, key_dims, writes)
    if is_csa:
        index_dims = config.index_head_dim, config.qk_rope_head_dim
        yield CompanionSpec(f"{attn}.scores", OpKind.INDEX_SCORES, index_dims, INDEXER)
        yield CompanionSpec(f"{attn}.select", OpKind.SELECT, (config.index_topk,))
    yield CompanionSpec(f"{attn}.attend", OpKind.ATTEND_CHUNK, key_dims, Q_HEAD_NORM)
    yield CompanionSpec(f"{attn}.rings", OpKind.CHUNK_RINGS, key_dims)


def route_op(config: ModelConfig, layer: Layer) -> CompanionSpec:
    """Returns what takes the place of gate and router in a decode step, where the gate is stored unquantised."""
    sizes = config.n_routed_experts, config.hidden_size, config.num_experts_per_tok
    return CompanionSpec(f"{layer.name}.ffn.decode.route", OpKind.ROUTE, sizes)


def steps_of(spec: OpSpec | CompanionSpec, stored: Format | None) -> frozenset[Step]:
    """Returns an operation's steps whose numerics can be chosen, given the format of its weights."""
    if isinstance(spec, CompanionSpec):
        return spec.steps
    if spec.kind not in (OpKind.LINEAR, OpKind.MOE):
        return PLAIN
    inputs = {FP8_BLOCK: Step.FP8_INPUTS, MXFP4: Step.FP8_INPUTS, MXFP8: Step.FP8_INPUTS, NVFP4: Step.NVFP4_INPUTS}
    steps = {inputs[stored]} if stored in inputs else set()
    if spec.kind is OpKind.MOE:
        steps |= {Step.ROUTING_WEIGHT} | ({Step.FP8_EXPERTS} if stored is NVFP4 else set())
    return frozenset(steps)


def _linear(slot: str, *modules: tuple[str, int, int], is_wide: bool = False, joins: str = "") -> OpSpec:
    specs = tuple(ModuleSpec(name, (n, k)) for name, n, k in modules)
    return OpSpec(slot, OpKind.LINEAR, specs, is_wide, joins=joins)


def _layer_ops(config: ModelConfig, layer: Layer) -> Iterator[OpSpec]:
    yield from _attention_ops(config, f"{layer.name}.attn", layer.ratio)
    yield from _ffn_ops(config, layer.name)


def _attention_ops(config: ModelConfig, attn: str, ratio: int) -> Iterator[OpSpec]:
    dim, rank = config.hidden_size, config.q_lora_rank
    heads_dim = config.num_attention_heads * config.head_dim
    out_rank = config.o_groups * config.o_lora_rank
    # Where all are products of x alone, or of the low-rank query, they may be one.
    of_x, of_qr = (f"{attn}.x_products", f"{attn}.queries") if ratio == CSA_RATIO else ("", "")
    yield _linear(f"{attn}.wqa_wkv", (f"{attn}.wq_a", rank, dim), (f"{attn}.wkv", config.head_dim, dim))
    yield _linear(f"{attn}.wq_b", (f"{attn}.wq_b", heads_dim, rank), joins=of_qr)
    if ratio:
        yield _compressor_op(f"{attn}.compressor", compressor_width(ratio, config.head_dim), dim, of_x)
    if ratio == CSA_RATIO:
        indexer, num_heads = f"{attn}.indexer", config.index_n_heads
        index_dim = num_heads * config.index_head_dim
        yield _linear(f"{indexer}.wq_b", (f"{indexer}.wq_b", index_dim, rank), joins=of_qr)
        weights = f"{indexer}.weights_proj"
        yield _linear(weights, (weights, num_heads, dim), is_wide=True, joins=of_x)
        yield _compressor_op(f"{indexer}.compressor", compressor_width(ratio, config.index_head_dim), dim, of_x)
    group_dim = heads_dim // config.o_groups
    wo_a = ModuleSpec(f"{attn}.wo_a", (out_rank, group_dim))
    yield OpSpec(f"{attn}.wo_a", OpKind.GROUPED, (wo_a,), inner_dims=(config.o_lora_rank, config.head_dim))
    yield _linear(f"{attn}.wo_b", (f"{attn}.wo_b", dim, out_rank))


def _compressor_op(name: str, width: int, dim: int, joins: str) -> OpSpec:
    shards = (f"{name}.wkv", width, dim), (f"{name}.wgate", width, dim)
    return _linear(f"{name}.wkv_wgate", *shards, is_wide=True, joins=joins)


def _ffn_ops(config: ModelConfig, layer: str) -> Iterator[OpSpec]:
    ffn = f"{layer}.ffn"
    dim, inter = config.hidden_size, config.moe_intermediate_size
    yield _linear(f"{ffn}.gate", (f"{ffn}.gate", config.n_routed_experts, dim), is_wide=True)
    projections = (expert_modules(config, layer, projection) for projection in ("w1", "w3", "w2"))
    yield OpSpec(f"{ffn}.experts", OpKind.MOE, tuple(module for group in projections for module in group))
    shared = f"{ffn}.shared_experts"
    yield _linear(f"{shared}.w13", (f"{shared}.w1", inter, dim), (f"{shared}.w3", inter, dim))
    yield _linear(f"{shared}.w2", (f"{shared}.w2", dim, inter))
