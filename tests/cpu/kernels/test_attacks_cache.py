"""The kernel cache holds machine code: nobody else's is loaded, damage is compiled anew, and writers do not mix."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

import pytest

from ownpath.files import FileError
from ownpath.kernels.dsl import cache
from ownpath.kernels.nvfp4.config import CombineConfig, PermuteConfig

CONFIG, OTHER = PermuteConfig(), CombineConfig(0, True)
FACTS = {"entry": "f", "num_threads": 256, "cluster": 1}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OWNPATH_KERNEL_CACHE", str(tmp_path / "a" / "kernels"))
    cache.store(CONFIG, b"code", FACTS)
    return cache.cache_dir()


def file_of(suffix: str, config: cache.Config = CONFIG) -> Path:
    return cache.stem(config).with_suffix(suffix)


def test_the_folder_is_made_for_this_user_alone(folder: Path) -> None:
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.name for path in folder.iterdir()} == {file_of(".cubin").name, file_of(".json").name}


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
def test_a_folder_that_others_may_write_is_refused_by_name(mode: int, folder: Path) -> None:
    folder.chmod(mode)
    assert not cache.is_cached(CONFIG)
    for use in (lambda: cache.read_entry(CONFIG), lambda: cache.compile_missing([CONFIG])):
        with pytest.raises(cache.CacheError, match=rf"{folder} is not used.*chmod go-w"):
            use()
    with pytest.raises(cache.CacheError, match="OWNPATH_KERNEL_CACHE"):
        cache.store(OTHER, b"code", FACTS)
    assert not file_of(".cubin", OTHER).exists()


def test_another_users_folder_or_file_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root's is taken: it can do everything anyway. As another user, what this one owns is somebody else's."""
    if os.geteuid() == 0:
        os.chown(file_of(".cubin"), 4242, 4242)
        assert not cache.is_cached(CONFIG)
        os.chown(file_of(".cubin"), 0, 0)
        assert cache.is_cached(CONFIG)
        os.chown(folder, 4242, 4242)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 4242)
    with pytest.raises(cache.CacheError, match="belongs to user"):
        cache.compile_missing([CONFIG])


@pytest.mark.parametrize("suffix", [".cubin", ".json"])
@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_a_file_that_others_may_write_counts_as_missing(suffix: str, mode: int, folder: Path) -> None:
    file_of(suffix).chmod(mode)
    assert folder.is_dir()
    assert not cache.is_cached(CONFIG)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def exchange(path: Path) -> None:
    path.write_bytes(b"evil")


def link(path: Path) -> None:
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def other_note(path: Path) -> None:
    """Another kernel's pair of files under this one's names: its hash is right, its name is not."""
    cache.store(OTHER, b"other code", FACTS)
    for suffix in (".cubin", ".json"):
        file_of(suffix, OTHER).replace(path.with_suffix(suffix))


DAMAGE: list[Callable[[Path], object]] = [cut, exchange, link, pipe, Path.unlink, other_note]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("suffix", [".cubin", ".json"])
def test_a_damaged_entry_counts_as_missing_and_is_written_anew(
    damage: Callable[[Path], object], suffix: str, folder: Path
) -> None:
    damage(file_of(suffix))
    assert not cache.is_cached(CONFIG)
    cache.store(CONFIG, b"new code", FACTS)
    assert cache.read_entry(CONFIG).code == b"new code"
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("note", ["[" * 10_000, '{"entry": 1}', "null", "", '{"entry": "f", "entry": "g"}', "NaN"])
def test_a_note_that_is_none_counts_as_missing(note: str, folder: Path) -> None:
    file_of(".json").write_text(note)
    assert not cache.is_cached(CONFIG)


def test_a_planted_link_at_a_guessable_name_is_not_written_through(folder: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in (file_of(f".{os.getpid()}.tmp", OTHER), file_of(".cubin", OTHER), file_of(".json", OTHER)):
        name.symlink_to(victim)
    cache.store(OTHER, b"code", FACTS)
    assert victim.read_text() == "mine"
    assert cache.read_entry(OTHER).code == b"code"


def _store_often(seed: int) -> None:
    for number in range(20):
        cache.store(OTHER, f"{seed} {number}".encode() * 1000, FACTS)
        if number % 3 == seed % 3:
            file_of(".cubin", OTHER).write_bytes(b"damaged")


def test_writers_at_one_time_leave_a_whole_entry(folder: Path) -> None:
    """Four processes store different code of one kernel and damage it meanwhile; what is read is always one's whole."""
    context = get_context("fork")
    writers = [context.Process(target=_store_often, args=(seed,)) for seed in range(4)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        with suppress(FileError):
            code = cache.read_entry(OTHER).code
            assert code == code[: len(code) // 1000] * 1000
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    cache.store(OTHER, b"last", FACTS)
    assert cache.is_cached(OTHER)
    assert json.loads(file_of(".json", OTHER).read_text())["num_bytes"] == file_of(".cubin", OTHER).stat().st_size
    assert not list(folder.glob(".*.tmp"))
