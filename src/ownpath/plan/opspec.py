"""The operations a V4 backbone needs planned: every product with a stored weight matrix, in forward order."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from ownpath.checkpoint.names import compressor_width, expert_modules
from ownpath.checkpoint.schema import ModuleSpec
from ownpath.config import CSA_RATIO, ModelConfig


class OpKind(StrEnum):
    """The kinds of product a kernel can compute."""

    LINEAR = "linear"
    """y = x Wᵀ; several modules are rows of one fused W."""
    GROUPED = "grouped_linear"
    """y[t, g] = W[g] x[t, g]: one matrix per group of heads."""
    MOE = "moe"
    """Routed SwiGLU experts; modules are all w1, then all w3, then all w2."""


@dataclass(frozen=True)
class OpSpec:
    """One planned product. ``slot`` is the name the model calls it by; ``modules`` the weights behind it."""

    slot: str
    kind: OpKind
    modules: tuple[ModuleSpec, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of the fused weight (of one expert's gate_up for MOE)."""
        if self.kind is OpKind.MOE:
            inter, dim = self.modules[0].shape
            return 2 * inter, dim
        return sum(module.shape[0] for module in self.modules), self.modules[0].shape[1]


def model_ops(config: ModelConfig) -> Iterator[OpSpec]:
    """Every op of the backbone and the head."""
    for layer_idx, ratio in enumerate(config.compress_ratios):
        yield from _attention_ops(config, f"layers.{layer_idx}.attn", ratio)
        yield from _ffn_ops(config, layer_idx)
    yield _linear("head", ("head", config.vocab_size, config.hidden_size))


def _linear(slot: str, *modules: tuple[str, int, int]) -> OpSpec:
    return OpSpec(slot, OpKind.LINEAR, tuple(ModuleSpec(name, (n, k)) for name, n, k in modules))


def _attention_ops(config: ModelConfig, attn: str, ratio: int) -> Iterator[OpSpec]:
    dim, rank = config.hidden_size, config.q_lora_rank
    heads_dim = config.num_attention_heads * config.head_dim
    out_rank = config.o_groups * config.o_lora_rank
    yield _linear(f"{attn}.wqa_wkv", (f"{attn}.wq_a", rank, dim), (f"{attn}.wkv", config.head_dim, dim))
    yield _linear(f"{attn}.wq_b", (f"{attn}.wq_b", heads_dim, rank))
    if ratio:
        yield _compressor_op(f"{attn}.compressor", compressor_width(ratio, config.head_dim), dim)
    if ratio == CSA_RATIO:
        index_dim = config.index_n_heads * config.index_head_dim
        yield _linear(f"{attn}.indexer.wq_b", (f"{attn}.indexer.wq_b", index_dim, rank))
        yield _linear(f"{attn}.indexer.weights_proj", (f"{attn}.indexer.weights_proj", config.index_n_heads, dim))
        width = compressor_width(ratio, config.index_head_dim)
        yield _compressor_op(f"{attn}.indexer.compressor", width, dim)
    group_dim = heads_dim // config.o_groups
    yield OpSpec(f"{attn}.wo_a", OpKind.GROUPED, (ModuleSpec(f"{attn}.wo_a", (out_rank, group_dim)),))
    yield _linear(f"{attn}.wo_b", (f"{attn}.wo_b", dim, out_rank))


def _compressor_op(name: str, width: int, dim: int) -> OpSpec:
    return _linear(f"{name}.wkv_wgate", (f"{name}.wkv", width, dim), (f"{name}.wgate", width, dim))


def _ffn_ops(config: ModelConfig, layer_idx: int) -> Iterator[OpSpec]:
    ffn = f"layers.{layer_idx}.ffn"
    dim, inter = config.hidden_size, config.moe_intermediate_size
    yield _linear(f"{ffn}.gate", (f"{ffn}.gate", config.n_routed_experts, dim))
    projections = (expert_modules(config, layer_idx, projection) for projection in ("w1", "w3", "w2"))
    yield OpSpec(f"{ffn}.experts", OpKind.MOE, tuple(module for group in projections for module in group))
    shared = f"{ffn}.shared_experts"
    yield _linear(f"{shared}.w13", (f"{shared}.w1", inter, dim), (f"{shared}.w3", inter, dim))
    yield _linear(f"{shared}.w2", (f"{shared}.w2", dim, inter))
