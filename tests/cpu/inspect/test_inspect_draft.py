"""``ownpath inspect --draft``: the MTP module is looked at as the backbone is; otherwise it is counted as not read."""

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu.server.model_folder import write_model_folder
from support.broken import Tensors, change_tensors

from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.names import draft_params
from ownpath.checkpoint.problems import REMEDIES
from ownpath.cli import main
from ownpath.config import EngineConfig, ModelConfig
from ownpath.inspect.inspection import inspect_folder
from ownpath.loading import load_model, plan_model
from ownpath.plan.opspec import draft_ops
from ownpath.weights.load import load_weights

EXPERT = "mtp.0.ffn.experts.3.w2"


NATIVE, NVFP4 = "deepseek-native", "modelopt-experts-only"


def report(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    main(["inspect", str(folder), "--json", *options])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def problems(folder: Path) -> set[tuple[str, str]]:
    found = inspect_folder(folder, with_draft=True).problems
    return {(problem.id, problem.where) for problem in found}


def test_rows_parameters_and_bytes_are_the_drafts_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model_folder(tmp_path, NATIVE)
    without, found = report(tmp_path, capsys), report(tmp_path, capsys, "--draft")
    assert without["problems"] == found["problems"] == []
    assert without["not_read"] == {"MTP draft: drafting was not asked for": 87}
    assert found["not_read"] == {}
    rows = {row["modules"]: row for row in found["modules"]}
    assert rows.keys() > {row["modules"] for row in without["modules"]}
    assert not any(row["modules"].startswith("mtp.") for row in without["modules"])
    experts, projection = rows["mtp.0.ffn.experts.{0-7}.w1"], rows["mtp.0.e_proj"]
    assert (experts["encoding"], experts["format"], experts["num_modules"]) == ("native-mxfp4", "MXFP4", 8)
    assert experts["num_bytes"] == 8 * (64 * 64 // 2 + 64 * 64 // 32)
    assert (projection["encoding"], projection["shape"]) == ("native-fp8-block", [64, 64])
    assert rows["layers.{0-4}.ffn.experts.{0-7}.w1"]["format"] == "NVFP4"
    config = ModelConfig.from_file(tmp_path / "config.json")
    shapes = [module.shape for op in draft_ops(config) for module in op.modules]
    shapes += [param.shape for param in draft_params(config)]
    assert found["num_parameters"] - without["num_parameters"] == sum(map(prod, shapes))
    assert sum(found["bytes_by_format"].values()) == found["num_bytes"] == without["num_bytes"]


def test_the_memory_is_what_a_model_with_its_draft_takes(tmp_path: Path) -> None:
    write_model_folder(tmp_path, NATIVE)
    for loads_draft in (False, True):
        findings = inspect_folder(tmp_path, with_draft=loads_draft).contents
        assert findings is not None
        (cpu,) = (memory for memory in findings.memory if memory.device == "CPU")
        model = load_model(tmp_path, EngineConfig(max_model_len=cpu.num_tokens, loads_draft=loads_draft))
        assert cpu.cache_bytes == model.new_cache().num_bytes()
        plan = plan_model(tmp_path, "cpu", loads_draft=loads_draft)
        weights = load_weights(plan, CheckpointIndex.open(tmp_path), torch.device("cpu"))
        buffers = [buffer for operand in weights.operands for group in operand.buffers.values() for buffer in group]
        # Each of the draft's E8M0 scales, one for 32 weights, becomes two of E4M3's when it is loaded.
        num_recast = 3 * 8 * 64 * 64 // 32 if loads_draft else 0
        stored = sum(buffer.nbytes for buffer in (*buffers, *weights.params.values()))
        assert cpu.weights_bytes == stored + num_recast


def test_its_scales_are_checked_as_the_backbones(tmp_path: Path) -> None:
    write_model_folder(tmp_path, NVFP4)
    assert problems(tmp_path) == set()

    def change(tensors: Tensors) -> None:
        tensors[f"{EXPERT}.weight_scale_2"] = torch.tensor(21504.0)
        tensors["mtp.0.ffn.experts.1.w1.weight_scale_2"] *= 2
        tensors["mtp.0.ffn.experts.2.w1.input_scale"] = torch.tensor(1e-9)
        tensors["mtp.0.ffn.experts.4.w3.weight_scale"].view(torch.uint8)[1, 2] = 0xFF
        tensors["mtp.0.attn.wkv.scale"].view(torch.uint8)[:] = 0
        del tensors["mtp.0.hc_head_fn"]

    change_tensors(tmp_path, change)
    assert problems(tmp_path) == {
        ("reciprocal-scale", f"{EXPERT}.weight_scale_2"),
        ("gate-up-scale", "mtp.0.ffn.experts.1"),
        ("out-of-band-scale", "mtp.0.ffn.experts.2.w1.input_scale"),
        ("block-scale", "mtp.0.ffn.experts.4.w3.weight_scale"),
        ("zero-block-scale", "mtp.0.attn.wkv.scale"),
        ("missing-tensor", "mtp.0.hc_head_fn"),
    }
    assert inspect_folder(tmp_path).problems == ()


def test_experts_of_the_draft_must_agree(tmp_path: Path) -> None:
    write_model_folder(tmp_path, NATIVE)

    def change(tensors: Tensors) -> None:
        del tensors[f"{EXPERT}.scale"]
        tensors[f"{EXPERT}.weight"] = torch.ones(64, 64, dtype=torch.bfloat16)

    change_tensors(tmp_path, change)
    assert problems(tmp_path) == {("mixed-experts", EXPERT)}


def test_calibration_counts_the_drafts_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model_folder(tmp_path, NVFP4)
    counts = [report(tmp_path, capsys, *options)["calibration"]["w1"] for options in ((), ("--draft",))]
    assert [sum(count.values()) for count in counts] == [5 * 8, 6 * 8]
    pairs = [report(tmp_path, capsys, *options)["gate_up"]["num_pairs"] for options in ((), ("--draft",))]
    assert pairs == [5 * 8, 6 * 8]


@pytest.mark.parametrize("kind", ["none", "DSpark"])
def test_a_draft_that_cannot_be_read_is_one_problem(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The backbone is inspected all the same."""
    if kind == "none":
        write_model_folder(tmp_path)
    else:
        write_model_folder(tmp_path, NATIVE)
        change_tensors(tmp_path, lambda tensors: tensors.update({"mtp.0.main_norm.weight": torch.zeros(64)}))
    assert main(["inspect", str(tmp_path)]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path), "--draft"]) == 1
    out = capsys.readouterr().out
    assert "\n1 problem:\n  [draft] " in out
    assert f"    remedy: {REMEDIES['draft']}\n" in out
    assert problems(tmp_path) == {("draft", "mtp")}
    assert "memory on CPU: " in out


def test_a_count_of_modules_that_no_checkpoint_holds_ends_at_once(tmp_path: Path) -> None:
    write_model_folder(tmp_path, NATIVE)
    fields = json.loads((tmp_path / "config.json").read_text()) | {"num_nextn_predict_layers": 2**31 - 1}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert inspect_folder(tmp_path).problems == ()
    assert problems(tmp_path) == {("config-contradiction", "n_routed_experts")}
    with pytest.raises(ValueError, match=r"'mtp\.1\.e_proj\.weight' is missing"):
        plan_model(tmp_path, "cpu", loads_draft=True)
