"""Adds a trained MTP module to tiny-v4's checkpoint: one more shard, and what index and config.json say of it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from ownpath.checkpoint.header import read_header
from ownpath.checkpoint.schema import MODELOPT_NVFP4, NATIVE_FP8
from ownpath.checkpoint.writer import INDEX_NAME, write_shard
from ownpath.files import write_json
from ownpath.formats import NVFP4
from ownpath.qtensor import QuantTensor
from tiny.calibrate import Calibration
from tiny.draft import EXPERTS_W2, EXPERTS_W13, STORED, Weights
from tiny.export import expert_rows, write_fields
from tiny.fakequant import quantize_as

SHARD_NAME = "mtp.safetensors"
MODULE = "mtp.0"
_UNQUANTISED_BEFORE, _UNQUANTISED = "*.attn.wo_a", "layers.*.attn.wo_a"


class DraftCalibration(Calibration):
    """Records the largest input of each product of the module; ``see`` is called by its forward."""

    def __init__(self) -> None:
        self.amax: dict[str, float] = {}

    def see(self, name: str, *values: Tensor) -> None:
        """Takes the inputs of one product, or all of the routed experts' with the weight of each."""
        if name != "ffn.experts":
            self._see(f"{MODULE}.{name}", values[0])
            return
        x_TD, inner_ETF, weight_TE = values
        for expert, inner_TF in enumerate(inner_ETF):
            used = weight_TE[:, expert] > 0
            if used.any():
                for projection, entering in (("w1", x_TD), ("w3", x_TD), ("w2", inner_TF)):
                    self._see(f"{MODULE}.ffn.experts.{expert}.{projection}", entering[used])


def draft_tensors(weights: Weights, calibration: Calibration) -> Iterator[tuple[str, Tensor]]:
    """Yields every tensor of the module with its name in the checkpoint."""
    for name, weight in weights.items():
        if name not in STORED:
            yield f"{MODULE}.{name}", weight
            continue
        for module, part in _modules(name, quantize_as(STORED[name], weight)):
            if STORED[name] == NVFP4:
                yield from MODELOPT_NVFP4.encode(module, part, calibration.input_scale(module))
            else:
                yield from NATIVE_FP8.encode(module, part)


def _modules(name: str, weight: QuantTensor) -> Iterator[tuple[str, QuantTensor]]:
    if name not in (EXPERTS_W13, EXPERTS_W2):
        yield f"{MODULE}.{name.removesuffix('.weight')}", weight
        return
    for expert in range(weight.qdata.shape[0]):
        module = f"{MODULE}.ffn.experts.{expert}"
        if name == EXPERTS_W2:
            yield f"{module}.w2", expert_rows(weight, expert, slice(None))
            continue
        half = weight.qdata.shape[1] // 2
        yield f"{module}.w1", expert_rows(weight, expert, slice(0, half))
        yield f"{module}.w3", expert_rows(weight, expert, slice(half, None))


def add_draft(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Writes the shard, then the files that name it. The backbone's shards are not touched."""
    write_shard(folder / SHARD_NAME, tensors)
    index = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
    kept = {name: shard for name, shard in index["weight_map"].items() if shard != SHARD_NAME}
    index["weight_map"] = dict(sorted((kept | dict.fromkeys(tensors, SHARD_NAME)).items()))
    index["metadata"]["total_size"] = _bytes_of_backbone(folder, kept) + sum(t.nbytes for t in tensors.values())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stored = json.loads((folder / "hf_quant_config.json").read_text(encoding="utf-8"))
    config["num_nextn_predict_layers"] = 1
    config["compress_ratios"] = [*config["compress_ratios"][: config["num_hidden_layers"]], 0]
    for section, ignored in ((config["quantization_config"], "ignore"), (stored["quantization"], "exclude_modules")):
        backbone = {name: kind for name, kind in section["quantized_layers"].items() if not name.startswith("mtp.")}
        section["quantized_layers"] = backbone | _quantized_layers()
        section[ignored] = [_UNQUANTISED if name == _UNQUANTISED_BEFORE else name for name in section[ignored]]
    write_json(folder / INDEX_NAME, index)
    write_fields(folder / "config.json", config)
    write_fields(folder / "hf_quant_config.json", stored)


def _bytes_of_backbone(folder: Path, names: dict[str, str]) -> int:
    entries = [entry for shard in sorted(set(names.values())) for entry in read_header(folder / shard).entries]
    return sum(entry.stop - entry.start for entry in entries)


def _quantized_layers() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, stored in STORED.items():
        module = f"{MODULE}.{'ffn.experts' if name.startswith('ffn.experts.') else name.removesuffix('.weight')}"
        nvfp4 = {"quant_algo": "NVFP4", "group_size": 16}
        found[module] = nvfp4 if stored == NVFP4 else {"quant_algo": "FP8_PB_WO", "weight_block_size": [128, 128]}
    return dict(sorted(found.items()))
