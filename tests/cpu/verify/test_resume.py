"""A stage that was stopped goes on behind the last layer that it finished, and says the same as one that was not."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from support.checkpoints import THREE_LAYERS, random_checkpoint

from ownpath.config import EngineConfig
from ownpath.finding import Finding, Verdict
from ownpath.verify import kernel_stage, layer_stage, load_stage
from ownpath.verify.layer import LoadedLayer, load_layer
from ownpath.verify.layers.measure import Measurement
from ownpath.verify.resume import FinishedParts, SavedState, digest_of, read_state, write_state
from ownpath.verify.subject import Selection, Subject

Stage = Callable[[Subject, Callable[[int, int, str], None], Path | None], Iterator[Finding]]
STAGES: dict[str, tuple[Stage, object, str]] = {
    "load": (load_stage.load_stage, load_stage, "_part_findings"),
    "kernels": (kernel_stage.kernel_stage, kernel_stage, "_part"),
}
PASSED = Finding("K01", "layers.0", Verdict.PASS, "fine", float("nan"), "1")
CPU = EngineConfig()
FAILED = replace(PASSED, verdict=Verdict.FAIL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("resume"), "full-nvfp4", seed=31, **THREE_LAYERS).folder


def subject_of(
    folder: Path, *layer_ids: int, engine: EngineConfig | None = None, experts: int | None = None
) -> Subject:
    return Subject.of(folder, engine or EngineConfig(), Selection(frozenset(layer_ids) or None, experts))


@pytest.mark.parametrize("name", STAGES)
def test_a_stopped_stage_goes_on_behind_its_last_layer(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, module, part = STAGES[name]
    look = getattr(module, part)
    looked_at: list[str] = []

    def counted(*args: object) -> Iterator[Finding]:
        looked_at.append(next(str(arg) for arg in args if isinstance(arg, str)))
        yield from look(*args)

    def quiet(_done: int, _total: int, _name: str) -> None:
        pass

    monkeypatch.setattr(module, part, counted)
    whole = list(stage(subject_of(folder, 0, 1), quiet, None))
    num_first = sum(finding.where.startswith("layers.0") for finding in whole)
    assert 0 < num_first < len(whole)
    looked_at.clear()
    stopped = stage(subject_of(folder, 0, 1), quiet, tmp_path)
    assert list(islice(stopped, num_first + 1)) == whole[: num_first + 1]
    stopped.close()  # type: ignore[attr-defined]
    assert list(stage(subject_of(folder, 0, 1), quiet, tmp_path)) == whole
    assert looked_at == ["layers.0", "layers.1", "layers.1"]
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}.safetensors"]


class Stopped(Exception):
    pass


class LayerRun:
    """The layers stage's findings, rows, progress and the layers it loaded. stop_at: the layer at which it stops."""

    def __init__(
        self, subject: Subject, work: Path | None, monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None
    ) -> None:
        self.loaded: list[int] = []
        self.said: list[tuple[int, int, str]] = []
        self.rows: list[Measurement] = []
        self.findings: list[Finding] = []
        self.stop_at = stop_at
        monkeypatch.setattr(layer_stage, "load_layer", self.load)
        try:
            for found in layer_stage.layer_stage(subject, self.progress, work):
                if isinstance(found, Measurement):
                    self.rows.append(found)
                else:
                    self.findings.append(found)
        except Stopped:
            assert stop_at is not None

    def load(self, subject: Subject, layer_idx: int) -> LoadedLayer:
        self.loaded.append(layer_idx)
        return load_layer(subject, layer_idx)

    def progress(self, done: int, total: int, name: str) -> None:
        self.said.append((done, total, name))
        if done == self.stop_at:
            raise Stopped


@pytest.mark.parametrize("layer_ids", [(), (1, 2)], ids=["all", "chosen"])
def test_stopped_layers_go_on_with_their_streams(
    layer_ids: tuple[int, ...], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = subject_of(folder, *layer_ids)
    whole = LayerRun(subject, None, monkeypatch)
    first = LayerRun(subject, tmp_path, monkeypatch, stop_at=2)
    second = LayerRun(subject, tmp_path, monkeypatch)
    assert first.loaded + second.loaded == whole.loaded
    assert max(first.loaded) == 1
    assert "going on behind layers.1" in second.said[0][2]
    assert second.findings == whole.findings
    assert second.rows == whole.rows
    third = LayerRun(subject, tmp_path, monkeypatch)
    assert not third.loaded, "every layer is done"
    assert third.findings == whole.findings
    assert [path.name for path in tmp_path.iterdir()] == ["layers.safetensors"]


def test_the_state_of_another_run_is_not_used(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    LayerRun(subject_of(folder, 0), tmp_path, monkeypatch)
    run = LayerRun(subject_of(folder, 0, experts=2), tmp_path, monkeypatch)
    assert run.loaded == [0]
    assert "another run" in run.said[0][2]
    assert "starting anew" in run.said[0][2]


def test_what_failed_is_looked_at_again(folder: Path, tmp_path: Path) -> None:
    def finished() -> FinishedParts:
        return FinishedParts.of(tmp_path, "load", subject_of(folder, 0, 1))

    parts = finished()
    assert list(parts.part("layers.0", lambda: iter([PASSED, FAILED]))) == [PASSED, FAILED]
    assert list(finished().part("layers.0", lambda: iter([]))) == []
    list(parts.part("layers.1", lambda: iter([PASSED])))
    (again,) = finished().part("layers.1", lambda: iter([FAILED]))
    assert repr(again) == repr(PASSED), "a number that is none comes back too"


@pytest.mark.parametrize("value", [None, [], {"a": 1}, {"a": [{}]}], ids=str)
def test_a_torn_file_is_not_used(value: object, folder: Path, tmp_path: Path) -> None:
    subject, path = subject_of(folder, 0), tmp_path / "load.safetensors"
    write_state(path, digest_of(subject), value)
    assert FinishedParts.of(tmp_path, "load", subject).parts == {}
    write_state(path, "key", {}, {"x": torch.ones(3)})
    assert read_state(path, "key", lambda value, tensors: len(tensors)) == (SavedState.SAME, 1)
    path.write_bytes(path.read_bytes()[:-1])
    assert read_state(path, "key", lambda value, tensors: len(tensors)) == (SavedState.OTHER, None)


def test_another_checkpoint_selection_or_engine_has_another_key(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "model", "bf16", seed=6).folder
    narrow, short = EngineConfig(dtype=torch.bfloat16), EngineConfig(max_model_len=200)
    subjects = [subject_of(folder, 0, 1), subject_of(folder, 0), subject_of(folder, 0, experts=2)]
    subjects += [subject_of(folder, 0, 1, engine=engine) for engine in (narrow, short)]
    keys = [digest_of(subject) for subject in subjects] + [digest_of(subjects[0], text=(1, 2))]
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes())
    keys.append(digest_of(subject_of(folder, 0, 1)))
    assert len(set(keys)) == 7, "also of a shard that was written anew with the same bytes"
