"""A stage that was stopped does not look again at the layers that it was done with."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from support.broken import change_tensors
from support.checkpoints import random_checkpoint

from ownpath.config import EngineConfig
from ownpath.finding import Finding, Verdict
from ownpath.verify import kernel_stage, load_stage
from ownpath.verify.kept import Kept
from ownpath.verify.progress import Progress
from ownpath.verify.subject import Selection, Subject

Stage = Callable[[Subject, Progress, Path | None], Iterator[Finding]]
STAGES = {"load": load_stage.load_stage, "kernels": kernel_stage.kernel_stage}
PASSED = Finding("K01", "layers.0", Verdict.PASS, "fine", float("nan"), "1")
FAILED = replace(PASSED, verdict=Verdict.FAIL)


def quiet(done: int, total: int, name: str) -> None:
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("kept"), "full-nvfp4", seed=5).folder


def subject_of(folder: Path, layer_ids: frozenset[int] = frozenset({0, 1})) -> Subject:
    return Subject.of(folder, EngineConfig(), Selection(layer_ids))


@pytest.mark.parametrize("name", STAGES)
def test_a_stopped_stage_goes_on_behind_its_last_layer(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, module = STAGES[name], {"load": load_stage, "kernels": kernel_stage}[name]
    part = "_part_findings" if name == "load" else "_part"
    look = getattr(module, part)
    looked_at: list[str] = []

    def counted(*args: object) -> Iterator[Finding]:
        looked_at.append(next(str(arg) for arg in args if isinstance(arg, str)))
        yield from look(*args)

    monkeypatch.setattr(module, part, counted)
    whole = list(stage(subject_of(folder), quiet, None))
    num_first = sum(finding.where.startswith("layers.0") for finding in whole)
    assert 0 < num_first < len(whole)
    looked_at.clear()
    stopped = stage(subject_of(folder), quiet, tmp_path)
    assert list(islice(stopped, num_first + 1)) == whole[: num_first + 1]
    stopped.close()
    assert list(stage(subject_of(folder), quiet, tmp_path)) == whole
    assert looked_at == ["layers.0", "layers.1", "layers.1"]
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}.json"]


def test_what_failed_is_looked_at_again(folder: Path, tmp_path: Path) -> None:
    kept = Kept.of(tmp_path, "load", subject_of(folder))
    assert [f.verdict for f in kept.part("layers.0", lambda: iter([PASSED, FAILED]))] == [Verdict.PASS, Verdict.FAIL]
    assert list(Kept.of(tmp_path, "load", subject_of(folder)).part("layers.0", lambda: iter([]))) == []
    list(kept.part("layers.1", lambda: iter([PASSED])))
    (again,) = Kept.of(tmp_path, "load", subject_of(folder)).part("layers.1", lambda: iter([FAILED]))
    assert repr(again) == repr(PASSED), "a number that is none comes back too"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"key": 1}', "no JSON"])
def test_a_torn_file_is_not_used(text: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "load.json").write_text(text, encoding="utf-8")
    assert Kept.of(tmp_path, "load", subject_of(folder)).parts == {}


def test_another_checkpoint_selection_or_engine_has_another_key(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "model", "full-nvfp4", seed=6).folder
    subjects = [subject_of(folder), subject_of(folder, frozenset({0}))]
    subjects.append(Subject.of(folder, EngineConfig(dtype=torch.bfloat16), Selection(frozenset({0, 1}))))
    keys = [Kept.of(tmp_path, "load", subject).key for subject in subjects]
    change_tensors(folder, lambda tensors: tensors["norm.weight"].mul_(2))
    keys.append(Kept.of(tmp_path, "load", subject_of(folder)).key)
    assert len(set(keys)) == 4
