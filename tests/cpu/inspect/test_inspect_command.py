"""``ownpath inspect``: what it prints, the keys of its JSON, its exit codes."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from cpu.server.model_folder import VOCAB, write_model_folder
from support.broken import Tensors, change_tensors
from support.checkpoints import random_checkpoint, read_checkpoint

from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.problems import REMEDIES
from ownpath.cli import main
from ownpath.config import EngineConfig
from ownpath.inspect.inspection import inspect_folder
from ownpath.inspect.report import MAX_LINES
from ownpath.inspect.scalars import Coverage
from ownpath.loading import default_model_dir, load_model, plan_model
from ownpath.weights.load import load_weights

COMMON_KEYS = {
    *("folder", "complete", "num_tensors", "num_files", "num_bytes", "seconds", "problems"),
    *("end_tokens", "release"),
}
FOUND_KEYS = {
    *("shape", "num_parameters", "bytes_by_format", "modules", "not_read", "block_scales", "lossless_casts"),
    *("calibration", "gate_up", "magnitudes", "memory", "absent", "missing_input_scales"),
}


def test_the_embedded_model_is_clean(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect"]) == 0
    out = capsys.readouterr().out
    assert "\nno problems found\n" in out
    assert re.search(r"^layers\.\{0-3\}\.ffn\.experts\.\{0-7\}\.w1 +modelopt-nvfp4 +NVFP4 +256 x 256 +32 ", out, re.M)
    assert main(["inspect", "--all-scales"]) == 0
    assert "(all of them)" in capsys.readouterr().out


def test_the_json_of_the_embedded_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == COMMON_KEYS | FOUND_KEYS
    assert found["complete"] is True
    assert found["problems"] == []
    files = list(default_model_dir().glob("*.safetensors"))
    assert found["num_files"] == len(files) == 4
    decoded = read_checkpoint(default_model_dir()).decoded
    backbone = {name: tensor for name, tensor in decoded.items() if not name.startswith("mtp.")}
    floats = {name: tensor for name, tensor in backbone.items() if tensor.is_floating_point()}
    assert found["num_parameters"] == sum(tensor.numel() for tensor in floats.values())
    assert found["num_bytes"] == sum(found["bytes_by_format"].values())
    headers = [int.from_bytes(file.open("rb").read(8), "little") for file in files]
    assert found["num_bytes"] == sum(file.stat().st_size for file in files) - sum(headers) - 8 * len(files)
    assert [memory["device"] for memory in found["memory"]] == ["CPU", "sm_90", "sm_100"]


def test_the_memory_is_what_a_loaded_model_takes(folder: Path) -> None:
    """On CPU: the operands' and tables' bytes after loading, and one sequence's caches."""
    findings = inspect_folder(folder).contents
    assert findings is not None
    (cpu,) = (memory for memory in findings.memory if memory.device == "CPU")
    model = load_model(folder, EngineConfig(max_model_len=cpu.num_tokens))
    assert cpu.cache_bytes == model.new_cache().num_bytes()
    weights = load_weights(plan_model(folder, "cpu"), CheckpointIndex.open(folder), torch.device("cpu"))
    buffers = [buffer for operand in weights.operands for group in operand.buffers.values() for buffer in group]
    assert cpu.weights_bytes == sum(buffer.nbytes for buffer in (*buffers, *weights.params.values()))


def test_problems_have_an_exit_code_a_line_and_a_remedy(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = [f"layers.1.ffn.experts.{e}.{w}.weight_scale_2" for e in range(8) for w in ("w1", "w2")]
    change_tensors(folder, lambda tensors: [tensors.pop(key) for key in keys])
    assert main(["inspect", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "\n16 problems:\n" in out
    assert out.count("\n  [missing-tensor] ") == MAX_LINES + 1
    assert f"[missing-tensor] and {16 - MAX_LINES} more" in out
    assert f"    remedy: {REMEDIES['missing-tensor']}\n" in out
    assert main(["inspect", str(folder), "--json"]) == 1
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert {problem["where"] for problem in problems} == set(keys)
    assert all(set(problem) == {"check", "severity", "where", "problem", "remedy"} for problem in problems)


def test_what_cannot_be_read_has_an_exit_code_of_its_own(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "config.json").write_text("{")
    assert main(["inspect", str(folder)]) == 2
    assert "[config] " in capsys.readouterr().out
    assert main(["inspect", str(folder), "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert set(found) == COMMON_KEYS
    assert found["complete"] is False


def test_no_folder_and_an_empty_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "nowhere")]) == 2
    assert "no such model folder" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path)]) == 2
    out = capsys.readouterr().out
    assert "[folder] " in out
    assert "[config] " in out


