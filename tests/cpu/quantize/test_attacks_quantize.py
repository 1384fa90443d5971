"""``quantize`` among hostile and unlucky files: it resumes what it wrote, and writes nowhere else."""

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import pytest
from cpu.quantize.sources import store_mxfp4, write_source
from support.shard_damage import CHANGES, exchange

from ownpath.chat.effort import find_release
from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.writer import INDEX_NAME
from ownpath.cli import main
from ownpath.files import FileError
from ownpath.quantize import run as quantize_run
from ownpath.quantize.run import Options, QuantizeReport, quantize_checkpoint
from ownpath.quantize.staging import STAGING
from ownpath.quantize.steps import QuantizeScope

OPTIONS = Options(QuantizeScope.EXPERTS, 400_000)
ENCODER = '"Reasoning Effort: Beyond maximum"\n'


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source with a release's chat format, and its result under ``whole``."""
    folder = tmp_path_factory.mktemp("attack")
    write_source(folder, store_mxfp4)
    (folder / "source" / "encoding" / "tests").mkdir(parents=True)
    (folder / "source" / "encoding" / "encoding_dsv4.py").write_text(ENCODER)
    (folder / "source" / "encoding" / "tests" / "golden.json").write_text("{}")
    (folder / "source" / "LICENSE").write_text("MIT")
    quantize_checkpoint(folder / "source", folder / "whole", OPTIONS)
    return folder


@pytest.fixture
def source(made: Path) -> Path:
    return made / "source"


def quantize(source: Path, target: Path) -> QuantizeReport:
    return quantize_checkpoint(source, target, OPTIONS)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


class Stopped(Exception):
    """Stands for the end of a run."""


