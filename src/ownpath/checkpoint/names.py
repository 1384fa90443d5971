"""The names and shapes of a DeepSeek-V4 model and its drafts in checkpoints (native names, without prefix)."""

from collections.abc import Iterator

from ownpath.checkpoint.schema import ModuleSpec, ParamSpec
from ownpath.config import CSA_RATIO, Layer, ModelConfig
from ownpath.dspark import DSparkShape

NORM_DTYPES = ("BF16", "F32")

BESIDE_WEIGHTS = frozenset({"tid2eid", "bias"})
"""Endings of a router's parameters, which stand beside its weight and are no part of how it is stored."""


def model_params(config: ModelConfig) -> Iterator[ParamSpec]:
    """Yields the backbone's parameters: embedding, norms, hyper-connections, sinks, router bias and tables."""
    dim, streams = config.hidden_size, config.hc_mult
    yield ParamSpec("embed.weight", (config.vocab_size, dim), ("BF16", "F32"))
    yield ParamSpec("norm.weight", (dim,), NORM_DTYPES)
    yield from _hyper("hc_head", streams, streams * dim, num_scales=1)
    for layer in config.backbone_layers():
        yield from _layer_params(config, layer)


def draft_params(config: ModelConfig) -> Iterator[ParamSpec]:
    """Yields the drafts' parameters, apart from the backbone's embedding, which they share."""
    if config.dspark:
        yield from _dspark_params(config, config.dspark)
        return
    dim, streams = config.hidden_size, config.hc_mult
    for layer in config.draft_layers():
        for norm in ("enorm", "hnorm", "norm"):
            yield ParamSpec(f"{layer.name}.{norm}.weight", (dim,), NORM_DTYPES)
        yield from _hyper(f"{layer.name}.hc_head", streams, streams * dim, num_scales=1)
        yield from _layer_params(config, layer)


def _dspark_params(config: ModelConfig, dspark: DSparkShape) -> Iterator[ParamSpec]:
    """Yields DSpark's: the first stage owns its way in, the last one its way out."""
    dim, streams = config.hidden_size, config.hc_mult
    yield ParamSpec("mtp.0.main_norm.weight", (dim,), NORM_DTYPES)
    for layer in config.draft_layers():
        yield from _layer_params(config, layer)
    last = f"mtp.{dspark.num_stages - 1}"
    yield ParamSpec(f"{last}.norm.weight", (dim,), NORM_DTYPES)
    yield from _hyper(f"{last}.hc_head", streams, streams * dim, num_scales=1)
    yield ParamSpec(f"{last}.markov_head.markov_w1.weight", (config.vocab_size, dspark.markov_rank), ("BF16", "F32"))
    yield ParamSpec(f"{last}.confidence_head.proj.weight", (1, dim + dspark.markov_rank), ("BF16", "F32"))


def _layer_params(config: ModelConfig, layer: Layer) -> Iterator[ParamSpec]:
    name, dim, streams = layer.name, config.hidden_size, config.hc_mult
    yield ParamSpec(f"{name}.attn_norm.weight", (dim,), NORM_DTYPES)
    yield ParamSpec(f"{name}.ffn_norm.weight", (dim,), NORM_DTYPES)
    yield from _hyper(f"{name}.hc_attn", (2 + streams) * streams, streams * dim, num_scales=3)
    yield from _hyper(f"{name}.hc_ffn", (2 + streams) * streams, streams * dim, num_scales=3)
    yield from _attention_params(config, f"{name}.attn", layer.ratio)
    if layer.is_hash:
        table = (config.vocab_size, config.num_experts_per_tok)
        yield ParamSpec(f"{name}.ffn.gate.tid2eid", table, ("I64",))
    else:
        yield ParamSpec(f"{name}.ffn.gate.bias", (config.n_routed_experts,), ("F32",))


def _hyper(name: str, num_mixes: int, in_dim: int, num_scales: int) -> Iterator[ParamSpec]:
    yield ParamSpec(f"{name}_fn", (num_mixes, in_dim), ("F32",))
    yield ParamSpec(f"{name}_base", (num_mixes,), ("F32",))
    yield ParamSpec(f"{name}_scale", (num_scales,), ("F32",))


def _attention_params(config: ModelConfig, attn: str, ratio: int) -> Iterator[ParamSpec]:
    yield ParamSpec(f"{attn}.attn_sink", (config.num_attention_heads,), ("F32",))
    yield ParamSpec(f"{attn}.q_norm.weight", (config.q_lora_rank,), NORM_DTYPES)
    yield ParamSpec(f"{attn}.kv_norm.weight", (config.head_dim,), NORM_DTYPES)
    if ratio:
        yield from _compressor_params(f"{attn}.compressor", ratio, config.head_dim)
    if ratio == CSA_RATIO:
        yield from _compressor_params(f"{attn}.indexer.compressor", ratio, config.index_head_dim)


def _compressor_params(name: str, ratio: int, head_dim: int) -> Iterator[ParamSpec]:
    yield ParamSpec(f"{name}.ape", (ratio, compressor_width(ratio, head_dim)), ("F32",))
    yield ParamSpec(f"{name}.norm.weight", (head_dim,), NORM_DTYPES)


def compressor_width(ratio: int, head_dim: int) -> int:
    """Returns a compressor's channels per token: CSA windows overlap, so that each token feeds two of them."""
    return 2 * head_dim if ratio == CSA_RATIO else head_dim


def expert_modules(config: ModelConfig, layer: str, projection: str) -> tuple[ModuleSpec, ...]:
    """Returns the routed experts' ``w1`` (gate), ``w3`` (up) or ``w2`` (down) of a layer, in expert order."""
    dim, inter = config.hidden_size, config.moe_intermediate_size
    shape = (dim, inter) if projection == "w2" else (inter, dim)
    experts = range(config.n_routed_experts)
    return tuple(ModuleSpec(f"{layer}.ffn.experts.{e}.{projection}", shape) for e in experts)
