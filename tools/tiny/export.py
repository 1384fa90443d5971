"""Writes the checkpoint of trained weights: quantised tensors under their published names, and the JSON files."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from ownpath.checkpoint.reader import read_file
from ownpath.checkpoint.schema import MODELOPT_NVFP4, NATIVE_FP8
from ownpath.formats import FP8_BLOCK, NVFP4
from ownpath.numerics import dequantize
from ownpath.qtensor import QuantTensor
from tiny.calibrate import Calibration
from tiny.fakequant import quantize_as, stored_format
from tiny.names import native_name
from tiny.network import FIELDS, build_network

_FUSED_EXPERTS = re.compile(r"\.experts\.(gate_up_proj|down_proj)$")
_PRODUCER = {"name": "ownpath", "version": "tiny-v4"}


def read_trained(folder: Path) -> dict[str, Tensor]:
    """Reads the tensors that training saved. Errors: ValueError when there are none."""
    files = sorted(folder.glob("trained-*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: no trained-*.safetensors")
    return {name: tensor for file in files for name, tensor in read_file(file)[1].items()}


def read_back(trained: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the values that a reader of the checkpoint gets: quantised weights in float32, others as saved."""
    values = {}
    for name, tensor in trained.items():
        stored = stored_format(name)
        values[name] = tensor if stored is None else dequantize(quantize_as(stored, tensor))
    return values


def make_stored_network(trained: dict[str, Tensor]) -> Any:
    """Returns transformers' network in float32 with the checkpoint's values."""
    network = build_network(seed=0).float()
    missing, unexpected = network.load_state_dict(read_back(trained), strict=False)
    if missing or unexpected:
        raise ValueError(f"trained tensors do not fit: missing {missing}, unexpected {unexpected}")
    return network.eval()


def checkpoint_tensors(trained: dict[str, Tensor], calibration: Calibration) -> Iterator[tuple[str, Tensor]]:
    """Yields every tensor of the checkpoint with its name."""
    for name, tensor in trained.items():
        stored = stored_format(name)
        if stored is None:
            yield native_name(name), tensor
            continue
        weight = quantize_as(stored, tensor)
        for module, part in _modules(name, weight):
            if stored == FP8_BLOCK:
                yield from NATIVE_FP8.encode(module, part)
            else:
                yield from MODELOPT_NVFP4.encode(module, part, calibration.input_scale(module))


def _modules(name: str, weight: QuantTensor) -> Iterator[tuple[str, QuantTensor]]:
    """Yields a parameter's stored matrices: itself, or w1, w3 and w2 of each expert."""
    match = _FUSED_EXPERTS.search(name)
    if match is None:
        yield native_name(name).removesuffix(".weight"), weight
        return
    experts = native_name(name).rsplit(".", 1)[0]
    for expert in range(weight.qdata.shape[0]):
        one = expert_rows(weight, expert, slice(None))
        if match[1] == "down_proj":
            yield f"{experts}.{expert}.w2", one
            continue
        half = one.qdata.shape[0] // 2
        yield f"{experts}.{expert}.w1", expert_rows(weight, expert, slice(0, half))
        yield f"{experts}.{expert}.w3", expert_rows(weight, expert, slice(half, None))


def expert_rows(weight: QuantTensor, expert: int, rows: slice) -> QuantTensor:
    """Returns some rows of one expert, as a matrix of its own."""
    assert weight.scale is not None
    assert weight.global_scale is not None
    qdata, scale = weight.qdata[expert, rows].contiguous(), weight.scale[expert, rows].contiguous()
    return QuantTensor(qdata, scale, weight.global_scale[expert].clone(), weight.format)


def write_json_files(folder: Path, trained: dict[str, Tensor]) -> None:
    """Writes ``config.json``, ``hf_quant_config.json`` and ``generation_config.json``."""
    quantized = _quantized_layers(trained)
    ignore = ["embed", "head", "*.attn.wo_a", "*.compressor.*", "*.attn.indexer.weights_proj", "*.ffn.gate"]
    group = {"num_bits": 4, "type": "float", "group_size": 16, "dynamic": False}
    config = {
        **FIELDS,
        "quantization_config": {
            "quant_method": "modelopt",
            "quant_algo": "MIXED_PRECISION",
            "moe_quant_algo": "NVFP4",
            "group_size": 16,
            "kv_cache_quant_algo": None,
            "weight_block_size": [128, 128],
            "scale_fmt": "ue8m0",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": group, "input_activations": group}},
            "quantized_layers": quantized,
            "ignore": ignore,
            "producer": _PRODUCER,
        },
    }
    quantization = {
        "quant_algo": "MIXED_PRECISION",
        "kv_cache_quant_algo": None,
        "group_size": 16,
        "quantized_layers": quantized,
        "exclude_modules": ignore,
    }
    generation = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "do_sample": False}
    write_fields(folder / "config.json", config)
    write_fields(folder / "hf_quant_config.json", {"producer": _PRODUCER, "quantization": quantization})
    write_fields(folder / "generation_config.json", generation)


def _quantized_layers(trained: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name in trained:
        stored = stored_format(name)
        if stored is None:
            continue
        module = native_name(name).removesuffix(".weight")
        module = module.rsplit(".", 1)[0] if _FUSED_EXPERTS.search(name) else module
        nvfp4 = {"quant_algo": "NVFP4", "group_size": 16}
        found[module] = nvfp4 if stored == NVFP4 else {"quant_algo": "FP8_PB_WO", "weight_block_size": [128, 128]}
    return dict(sorted(found.items()))


def write_fields(path: Path, content: dict[str, Any]) -> None:
    """Writes JSON as the checkpoint's files have it."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
