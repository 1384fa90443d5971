"""Unusual but right checkpoints run; wrong ones are refused, and inspect finds by name what loading refuses."""

import json
from pathlib import Path

import pytest
import torch
from support.tiny_exports import Tensors, logits_of, modules_with, tiny_tensors, without_nvfp4, write_tiny

from ownpath.checkpoint.errors import CheckpointError
from ownpath.config import EngineConfig
from ownpath.finding import failed, warned
from ownpath.inspect.inspection import inspect_folder
from ownpath.loading import default_model_dir, load_model
from ownpath.numerics import dequantize, quantize_fp8_block, quantize_nvfp4

W2 = "layers.1.ffn.experts.3.w2"
QUANTIZATION = "quantization_config"


def close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Products that sum in another order: some hundred float32 roundings of the largest logit, at most."""
    limit = 1000 * torch.finfo(torch.float32).eps * float(expected.abs().max())
    return float((actual - expected).abs().max()) <= limit


def test_a_head_in_nvfp4_that_the_config_excludes(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    weight = quantize_nvfp4(tensors["head.weight"].float())
    assert weight.scale is not None
    assert weight.global_scale is not None
    stored = {
        "head.weight": weight.qdata,
        "head.weight_scale": weight.scale,
        "head.weight_scale_2": weight.global_scale,
    }
    claims = json.loads((default_model_dir() / "config.json").read_text())[QUANTIZATION]
    folder = write_tiny(tmp_path / "nvfp4", tensors | stored, config={QUANTIZATION: claims})
    expected = logits_of(write_tiny(tmp_path / "plain", tensors | {"head.weight": dequantize(weight)}))
    assert close(logits_of(folder), expected)
    problems = inspect_folder(folder).problems
    assert not failed(problems)
    assert any("'head' is stored as NVFP4" in problem.message for problem in warned(problems))


def test_compressors_and_indexers_in_fp8_blocks_with_bf16_scales(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    parts = [key for key in tensors if key.endswith(("compressor.wkv.weight", "wgate.weight", "weights_proj.weight"))]
    stored: Tensors = {}
    plain: Tensors = {}
    for key in parts:
        weight = quantize_fp8_block(tensors[key].float(), torch.float32)
        assert weight.scale is not None
        narrow = weight.scale.bfloat16()
        stored |= {key: weight.qdata, f"{key}_scale": narrow}
        plain[key] = dequantize(type(weight)(weight.qdata, narrow.float(), None, weight.format))
    folder = write_tiny(tmp_path / "fp8", tensors | stored)
    assert close(logits_of(folder), logits_of(write_tiny(tmp_path / "plain", tensors | plain)))
    assert not failed(inspect_folder(folder).problems)


def test_config_json_as_transformers_writes_it(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, tiny_tensors())
    fields = json.loads((folder / "config.json").read_text())
    kinds = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
    num_hash, num_layers = fields.pop("num_hash_layers"), fields["num_hidden_layers"]
    fields["layer_types"] = [kinds[ratio] for ratio in fields.pop("compress_ratios")][:num_layers]
    fields["mlp_layer_types"] = ["hash_moe"] * num_hash + ["moe"] * (num_layers - num_hash)
    yarn = fields.pop("rope_scaling") | {"rope_type": "yarn", "rope_theta": 160000}
    fields["rope_parameters"] = {"main": {"rope_type": "default", "rope_theta": 10000}, "compress": yarn}
    (folder / "config.json").write_text(json.dumps(fields))
    assert torch.equal(logits_of(folder), logits_of(default_model_dir()))
    assert not failed(inspect_folder(folder).problems)


def both_refuse(folder: Path, check: str, where: str, message: str) -> None:
    assert (check, where) in {(problem.id, problem.where) for problem in failed(inspect_folder(folder).problems)}
    with pytest.raises(CheckpointError, match=message):
        load_model(folder, EngineConfig(max_model_len=64))


def test_a_nan_scale_over_a_block_of_zeros(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    scale, codes = tensors[f"{W2}.weight_scale"].view(torch.uint8).clone(), tensors[f"{W2}.weight"].clone()
    scale[7, 3], codes[7, 24:32] = 0x7F, 0
    changed = {f"{W2}.weight_scale": scale.view(torch.float8_e4m3fn), f"{W2}.weight": codes}
    folder = write_tiny(tmp_path, tensors | changed)
    both_refuse(folder, "block-scale", f"{W2}.weight_scale", r"block scale \[7, 3\] is NaN")


def test_experts_that_were_pruned_without_their_table(tmp_path: Path) -> None:
    gone = (".experts.6.", ".experts.7.")
    tensors = {key: t for key, t in tiny_tensors().items() if not any(name in key for name in gone)}
    tensors |= {key: t[:6] for key, t in tensors.items() if key.endswith(("ffn.gate.weight", "ffn.gate.bias"))}
    folder = write_tiny(tmp_path, tensors, config={"n_routed_experts": 6})
    both_refuse(folder, "expert-ids", "layers.0.ffn.gate.tid2eid", r"'layers\.0\.ffn\.gate\.tid2eid' names experts")


def test_int4_experts_are_one_problem_each(tmp_path: Path) -> None:
    """Neither a missing tensor nor a shard to download."""
    tensors = tiny_tensors()
    modules = modules_with(tensors, "weight_scale_2", ".experts.")
    changed = without_nvfp4(tensors, modules)
    for name in modules:
        rows, packed = tensors[f"{name}.weight"].shape
        changed[f"{name}.weight_packed"] = torch.zeros(rows, packed // 4, dtype=torch.int32)
        changed[f"{name}.weight_scale"] = torch.ones(rows, packed // 64, dtype=torch.bfloat16)
        changed[f"{name}.weight_shape"] = torch.tensor([rows, 2 * packed])
    folder = write_tiny(tmp_path, changed)
    problems = failed(inspect_folder(folder).problems)
    assert {(problem.id, problem.where) for problem in problems} == {
        ("wrong-dtype", f"{name}.weight_packed") for name in modules
    }
    assert not any("download" in problem.remedy for problem in problems)
    first = "layers.0.ffn.experts.0.w1.weight_packed"
    both_refuse(folder, "wrong-dtype", first, rf"'{first}' \(I32 .*no known encoding has this dtype")