def test_names_that_a_terminal_would_act_on_are_spelled_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_tensors(folder, lambda tensors: tensors.update({"\x1b[2J\n": torch.zeros(1)}))
    assert main(["inspect", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert r"\x1b[2J\n" in out


def test_experts_that_share_the_maximum_are_told_from_those_with_their_own(folder: Path) -> None:
    """Layer 1: three of eight w2 have the layer's maximum. Layer 2: one has the maximum of all layers, as layer 3's."""
    before = inspect_folder(folder).contents
    assert before is not None
    assert before.calibration == dict.fromkeys(("w1", "w2", "w3"), Coverage(40, 0))

    def change(tensors: Tensors) -> None:
        for expert in (1, 4, 6):
            tensors[f"layers.1.ffn.experts.{expert}.w2.input_scale"] = torch.tensor(0.0625)
        for layer_idx in (2, 3):
            tensors[f"layers.{layer_idx}.ffn.experts.0.w2.input_scale"] = torch.tensor(0.125)

    change_tensors(folder, change)
    findings = inspect_folder(folder).contents
    assert findings is not None
    assert findings.calibration == {"w1": Coverage(40, 0), "w2": Coverage(35, 5), "w3": Coverage(40, 0)}


def test_a_lossless_cast_is_detected_as_loading_does(tmp_path: Path) -> None:
    """Powers of two, equal in pairs, in one layer; the other layers keep what the quantiser wrote."""
    folder = write_model_folder(tmp_path / "even")
    for file in folder.glob("model*"):
        file.unlink()
    even = {"hidden_size": 128, "moe_intermediate_size": 64}  # whole pairs of blocks in every row
    random_checkpoint(folder, "modelopt-experts-only", vocab_size=VOCAB, **even)

    def change(tensors: Tensors) -> None:
        for name in [f"layers.2.ffn.experts.{e}.{w}" for e in range(8) for w in ("w1", "w2", "w3")]:
            rows, blocks = tensors[f"{name}.weight_scale"].shape
            tensors[f"{name}.weight_scale"] = torch.full((rows, blocks), 4.0).to(torch.float8_e4m3fn)
            tensors[f"{name}.weight_scale_2"] = torch.tensor(2.0**-9)

    change_tensors(folder, change)
    inspection = inspect_folder(folder)
    assert inspection.problems == ()
    assert inspection.contents is not None
    assert inspection.contents.blocks.lossless_casts == ("layers.2.ffn.experts",)
    assert load_model(folder, EngineConfig(max_model_len=16)).lossless_casts == ("layers.2.ffn.experts",)


def test_a_sample_reads_a_page_and_all_scales_read_the_rest(folder: Path) -> None:
    sample, everything = inspect_folder(folder), inspect_folder(folder, read_all_scales=True)
    assert sample.contents is not None
    assert everything.contents is not None
    scales = [info for name, info in sample.index.tensors.items() if name.endswith((".weight_scale", ".scale"))]
    assert everything.contents.blocks.num_blocks == sum(math.prod(info.shape) for info in scales)
    assert sample.contents.blocks.num_blocks == sum(min(4096, math.prod(info.shape)) for info in scales)


@pytest.mark.parametrize(("read_all_scales", "num_problems"), [(False, 0), (True, 1)])
def test_what_a_sample_cannot_see(read_all_scales: bool, num_problems: int, tmp_path: Path) -> None:
    """The small model's scales all fit a sample, so this one has wider experts: 512 x 256/16 = 8192 scales."""
    folder = write_model_folder(tmp_path / "wide")
    for file in folder.glob("model*"):
        file.unlink()
    wide = {"hidden_size": 256, "moe_intermediate_size": 512, "num_hidden_layers": 1, "compress_ratios": [0]}
    random_checkpoint(folder, "modelopt-experts-only", vocab_size=VOCAB, n_routed_experts=3, **wide)

    def change(tensors: Tensors) -> None:
        tensors["layers.0.ffn.experts.1.w1.weight_scale"].view(torch.uint8).view(-1)[4096] = 0x7F

    change_tensors(folder, change)
    inspection = inspect_folder(folder, read_all_scales=read_all_scales)
    assert [problem.id for problem in inspection.problems] == ["block-scale"] * num_problems