@pytest.fixture
def stopped(source: Path, tmp_path: Path) -> Path:
    """The target of a run that stopped when all shards were finished, before any other file."""

    def stop(*_: object) -> None:
        raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize_run, "_finish", stop)
        patch.setattr(quantize_run.UnfinishedRun, "release", lambda *_: None)
        with pytest.raises(Stopped):
            quantize(source, tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("change", CHANGES)
def test_a_finished_shard_that_changed_is_made_again(
    change: Callable[[Path], None], source: Path, made: Path, stopped: Path
) -> None:
    change(stopped / STAGING / "0.safetensors")
    report = quantize(source, stopped)
    assert report.redone[0].startswith("model-00001-of-")
    assert len(report.redone) == (2 if change is exchange else 1)
    assert contents(stopped) == contents(made / "whole")


def test_a_finished_shard_that_is_whole_is_kept(source: Path, made: Path, stopped: Path) -> None:
    made_at = (stopped / STAGING / "0.safetensors").stat().st_mtime_ns
    assert quantize(source, stopped).redone == ()
    assert sorted(stopped.glob("*.safetensors"))[0].stat().st_mtime_ns == made_at
    assert contents(stopped) == contents(made / "whole")


@contextmanager
def counted_syncs(last: int = 0) -> Iterator[list[int]]:
    """Counts syncs. last: number of the sync at which this process ends as ``kill -9`` ends it."""
    real, count = os.fsync, [0]

    def sync(descriptor: int) -> None:
        count[0] += 1
        if count[0] == last:
            os.kill(os.getpid(), signal.SIGKILL)
        real(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", sync)
        yield count


def _quantize_until(source: Path, target: Path, last: int) -> None:
    with counted_syncs(last):
        quantize(source, target)


@pytest.fixture(scope="module")
def num_syncs(made: Path) -> int:
    """The number of syncs of a whole run; the last of them come after the index."""
    with counted_syncs() as count:
        quantize(made / "source", made / "counted")
    return count[0]


@pytest.mark.parametrize("at", [1, 3, 5, 6, 0.5, -16, -8, -6, -5, -4, -3, -2, -1])
def test_a_killed_run_goes_on_wherever_it_was_killed(
    at: float, num_syncs: int, source: Path, made: Path, tmp_path: Path
) -> None:
    """at: number of the sync, from the end where negative."""
    last = int(num_syncs * at) if isinstance(at, float) else at if at > 0 else num_syncs + 1 + at
    process = get_context("fork").Process(target=_quantize_until, args=(source, tmp_path / "out", last))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    if (tmp_path / "out" / INDEX_NAME).exists():  # complete, but for the folder of what was unfinished
        CheckpointIndex.open(tmp_path / "out")
        kept = {name: data for name, data in contents(tmp_path / "out").items() if not name.startswith(STAGING)}
        assert kept == contents(made / "whole")
    if at == -1:  # after the note that would let it go on was removed
        with pytest.raises(CheckpointError, match="never overwritten"):
            quantize(source, tmp_path / "out")
        return
    quantize(source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(made / "whole")


def test_everything_is_on_the_disk_before_the_index_appears(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file by its own sync, each name by one of its folder after it; then the index, and its name."""
    real_sync, real_replace = os.fsync, os.replace
    synced: set[int] = set()
    unsynced: set[str] = set()
    checked: list[int] = []

    def sync(descriptor: int) -> None:
        real_sync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)
        place = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        unsynced.difference_update({name for name in unsynced if str(Path(name).parent) == place})

    def replace(one: Path, other: Path) -> None:
        if Path(other).name == INDEX_NAME:
            there = [path for path in (tmp_path / "out").rglob("*") if path.is_file() and STAGING not in path.parts]
            assert all(path.stat().st_ino in synced for path in there)
            assert not {name for name in unsynced if STAGING not in name}
            assert one.stat().st_ino in synced
            checked.append(len(there))
        real_replace(one, other)
        unsynced.add(str(other))

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    quantize(source, tmp_path / "out")
    assert checked == [len(contents(tmp_path / "out")) - 1]
    assert not {name for name in unsynced if STAGING not in name}


@contextmanager
def file_limit(num_bytes: int) -> Iterator[None]:
    """No file can grow beyond this: what a full disk does, at a chosen place."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("num_bytes", [100, 1000, 100_000])
def test_a_full_disk_leaves_nothing_half_written(num_bytes: int, source: Path, made: Path, tmp_path: Path) -> None:
    with file_limit(num_bytes), pytest.raises(FileError, match=r"\.quantizing.*cannot be written \(File too large"):
        quantize(source, tmp_path / "out")
    left = contents(tmp_path / "out")
    assert not [name for name in left if name.endswith(".tmp")]
    assert not [name for name in left if not name.startswith(STAGING)]
    quantize(source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(made / "whole")


def copy_of(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder, symlinks=True))


def test_only_known_companions_are_copied_and_no_link_out(source: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    own = copy_of(source, tmp_path / "own")
    (own / "README.md").symlink_to(secret)
    (own / "tokenizer_config.json").symlink_to("/etc/passwd")
    (own / "special_tokens_map.json").symlink_to(tmp_path / "nothing")
    (own / "generation_config.json").symlink_to("/dev/zero")
    (own / "chat_template.jinja").symlink_to("LICENSE")
    (own / "merges.txt").mkdir()
    os.mkfifo(own / "vocab.json")
    (own / "encoding" / "key.py").symlink_to(secret)
    (own / "encoding" / "more").symlink_to(tmp_path)
    for name in ("id_rsa", "notes.txt", "model.bin", "training_args.bin", "a\nb.py"):
        (own / name).write_text("x")
    report = quantize(own, tmp_path / "out")
    left = {one.name: one.left_out for one in report.left_out}
    links = {"README.md", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"}
    links |= {"encoding/key.py"}
    assert {name for name, why in left.items() if "link out" in why} == links
    assert {name for name, why in left.items() if "no regular file" in why} == {"merges.txt", "vocab.json"}
    unknown = {"id_rsa", "notes.txt", "model.bin", "training_args.bin", "a\nb.py"}
    assert {name for name, why in left.items() if "known" in why} == unknown
    assert left["encoding/more"] == "no folder, or a link, which is not followed"
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "MIT"
    assert b"secret" not in b"".join(contents(tmp_path / "out").values())
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_a_hub_caches_links_are_its_own(source: Path, made: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "0123"
    for number, name in enumerate(contents(source)):
        place = snapshot / name
        place.parent.mkdir(parents=True, exist_ok=True)
        blobs.mkdir(exist_ok=True)
        shutil.copyfile(source / name, blobs / str(number))
        place.symlink_to(os.path.relpath(blobs / str(number), place.parent))
    assert quantize(snapshot, tmp_path / "out").left_out == ()
    assert contents(tmp_path / "out") == contents(made / "whole")


def test_what_tells_the_release_is_kept(source: Path, made: Path) -> None:
    assert find_release(source).name == find_release(made / "whole").name == "0731"
    assert (made / "whole" / "encoding" / "tests" / "golden.json").read_text() == "{}"


def test_nothing_is_written_through_a_link(source: Path, made: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "out").symlink_to(elsewhere)
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / STAGING).symlink_to(elsewhere)
    for target in ("out", "dangling", "inner"):
        with pytest.raises(CheckpointError, match="is a link"):
            quantize(source, tmp_path / target)
    assert not list(elsewhere.iterdir())
    assert not (tmp_path / "nothing").exists()
    victim = tmp_path / "victim"
    victim.write_text("mine")
    # A run that goes on finds its own names taken by links: they are replaced.
    target, first = tmp_path / "resumed", sorted(path.name for path in (made / "whole").glob("*.safetensors"))[0]
    with file_limit(1000), pytest.raises(FileError):
        quantize(source, target)
    for name in ("config.json", "tokenizer.json", first, INDEX_NAME, "encoding"):
        (target / name).symlink_to(victim if name != "encoding" else elsewhere)
    with pytest.raises((FileError, FileExistsError), match="encoding"):
        quantize(source, target)
    (target / "encoding").unlink()
    quantize(source, target)
    assert victim.read_text() == "mine"
    assert not list(elsewhere.iterdir())
    assert contents(target) == contents(made / "whole")


def test_the_target_is_neither_the_source_nor_in_it(source: Path, tmp_path: Path) -> None:
    own = copy_of(source, tmp_path / "own")
    before = contents(own)
    for target in (own, tmp_path / "x" / ".." / "own", own / "out", own / "encoding" / "out"):
        with pytest.raises(CheckpointError, match=r"never overwritten|lies in the source"):
            quantize(own, target)
    (own / STAGING).mkdir()
    (own / STAGING / "plan.json").write_text("{}")  # it claims to be an unfinished run into itself
    with pytest.raises(CheckpointError, match="never overwritten"):
        quantize(own, own)
    shutil.rmtree(own / STAGING)
    assert contents(own) == before


@pytest.mark.parametrize(
    "name", ["README.md", "LICENSE", "tokenizer.json", "model-7.safetensors", "hf_quant_config.json"]
)
def test_no_file_of_the_users_is_overwritten(name: str, source: Path, tmp_path: Path) -> None:
    own = copy_of(source, tmp_path / "own")
    (own / "README.md").write_text("theirs")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(CheckpointError, match=f"{name} exists"):
        quantize(own, tmp_path / "out")
    assert contents(tmp_path / "out") == {name: b"mine"}


def test_two_runs_do_not_mix(source: Path, stopped: Path) -> None:
    holder = quantize_run.UnfinishedRun(stopped, json.loads((stopped / STAGING / "plan.json").read_text()))
    with pytest.raises(CheckpointError, match="another run is writing"):
        quantize(source, stopped)
    holder.close()
    quantize(source, stopped)


def test_a_source_that_changes_meanwhile_is_noticed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = copy_of(source, tmp_path / "own")
    first = sorted(own.glob("*.safetensors"))[0]
    real = quantize_run._make_shard

    def make(staging: quantize_run.UnfinishedRun, number: int, *rest: object) -> object:
        if number == 1:
            os.utime(first)
        return real(staging, number, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(quantize_run, "_make_shard", make)
    with pytest.raises(CheckpointError, match="was changed while it was read"):
        quantize(own, tmp_path / "out")
    assert not (tmp_path / "out" / INDEX_NAME).exists()


def test_a_source_that_shrinks_meanwhile_is_a_named_error(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = copy_of(source, tmp_path / "own")
    real = quantize_run.plan_shards

    def plan(*given: object) -> object:
        for shard in own.glob("*.safetensors"):
            os.truncate(shard, 20_000)
        return real(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(quantize_run, "plan_shards", plan)
    with pytest.raises(CheckpointError, match=r"tensor '.*' .*: the file ends inside it"):
        quantize(own, tmp_path / "out")
    assert set(contents(tmp_path / "out")) <= {f"{STAGING}/plan.json", f"{STAGING}/0.safetensors", f"{STAGING}/0.json"}


def test_a_target_that_cannot_be_written_is_named(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["quantize", str(source), str(tmp_path / "file")]) == 2
    assert main(["quantize", str(source), str(tmp_path / "file" / "out")]) == 2
    assert capsys.readouterr().err.count(str(tmp_path / "file")) == 2
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        assert main(["quantize", str(source), str(tmp_path / "closed" / "out")]) == 2
