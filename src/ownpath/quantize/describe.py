"""Writes ``config.json`` and ``hf_quant_config.json`` of a checkpoint that we quantised, as ModelOpt does."""

from collections.abc import Iterable

from ownpath.quantize.steps import Convert, QuantizeScope

GROUP_SIZE = 16
IGNORE = {
    QuantizeScope.EXPERTS: ["*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*"],
    QuantizeScope.FULL: ["*.attn.compressor.*", "*.attn.indexer.*", "*.attn.wo_a", "*.ffn.gate", "head", "mtp.*"],
}
EXPERT_DTYPE = "expert_dtype"
PRODUCER = {"name": "ownpath", "version": "1"}


def quantized_layers(converts: Iterable[Convert]) -> dict[str, dict[str, object]]:
    """Returns one entry for each layer's experts, and one for each other weight."""
    names = (module.name for convert in converts for module in convert.modules)
    layers = dict.fromkeys(name.split(".experts.")[0] + ".experts" if ".experts." in name else name for name in names)
    return {layer: {"quant_algo": "NVFP4", "group_size": GROUP_SIZE} for layer in sorted(layers)}


def config_fields(source: dict[str, object], scope: QuantizeScope, converts: Iterable[Convert]) -> dict[str, object]:
    """Returns the result's ``config.json``: the source's fields with the quantisation added."""
    numbers = {"num_bits": 4, "type": "float", "group_size": GROUP_SIZE, "dynamic": False}
    added = {
        "quant_algo": "MIXED_PRECISION",
        "moe_quant_algo": "NVFP4",
        "group_size": GROUP_SIZE,
        "kv_cache_quant_algo": None,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": numbers, "input_activations": numbers}},
        "quantized_layers": quantized_layers(converts),
        "ignore": IGNORE[scope],
        "producer": PRODUCER,
    }
    stored = source.get("quantization_config")
    # The source's description stays: it applies to the FP8 weights that are carried over.
    quantization = {"quant_method": "modelopt"} | _as_fp4(stored if isinstance(stored, dict) else {}) | added
    return _as_fp4(source) | {"quantization_config": quantization}


def _as_fp4(fields: dict[str, object]) -> dict[str, object]:
    """Sets the experts' dtype to "fp4", the release's word that NVFP4 exports keep, where the source states one."""
    return fields if fields.get(EXPERT_DTYPE) is None else fields | {EXPERT_DTYPE: "fp4"}


def quant_config_fields(scope: QuantizeScope, converts: Iterable[Convert]) -> dict[str, object]:
    """Returns the fields of ``hf_quant_config.json``."""
    quantization = {
        "quant_algo": "MIXED_PRECISION",
        "kv_cache_quant_algo": None,
        "group_size": GROUP_SIZE,
        "quantized_layers": quantized_layers(converts),
        "exclude_modules": IGNORE[scope],
    }
    return {"producer": PRODUCER, "quantization": quantization}
