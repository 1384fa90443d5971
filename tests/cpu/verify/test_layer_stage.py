"""Intact checkpoints pass, whatever their export, seed, dtype and numerics; every planned slot is compared."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import THREE_LAYERS, random_checkpoint
from support.slots import slots_apart

from ownpath.checkpoint.errors import CheckpointError
from ownpath.config import EngineConfig
from ownpath.finding import Finding, Verdict, failed
from ownpath.model.block import Residual
from ownpath.official import OFFICIAL
from ownpath.verify import layer_stage as stage
from ownpath.verify.layer import LoadedLayer, load_layer
from ownpath.verify.layers import end_to_end
from ownpath.verify.layers.measure import Measurement
from ownpath.verify.subject import Selection, Subject

PER_LAYER = ("V01", "V02", "V03", "V05", "V08", "V09", "V10")
IN_BFLOAT16 = ("full-nvfp4", "deepseek-native", "compressed-tensors", "fp8-experts")
ONCE = {("V11", "mtp"), ("V12", "mtp"), ("V01", "embed"), ("V01", "head"), ("V03", "streams"), ("V04", "logits")}


def run(
    folder: Path, engine: EngineConfig | None = None, selection: Selection | None = None
) -> tuple[list[Finding], list[Measurement], Subject]:
    subject = Subject.of(folder, engine or EngineConfig(), selection)
    seen = list(stage.layer_stage(subject))
    findings = [found for found in seen if isinstance(found, Finding)]
    return findings, [found for found in seen if isinstance(found, Measurement)], subject


def assert_complete(findings: list[Finding], rows: list[Measurement], subject: Subject) -> None:
    """Nothing failed, and nothing was left out."""
    assert not failed(findings), failed(findings)
    seen = {(finding.id, finding.where) for finding in findings}
    layers = {(check, f"layers.{idx}") for check in PER_LAYER for idx in range(subject.config.num_hidden_layers)}
    assert seen == layers | ONCE
    compared = {f"layers.{row.layer_idx}.{row.slot}" for row in rows} | {"hc_head", "head"}
    for slot in slots_apart(subject.plan):
        if ".decode." in slot:
            continue  # V05's steps run through them; K11 looks at each
        assert any(name == slot or name.startswith(f"{slot}.") for name in compared), f"{slot} was not compared"
    assert all(0 < row.budget < 1 and row.is_within for row in rows)


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        *((layout, {"dtype": torch.bfloat16}) for layout in IN_BFLOAT16[:2]),
        *(pytest.param(layout, {"dtype": torch.bfloat16}, marks=pytest.mark.slow) for layout in IN_BFLOAT16[2:]),
        ("full-nvfp4", {"official": OFFICIAL}),
        ("full-nvfp4", {"dtype": torch.float64}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_other_numerics_pass(layout: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """In float32, the intact checkpoints of test_mutations pass."""
    random_checkpoint(tmp_path, layout, seed=5, **THREE_LAYERS)
    findings, rows, subject = run(tmp_path, EngineConfig(**changes))
    assert_complete(findings, rows, subject)
    keys = [finding for finding in findings if finding.id == "V10"]
    wanted = Verdict.PASS if "official" in changes else Verdict.SKIPPED
    assert {finding.verdict for finding in keys} == {wanted}


@pytest.mark.parametrize("max_model_len", [1, 5, 130])
def test_a_short_context_is_no_fault(max_model_len: int, tmp_path: Path) -> None:
    random_checkpoint(tmp_path, "full-nvfp4", seed=6, **THREE_LAYERS)
    assert not failed(run(tmp_path, EngineConfig(max_model_len=max_model_len))[0])


def test_chosen_layers_are_judged_as_in_a_whole_run(tmp_path: Path) -> None:
    """The reference comes as far by itself, so that the numbers are the same."""
    random_checkpoint(tmp_path, "deepseek-native", seed=7, **THREE_LAYERS)
    _, full, _ = run(tmp_path)
    findings, rows, _ = run(tmp_path, selection=Selection(frozenset({2})))
    assert rows == [row for row in full if row.layer_idx == 2 and row.slot not in ("embed", "head")]
    assert {finding.where for finding in findings if finding.verdict is not Verdict.SKIPPED} == {"layers.2", "streams"}
    (logits,) = (finding for finding in findings if finding.id == "V04")
    assert logits.verdict is Verdict.SKIPPED
    assert "1 of 3 layers" in logits.message


def test_sampled_experts_limit_the_rows_of_the_experts_alone(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, "full-nvfp4", seed=8, **THREE_LAYERS)
    layers = frozenset({1})
    _, full, _ = run(tmp_path, selection=Selection(layers))
    _, sampled, _ = run(tmp_path, selection=Selection(layers, num_experts=1, seed=3))
    assert [row for row in full if row.slot != "ffn.experts"] == [row for row in sampled if row.slot != "ffn.experts"]
    assert [row for row in full if row.slot == "ffn.experts"] != [row for row in sampled if row.slot == "ffn.experts"]


def test_a_layer_that_does_not_load_ends_the_engines_streams_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_checkpoint(tmp_path, "full-nvfp4", seed=9)

    def load(subject: Subject, layer_idx: int) -> LoadedLayer:
        if layer_idx == 1:
            raise CheckpointError("tensor 'layers.1.ffn.experts.3.w1.weight_scale_2' is 0.0")
        return load_layer(subject, layer_idx)

    monkeypatch.setattr(stage, "load_layer", load)
    findings, _, _ = run(tmp_path)
    (only,) = failed(findings)
    assert (only.id, only.where) == ("V01", "layers.1")
    assert "layers.1.ffn.experts.3.w1.weight_scale_2" in only.message
    judged = {finding.where for finding in findings if finding.id == "V02"}
    assert judged == {"layers.0", "layers.2", "layers.3", "layers.4"}
    (logits,) = (finding for finding in findings if finding.id == "V04")
    assert logits.verdict is Verdict.SKIPPED


def test_a_checkpoint_that_cannot_be_read_is_a_finding(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, "full-nvfp4", seed=10, **THREE_LAYERS)
    subject = Subject.of(tmp_path, EngineConfig())
    for shard in tmp_path.glob("*.safetensors"):
        shard.write_bytes(b"")
    (only,) = stage.layer_stage(subject)
    assert isinstance(only, Finding)
    assert only.verdict is Verdict.FAIL


def test_the_whole_model_is_judged_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that goes wrong on the engine's own streams alone, in two rows of a hundred: V04, and nothing else."""
    random_checkpoint(tmp_path, "full-nvfp4", seed=11, **THREE_LAYERS)
    right = end_to_end.ModelEnds.logits

    def wrong(ends: end_to_end.ModelEnds, residual: Residual) -> torch.Tensor:
        logits = right(ends, residual)
        if residual.y_TD is not None:
            logits[::50] = logits[::50].roll(1, dims=1)
        return logits

    monkeypatch.setattr(end_to_end.ModelEnds, "logits", wrong)
    (only,) = failed(run(tmp_path, EngineConfig(max_model_len=200))[0])
    assert (only.id, only.where) == ("V04", "logits")
    assert only.number is not None
    assert only.number > 1e-3
