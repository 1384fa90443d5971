"""The tool that writes layers for vLLM: they are inspected without a finding, run, and no two experts are alike."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from flash_layers import main

from ownpath.cli import main as ownpath
from ownpath.config import EngineConfig
from ownpath.loading import load_model
from ownpath.model.batch import ForwardBatch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flash") / "layers"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["flash_layers.py", str(folder), "--widths", "tiny"])
        assert main() == 0
    return folder


def test_inspect_finds_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ownpath(["inspect", str(folder)]) == 0
    told = capsys.readouterr().out
    assert "no problems found" in told
    assert "gate and up share a global scale: 32 of 32 experts" in told
    assert "layers.{0-3}.attn.wo_a" in told


def test_the_config_says_what_stock_vllm_asks_for(folder: Path) -> None:
    fields = json.loads((folder / "config.json").read_text())
    assert fields["quantization_config"]["quant_method"] == "fp8"
    assert fields["quantization_config"]["moe_quant_algo"] == "NVFP4"
    assert (fields["compress_ratios"], fields["num_hash_layers"]) == ([0, 4, 128, 4], 1)


def test_no_two_experts_are_alike(folder: Path) -> None:
    stored = {key: value for shard in folder.glob("*.safetensors") for key, value in load_file(shard).items()}
    codes = {key: value for key, value in stored.items() if ".experts." in key and value.dtype == torch.uint8}
    assert len({value.numpy().tobytes() for value in codes.values()}) == len(codes) == 4 * 8 * 3


@torch.inference_mode()
def test_streams_and_logits_keep_their_size(folder: Path) -> None:
    """Neither dies out nor explodes in four layers, so that an error stays visible."""
    model = load_model(folder, EngineConfig(max_model_len=256))
    batch = ForwardBatch.of([(list(range(50, 200)), model.new_cache())], "cpu", all_logits=True)
    logits = model.forward(batch)
    assert logits.isfinite().all()
    assert 0.1 < float(logits.std()) < 10
    assert len(set(logits.argmax(-1).tolist())) > 50
