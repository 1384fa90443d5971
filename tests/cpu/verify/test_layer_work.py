"""A run that was stopped goes on behind the last layer it finished, and says the same as one that was not."""

from pathlib import Path

import pytest
from support.checkpoints import random_checkpoint

from ownpath.config import EngineConfig
from ownpath.finding import Finding
from ownpath.verify import layer_stage as stage
from ownpath.verify.layer import LoadedLayer, load_layer
from ownpath.verify.layers.measure import Measurement
from ownpath.verify.layers.work import FILE_NAME
from ownpath.verify.subject import Selection, Subject


class Stopped(Exception):
    pass


class Run:
    """A stage's findings, rows, progress and the layers it loaded; ``stop_at``: the layer at which it is stopped."""

    def __init__(
        self, subject: Subject, work: Path | None, monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None
    ) -> None:
        self.loaded: list[int] = []
        self.said: list[tuple[int, int, str]] = []
        self.rows: list[Measurement] = []
        self.findings: list[Finding] = []
        self.stop_at = stop_at
        monkeypatch.setattr(stage, "load_layer", self.load)
        try:
            for finding in stage.layer_stage(subject, self.progress, work, self.rows.append):
                self.findings.append(finding)
        except Stopped:
            assert stop_at is not None

    def load(self, subject: Subject, layer_idx: int) -> LoadedLayer:
        self.loaded.append(layer_idx)
        return load_layer(subject, layer_idx)

    def progress(self, done: int, total: int, name: str) -> None:
        self.said.append((done, total, name))
        if done == self.stop_at:
            raise Stopped


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("work"), "full-nvfp4", seed=31).folder


@pytest.mark.parametrize("layer_ids", [None, frozenset({2, 4})], ids=["all", "chosen"])
def test_a_stopped_run_goes_on(
    layer_ids: frozenset[int] | None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = Subject.of(folder, EngineConfig(), Selection(layer_ids))
    whole = Run(subject, None, monkeypatch)
    first = Run(subject, tmp_path, monkeypatch, stop_at=3)
    second = Run(subject, tmp_path, monkeypatch)
    assert first.loaded + second.loaded == whole.loaded
    assert max(first.loaded) == 2
    assert "going on behind layers.2" in second.said[0][2]
    assert second.findings == whole.findings
    assert second.rows == whole.rows
    third = Run(subject, tmp_path, monkeypatch)
    assert not third.loaded, "every layer is done"
    assert third.findings == whole.findings


def test_the_state_of_another_run_is_not_used(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Run(Subject.of(folder, EngineConfig(), Selection(frozenset({0}))), tmp_path, monkeypatch)
    for engine, selection in (
        (EngineConfig(), Selection(frozenset({0}), num_experts=2)),
        (EngineConfig(max_model_len=200), Selection(frozenset({0}), num_experts=2)),
    ):
        run = Run(Subject.of(folder, engine, selection), tmp_path, monkeypatch)
        assert run.loaded == [0]
        assert "another run" in run.said[0][2]
        assert "starting anew" in run.said[0][2]


def test_a_checkpoint_that_was_written_anew_is_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, work = tmp_path / "model", tmp_path / "work"
    random_checkpoint(folder, "bf16", seed=1)
    chosen = Selection(frozenset({0}))
    Run(Subject.of(folder, EngineConfig(), chosen), work, monkeypatch)
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes())
    assert Run(Subject.of(folder, EngineConfig(), chosen), work, monkeypatch).loaded == [0]


def test_a_torn_file_is_not_used(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject.of(folder, EngineConfig(), Selection(frozenset({0})))
    whole = Run(subject, tmp_path, monkeypatch)
    path = tmp_path / FILE_NAME
    path.write_bytes(path.read_bytes()[:1000])
    again = Run(subject, tmp_path, monkeypatch)
    assert again.loaded == [0]
    assert again.findings == whole.findings


def test_nothing_else_lies_in_the_work_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Run(Subject.of(folder, EngineConfig(), Selection(frozenset({1}))), tmp_path / "new", monkeypatch)
    assert [path.name for path in (tmp_path / "new").iterdir()] == [FILE_NAME]
