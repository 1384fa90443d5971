"""The embedded model rewritten as other exporters store it, and what it then answers."""

import json
import shutil
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ownpath.checkpoint.writer import INDEX_NAME
from ownpath.config import EngineConfig
from ownpath.formats import MXFP8
from ownpath.loading import default_model_dir, load_model
from ownpath.model.batch import ForwardBatch
from ownpath.numerics import E4M3_MAX, decode_e8m0, encode_e8m0_ceil, quantize_mxfp4
from ownpath.qtensor import QuantTensor

Tensors = dict[str, torch.Tensor]
SHARD = "model.safetensors"
PROMPT = [0, 17, 301, 5, 902, 44, 1203, 8, 77, 650, 2, 31]


@lru_cache(maxsize=1)
def _stored() -> Tensors:
    shards = sorted(default_model_dir().glob("*.safetensors"))
    tensors = {key: tensor for shard in shards for key, tensor in load_file(shard).items()}
    return {key: tensor for key, tensor in tensors.items() if not key.startswith("mtp.")}


def tiny_tensors() -> Tensors:
    """Every tensor of the embedded model's backbone: few exporters keep a draft. The dict may be changed, the tensors
    may not."""
    return dict(_stored())


def write_tiny(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    indexed: bool = True,
    listed: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Writes one shard, its index (with what else is ``listed``) and config.json with no claims of formats but
    ``config``'s."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in default_model_dir().iterdir():
        if path.suffix != ".safetensors" and path.name not in (INDEX_NAME, "hf_quant_config.json", "scores.json"):
            shutil.copy(path, folder)
    fields = json.loads((folder / "config.json").read_text())
    del fields["quantization_config"]
    fields["num_nextn_predict_layers"] = 0
    (folder / "config.json").write_text(json.dumps(fields | dict(config or {})))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / SHARD)
    if indexed:
        weight_map = dict.fromkeys(tensors, SHARD) | dict(listed or {})
        (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def logits_of(folder: Path, reference: frozenset[str] = frozenset()) -> torch.Tensor:
    """The logits after a fixed prompt, as the engine computes them on the CPU: [1, vocab]."""
    model = load_model(folder, EngineConfig(max_model_len=64, reference=reference))
    return model.forward(ForwardBatch.of([(PROMPT, model.new_cache())], "cpu"))


def modules_with(tensors: Tensors, ending: str, inside: str = "") -> list[str]:
    """The modules that have a tensor of this ending."""
    return [key.removesuffix(f".{ending}") for key in tensors if key.endswith(f".{ending}") and inside in key]


def compressed_nvfp4(tensors: Tensors, *, has_input_scales: bool = True) -> Tensors:
    """ModelOpt's NVFP4 modules under compressed-tensors' names; global scales become divisors [1]."""
    changed = dict(tensors)
    for module in modules_with(tensors, "weight_scale_2"):
        changed[f"{module}.weight_packed"] = changed.pop(f"{module}.weight")
        changed[f"{module}.weight_global_scale"] = (1 / changed.pop(f"{module}.weight_scale_2")).reshape(1)
        divisor = (1 / changed.pop(f"{module}.input_scale")).reshape(1)
        if has_input_scales:
            changed[f"{module}.input_global_scale"] = divisor
    return changed


def without_nvfp4(tensors: Tensors, modules: list[str]) -> Tensors:
    """The tensors without everything of these modules."""
    dropped = {f"{module}.{part}" for module in modules for part in ("weight", *_SCALES)}
    return {key: tensor for key, tensor in tensors.items() if key not in dropped}


_SCALES = ("weight_scale", "weight_scale_2", "input_scale")


def mxfp4_weights(tensors: Tensors, modules: list[str]) -> dict[str, QuantTensor]:
    """MXFP4 of random weights in the shapes of these modules, the same in every call."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    for module in modules:
        rows, packed = tensors[f"{module}.weight"].shape
        found[module] = quantize_mxfp4(0.02 * torch.randn(rows, 2 * packed, generator=generator))
    return found


def e8m0_bytes(weight: QuantTensor) -> torch.Tensor:
    """The block scales of an MXFP4 or MXFP8 weight as bytes."""
    assert weight.scale is not None
    return weight.scale.view(torch.uint8)


def mxfp8_of(weight: torch.Tensor) -> QuantTensor:
    """E4M3 codes with a power of two for each 32 of a row, the smallest that lets the largest value fit."""
    blocks = weight.unflatten(1, (-1, 32))
    scale = encode_e8m0_ceil(blocks.abs().amax(-1), E4M3_MAX)
    codes = (blocks / decode_e8m0(scale)[..., None]).to(torch.float8_e4m3fn)
    return QuantTensor(codes.flatten(1), scale, None, MXFP8)


def more_index_heads(tensors: Tensors, num_heads: int) -> Tensors:
    """The model with further heads of zeros in each indexer: every score changes by one factor, and no choice does.

    vLLM's kernels for Hopper take 32 or 64. ``index_n_heads`` of the config must be changed too.
    """
    changed = dict(tensors)
    for module in modules_with(tensors, "scale", ".indexer.wq_b"):
        proj = f"{module.removesuffix('wq_b')}weights_proj"
        times = num_heads // tensors[f"{proj}.weight"].shape[0] - 1
        for key, fill in ((f"{module}.weight", 0), (f"{module}.scale", 127), (f"{proj}.weight", 0)):
            stored = tensors[key].view(torch.uint8)
            changed[key] = torch.cat([stored, *[torch.full_like(stored, fill)] * times]).view(tensors[key].dtype)
    return changed
