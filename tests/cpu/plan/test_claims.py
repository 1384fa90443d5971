"""config.json against the tensors: what it says is confirmed or reported, and never believed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import random_checkpoint

from ownpath.cli import main
from ownpath.config import EngineConfig, ModelConfig
from ownpath.loading import default_model_dir, load_model, plan_model

SMALLER = {"num_hidden_layers": 2, "compress_ratios": [0, 4]}
DEEPSEEK: dict[str, Any] = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}
NVIDIA = DEEPSEEK | {"quant_algo": "MIXED_PRECISION", "moe_quant_algo": "NVFP4", "group_size": 16}
OLDER_NVIDIA = DEEPSEEK | {"quant_algo": None, "moe_quant_algo": None}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "mixed-precision"}
MORE = " and 47 more alike"
EXPERT = "'layers.0.ffn.experts.0.w1'"


def contradictions(folder: Path, **claims: Any) -> tuple[str, ...]:
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | claims))
    return plan_model(folder, "cpu").contradictions


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exports")
    layouts = ("modelopt-experts-only", "full-nvfp4", "compressed-tensors", "deepseek-native", "bf16")
    for layout in layouts:
        random_checkpoint(root / layout, layout, **SMALLER)
    random_checkpoint(root / "float-scales", "modelopt-experts-only", fp8_scale=torch.float32, **SMALLER)
    return {path.name: path for path in root.iterdir()}


@pytest.mark.parametrize(
    ("layout", "claims"),
    [
        ("modelopt-experts-only", {"quantization_config": NVIDIA, "expert_dtype": "fp4"}),
        ("modelopt-experts-only", {"quantization_config": OLDER_NVIDIA}),
        ("full-nvfp4", {"quantization_config": NVIDIA | {"quant_method": "modelopt"}}),
        ("compressed-tensors", {"quantization_config": COMPRESSED, "expert_dtype": "fp4"}),
        ("deepseek-native", {"quantization_config": DEEPSEEK, "expert_dtype": "fp4"}),
        ("deepseek-native", {"quantization_config": DEEPSEEK | {"expert_dtype": "fp4"}, "expert_dtype": None}),
        ("bf16", {}),
        ("bf16", {"quantization_config": None, "expert_dtype": "bf16"}),
        ("bf16", {"quantization_config": {"quant_method": "of another kind", "moe_quant_algo": 7}}),
    ],
)
def test_what_the_exports_write_is_confirmed(layout: str, claims: dict[str, Any], folders: dict[str, Path]) -> None:
    fresh = {"quantization_config": None, "expert_dtype": None}
    assert contradictions(folders[layout], **fresh | claims) == ()


@pytest.mark.parametrize(
    ("layout", "claims", "line"),
    [
        (
            "deepseek-native",
            {"quantization_config": NVIDIA},
            f"quantization_config.moe_quant_algo is 'NVFP4', but {EXPERT} is stored as MXFP4 (native-mxfp4)" + MORE,
        ),
        (
            "bf16",
            {"quantization_config": DEEPSEEK},
            "quantization_config.quant_method is 'fp8', but 'layers.0.attn.wq_a' is stored as BF16 (bf16)"
            " and 62 more alike",
        ),
        (
            "modelopt-experts-only",
            {"quantization_config": COMPRESSED},
            "quantization_config.quant_method is 'compressed-tensors', but no tensor is stored as "
            "compressed-tensors-nvfp4 or compressed-tensors-fp8-block or compressed-tensors-mxfp4 or "
            "compressed-tensors-mxfp8",
        ),
        (
            "bf16",
            {"expert_dtype": "fp4"},
            f"expert_dtype is 'fp4', but {EXPERT} is stored as BF16 (bf16) and 47 more alike",
        ),
        (
            "full-nvfp4",
            {"quantization_config": {"expert_dtype": "fp8"}},
            f"quantization_config.expert_dtype is 'fp8', but {EXPERT} is stored as NVFP4 (modelopt-nvfp4)" + MORE,
        ),
        (
            "float-scales",
            {"quantization_config": NVIDIA},
            "quantization_config.scale_fmt is 'ue8m0', but the scale 'layers.0.attn.wq_a.scale' is F32",
        ),
        (
            "deepseek-native",
            {"quantization_config": DEEPSEEK | {"weight_block_size": [32, 32]}},
            "quantization_config.weight_block_size is [32, 32], but 'layers.0.attn.wq_a' has a scale per 128 x 128",
        ),
    ],
)
def test_a_contradiction_names_the_field_and_the_tensor(
    layout: str, claims: dict[str, Any], line: str, folders: dict[str, Path]
) -> None:
    fresh = {"quantization_config": None, "expert_dtype": None}
    assert contradictions(folders[layout], **fresh | claims) == (f"config.json: {line}",)


def test_a_contradiction_is_a_warning_and_the_model_runs(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folders["bf16"]
    (line,) = contradictions(folder, quantization_config=None, expert_dtype="fp4")
    assert load_model(folder, EngineConfig(max_model_len=16)).contradictions == (line,)
    assert main(["plan", str(folder)]) == 0
    assert capsys.readouterr().out.endswith(f"warning: {line}; the tensors are believed\n")
    assert main(["plan", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["contradictions"] == [line]


def test_generate_warns_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(default_model_dir(), tmp_path / "model")
    contradictions(tmp_path / "model", expert_dtype="fp8")
    assert main(["generate", str(tmp_path / "model"), "2 + 2 =", "--max-tokens", "1"]) == 0
    stored = f"{EXPERT} is stored as NVFP4 (modelopt-nvfp4) and 95 more alike"
    warning = f"warning: config.json: expert_dtype is 'fp8', but {stored}"
    assert capsys.readouterr().err.startswith(f"{warning}; the tensors are believed\n")


def test_the_embedded_model_is_as_its_config_says() -> None:
    assert "quantization_config" in ModelConfig.from_file(default_model_dir() / "config.json").claims
    assert plan_model(default_model_dir(), "cpu").contradictions == ()
