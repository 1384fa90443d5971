"""Writes ``config.json`` and ``hf_quant_config.json`` of a checkpoint that we quantised, as ModelOpt does."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.schema import ENCODINGS
from ownpath.config import ModelConfig
from ownpath.formats import NVFP4
from ownpath.plan.opspec import draft_ops, model_ops
from ownpath.quantize.steps import Convert, QuantizeScope

GROUP_SIZE = 16
IGNORE = {
    QuantizeScope.EXPERTS: ("*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*"),
    QuantizeScope.FULL: ("*.attn.compressor.*", "*.attn.indexer.*", "*.attn.wo_a", "*.ffn.gate", "head", "mtp.*"),
}
"""Patterns of what is left as it was; they are narrowed where the source has some of it in NVFP4 already."""
EXPERT_DTYPE = "expert_dtype"
PRODUCER = {"name": "ownpath", "version": "1"}
_LAYER = re.compile(r"(layers|mtp)\.\d+\.")


@dataclass(frozen=True)
class Described:
    """The contents of a result. nvfp4: names of its NVFP4 modules, converted here or before.

    ignored: patterns that match the others that scope or source leave as they are, and none of those.
    """

    nvfp4: tuple[str, ...]
    ignored: tuple[str, ...]


def describe(
    index: CheckpointIndex, config: ModelConfig, scope: QuantizeScope, converts: Iterable[Convert]
) -> Described:
    """Returns what the result of ``converts`` will hold. index: of the source."""
    converted = [module.name for convert in converts for module in convert.modules]
    nvfp4 = dict.fromkeys([*converted, *_stored_nvfp4(index)])
    names = [module.name for op in (*model_ops(config), *draft_ops(config)) for module in op.modules]
    others = [name for name in names if name not in nvfp4]
    ignored = dict.fromkeys(entry for pattern in IGNORE[scope] for entry in _narrowed(pattern, tuple(nvfp4), others))
    return Described(tuple(nvfp4), tuple(ignored))


def _stored_nvfp4(index: CheckpointIndex) -> Iterator[str]:
    """Yields the modules that the source has in NVFP4, which are carried over: those with a global scale."""
    suffixes = [f".{one.part('global_scale').suffix}" for one in ENCODINGS if one.format is NVFP4]
    for key in index.tensors:
        suffix = next((suffix for suffix in suffixes if key.endswith(suffix)), None)
        if suffix is not None:
            yield key.removesuffix(suffix)


def _narrowed(pattern: str, nvfp4: Iterable[str], others: Iterable[str]) -> Iterator[str]:
    """Yields the pattern, or where it matches an NVFP4 module, a pattern for each kind of the others that it matches,
    or their names where one of their kind is NVFP4."""
    taken = [name for name in nvfp4 if fnmatchcase(name, pattern)]
    if not taken:
        yield pattern
        return
    kinds = {_kind(name) for name in taken}
    for name in others:
        if fnmatchcase(name, pattern):
            yield name if _kind(name) in kinds else _kind(name)


def _kind(name: str) -> str:
    return _LAYER.sub("*.", name) if name.startswith("layers.") else _LAYER.sub("mtp.*.", name)


def quantized_layers(nvfp4: Iterable[str]) -> dict[str, dict[str, object]]:
    """Returns one entry for each layer's experts, and one for each other weight."""
    layers = dict.fromkeys(name.split(".experts.")[0] + ".experts" if ".experts." in name else name for name in nvfp4)
    return {layer: {"quant_algo": "NVFP4", "group_size": GROUP_SIZE} for layer in sorted(layers)}


def config_fields(source: dict[str, object], contents: Described) -> dict[str, object]:
    """Returns the result's ``config.json``: the source's fields with the quantisation added."""
    numbers = {"num_bits": 4, "type": "float", "group_size": GROUP_SIZE, "dynamic": False}
    added = {
        "quant_algo": "MIXED_PRECISION",
        "moe_quant_algo": "NVFP4",
        "group_size": GROUP_SIZE,
        "kv_cache_quant_algo": None,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": numbers, "input_activations": numbers}},
        "quantized_layers": quantized_layers(contents.nvfp4),
        "ignore": list(contents.ignored),
        "producer": PRODUCER,
    }
    stored = source.get("quantization_config")
    # The source's description stays: it applies to the FP8 weights that are carried over.
    kept = stored if isinstance(stored, dict) and stored.get("quant_method") != "compressed-tensors" else {}
    quantization = {"quant_method": "modelopt"} | _as_fp4(kept) | added
    return _as_fp4(source) | {"quantization_config": quantization}


def _as_fp4(fields: dict[str, object]) -> dict[str, object]:
    """Sets the experts' dtype to "fp4", the release's word that NVFP4 exports keep, where the source states one."""
    return fields if fields.get(EXPERT_DTYPE) is None else fields | {EXPERT_DTYPE: "fp4"}


def quant_config_fields(contents: Described) -> dict[str, object]:
    """Returns the fields of ``hf_quant_config.json``."""
    quantization = {
        "quant_algo": "MIXED_PRECISION",
        "kv_cache_quant_algo": None,
        "group_size": GROUP_SIZE,
        "quantized_layers": quantized_layers(contents.nvfp4),
        "exclude_modules": list(contents.ignored),
    }
    return {"producer": PRODUCER, "quantization": quantization}
