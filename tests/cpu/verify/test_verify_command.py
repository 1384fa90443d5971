"""``ownpath verify``: the stages in order, the exit code, and both forms of the report."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.broken import change_tensors
from support.pages import verification_text

from ownpath.cli import main
from ownpath.config import EngineConfig
from ownpath.finding import Finding, Verdict
from ownpath.terminal.progress import Progress, time_left
from ownpath.verify import run as run_module
from ownpath.verify.checks import TITLES
from ownpath.verify.report import checkpoint_digest, first_bad_layer, report_dict, worst_layer
from ownpath.verify.run import STAGES, StageResult, Verification, VerifyJob, verify
from ownpath.verify.subject import Selection


def break_a_scale(folder: Path) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors["layers.2.ffn.experts.1.w3.weight_scale"].view(torch.uint8)[0, 1] = 0x7F

    change_tensors(folder, poison)


def test_an_intact_model_passes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """test_mutations has what passes every stage."""
    assert main(["verify", str(folder), "--stages", "file,environment,load"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].endswith(": PASS")
    assert "first bad layer  none" in out
    ids = [line.split()[1] for line in out.splitlines() if line.startswith(("pass ", "skipped "))]
    assert ids == sorted(set(ids), key=ids.index)
    assert {"F01", "F12", "E01", "E04", "L01", "L04"} <= set(ids) <= set(TITLES)


def test_the_embedded_model_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--stages", "file"]) == 0
    assert capsys.readouterr().out.startswith("tiny-v4 on cpu")


def test_a_failed_file_stage_stops_the_others_unless_asked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    break_a_scale(folder)
    argv = ["verify", str(folder), "--stages", "file,load"]
    assert main(argv) == 1
    out = capsys.readouterr().out
    key = "layers.2.ffn.experts.1.w3.weight_scale"
    assert out.splitlines()[0].endswith(": FAIL")
    assert "first bad layer  layers.2" in out
    assert f"FAIL F07 {key}: " in out
    assert "     remedy: export again" in out
    assert "not run          stage load: the file stage failed" in out
    assert main([*argv, "--keep-going"]) == 1
    assert f"FAIL L01 {key}: not loaded" in capsys.readouterr().out
    assert main([*argv[:-1], "file,load,layers"]) == 1
    assert "not run          stages load and layers: the file stage failed" in capsys.readouterr().out


def test_a_stage_runs_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    break_a_scale(folder)
    assert main(["verify", str(folder), "--stages", "load", "--layers", "0,3-4"]) == 0
    out = capsys.readouterr().out
    assert "limited to       layers 0, 3, 4" in out
    assert main(["verify", str(folder), "--stages", "load", "--layers", "2"]) == 1


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_what_cannot_be_read_is_exit_code_2(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / name).write_text("{")
    assert main(["verify", str(folder)]) == 2
    out = capsys.readouterr().out
    assert "unreadable       " in out
    assert ("FAIL F11 config.json" if name == "config.json" else "FAIL F01") in out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["/no/such/folder"], "no such model folder"),
        (["--stages", "file,nothing"], "there is no stage 'nothing'"),
        (["--stages", "load", "--layers", "9"], "layer 9: the model has layers 0 to 3"),
        (["--device", "tpu"], "device 'tpu' is none of cpu, cuda and cuda:N"),
        (["--source", "/no/such/folder"], "no such model folder"),
    ],
)
def test_wrong_usage_is_exit_code_2(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", *argv]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("text", ["3-", "-3", "5-3", "x", "0,,2", "1-99999999999"])
def test_layers_that_are_none_are_refused(text: str) -> None:
    assert main(["verify", f"--layers={text}"]) == 2


def test_the_report_for_programs(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    argv = ["verify", str(folder), "--layers", "1", "--experts", "2", "--seed", "7"]
    assert main([*argv, "--json", str(path)]) == 0
    text = capsys.readouterr().out
    assert main([*argv, "--json", "-"]) == 0
    printed, written = json.loads(capsys.readouterr().out), json.loads(path.read_text(encoding="utf-8"))
    assert text.startswith("model on cpu"), "a file does not take the place of the table"
    for report in (printed, written):
        assert report["verdict"] == "pass"
        assert report["selection"] == {"layers": [1], "num_experts": 2, "seed": 7}
        assert [stage["name"] for stage in report["stages"]] == list(STAGES)
        assert len(report["checkpoint_digest"]) == len(report["plan_digest"]) == 64
        assert report["counts"]["fail"] == 0
        assert report["kernels"]["ref.nvfp4_moe"] == 5
        assert report["versions"]["torch"] == torch.__version__
        fields = {"id", "where", "verdict", "message", "number", "allowed", "remedy", "kernel"}
        assert all(set(finding) == fields for stage in report["stages"] for finding in stage["findings"])
    assert printed["checkpoint_digest"] == written["checkpoint_digest"]


def test_what_runs_is_held_against_a_plan_of_before(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(folder), "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    path = tmp_path / "before.json"
    path.write_text(json.dumps(written))
    argv = ["verify", str(folder), "--stages", "ledger", "--layers", "1", "--ledger", str(path)]
    assert main(argv) == 0
    assert "LG03" in capsys.readouterr().out
    changed = next(op for op in written["ops"] if op["slot"] == "layers.1.attn.queries")
    changed["kernel"] = "cute.fp8_linear_sm90"
    path.write_text(json.dumps(written))
    assert main(argv) == 1
    assert "FAIL LG01 layers.1.attn.queries" in capsys.readouterr().out
    path.write_text("[]")
    assert main(argv) == 2
    assert "before.json: expected a JSON object, found list" in capsys.readouterr().err


def test_the_digest_tells_exports_apart(folder: Path) -> None:
    before = checkpoint_digest(folder)
    assert checkpoint_digest(folder) == before
    change_tensors(folder, lambda tensors: tensors.update(stray=torch.zeros(1)))
    assert checkpoint_digest(folder) != before


def stage_of(*found: Finding, error: Exception | None = None):
    def stage(_job: VerifyJob, _progress: object) -> Iterator[Finding]:
        yield from found
        if error is not None:
            raise error

    return stage


def test_a_device_that_gives_up_leaves_what_was_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = Finding("L01", "layers.0", Verdict.PASS, "")
    stages = {"load": stage_of(good, error=RuntimeError("CUDA error: misaligned address\nmore"))}
    monkeypatch.setattr(run_module, "STAGES", stages)
    result = verify(VerifyJob(folder), stages)
    assert result.findings[0] is good
    assert (result.findings[1].id, result.findings[1].where) == ("RUN", "stage load")
    assert result.findings[1].message == "did not end: CUDA error: misaligned address"
    assert not result.passed


def test_a_plan_that_cannot_be_made_fails_the_stages_that_need_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ownpath.plan.errors import PlanError

    monkeypatch.setattr(run_module, "STAGES", {"load": stage_of(error=PlanError("head: no kernel"))})
    result = verify(VerifyJob(folder), ["load"])
    assert not result.passed
    assert result.stages[0].skipped == "there is no plan: head: no kernel"
    assert not result.unreadable, "this folder can be read"


def v01(layer: int, number: float, verdict: Verdict = Verdict.PASS) -> Finding:
    return Finding("V01", f"layers.{layer}.attn", verdict, "", number, "<= 0.01")


def test_first_bad_and_worst_layers() -> None:
    found = [v01(2, 0.1), v01(10, 0.4, Verdict.FAIL), v01(9, 0.3, Verdict.FAIL), v01(1, float("nan"), Verdict.FAIL)]
    assert first_bad_layer(found[:3]) == "layers.9"
    assert first_bad_layer([found[0], Finding("L02", "mtp.0.norm.weight", Verdict.FAIL, "")]) == "mtp.0"
    worst = worst_layer(found[:3])
    assert worst is not None
    assert worst[0] == "layers.10"
    worst = worst_layer(found)
    assert worst is not None
    assert worst[0] == "layers.1", "NaN is the worst"
    assert worst_layer([]) is None


def test_many_failures_are_counted_and_strange_numbers_are_json(folder: Path) -> None:
    found = tuple(v01(layer, float("inf"), Verdict.FAIL) for layer in range(11))
    job = VerifyJob(folder, EngineConfig(), Selection())
    result = Verification(job, (StageResult("layers", found, 1.0),))
    text = verification_text(result)
    assert text.count("FAIL V01 layers.") == 8
    assert "FAIL V01 and 3 more" in text
    assert json.dumps(report_dict(result), allow_nan=False).count('"inf"') == 12


@pytest.mark.parametrize(
    ("done", "total", "seconds", "text"),
    [(0, 43, 0.0, ""), (1, 43, 2.0, "1 min 24 s left"), (42, 43, 84.0, "2.0 s left"), (43, 43, 86.0, "")],
)
def test_time_left(done: int, total: int, seconds: float, text: str) -> None:
    assert time_left(done, total - done, seconds) == text


def test_progress_is_silent_where_nothing_can_be_written_over(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("load") as progress:
        progress(0, 43, "layers.0")
    assert capsys.readouterr().err == ""
