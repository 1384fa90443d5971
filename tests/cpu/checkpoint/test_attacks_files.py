"""Files that are none: pipes, sockets, devices, folders, and JSON made to break its reader. Each is one named error."""

import json
import os
import socket
import tracemalloc
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

import pytest
import torch

from ownpath import files
from ownpath.chat.effort import release_of_folder
from ownpath.chat.tokenizer import Tokenizer, TokenizerError
from ownpath.checkpoint.writer import INDEX_NAME, write_checkpoint
from ownpath.cli import main
from ownpath.config import ConfigError, ModelConfig
from ownpath.files import MAX_JSON_DEPTH, FileError, read_bytes, read_json_object, read_text
from ownpath.inspect.inspection import inspect_folder
from ownpath.inspect.tokens import generation_problems
from ownpath.loading import default_model_dir
from ownpath.verify.plan_file import read_plan_file
from ownpath.verify.report import checkpoint_digest


def pipe(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made, chdir(path.parent):  # a socket's path may have 108 bytes
        made.bind(path.name)


def zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def terminal(path: Path) -> None:
    path.symlink_to("/dev/tty")


def folder(path: Path) -> None:
    path.mkdir()


def dangling(path: Path) -> None:
    path.symlink_to(path.with_name("nothing"))


def loop(path: Path) -> None:
    path.symlink_to(path)


def endless(path: Path) -> None:
    """A hole of 1 TiB, which takes no disk."""
    path.touch()
    os.truncate(path, 2**40)


def not_text(path: Path) -> None:
    path.write_bytes(b'{"a": "\xff"}')


def deep(path: Path) -> None:
    path.write_text('{"a":' + "[" * 100_000 + "]" * 100_000 + "}")


def rather_deep(path: Path) -> None:
    """Not too deep to be parsed, but for what prints it."""
    path.write_text('{"a":' + "[" * 200 + "]" * 200 + "}")


def many(path: Path) -> None:
    path.write_text('{"a":[' + "[]," * 2_000_000 + "[]]}")


def twice(path: Path) -> None:
    path.write_text('{"vocab_size": 1, "vocab_size": 2}')


def not_a_number(path: Path) -> None:
    path.write_text('{"vocab_size": NaN}')


def infinite(path: Path) -> None:
    path.write_text('{"vocab_size": -Infinity}')


def half_a_pair(path: Path) -> None:
    path.write_text('{"a": ["\\ud800"]}')


def a_whole_pair(path: Path) -> None:
    path.write_text('{"a": "\\ud83d\\ude00 \\\\ud800"}')


def huge(path: Path) -> None:
    path.write_text('{"vocab_size": ' + "9" * 5000 + "}")


def cut(path: Path) -> None:
    path.write_text('{"vocab_size": ')


def no_object(path: Path) -> None:
    path.write_text("[1]")


def empty(path: Path) -> None:
    path.touch()


SPECIAL = (pipe, unix_socket, zeros, terminal, folder, dangling, loop, endless)
JSON = (half_a_pair, not_text, deep, rather_deep, many, twice, not_a_number, infinite, huge, cut, no_object, empty)
READERS: dict[str, tuple[type[ValueError], Callable[[Path], object]]] = {
    "config.json": (ConfigError, lambda folder: ModelConfig.from_file(folder / "config.json")),
    "tokenizer.json": (TokenizerError, Tokenizer.from_folder),
    "tokenizer_config.json": (TokenizerError, Tokenizer.from_folder),
    "plan.json": (ValueError, lambda folder: read_plan_file(folder / "plan.json")),
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((default_model_dir() / name).read_bytes())
    return tmp_path


@pytest.mark.parametrize("make", [*SPECIAL, *JSON])
def test_a_file_that_is_none_is_one_error_that_names_it(make: Callable[[Path], object], tmp_path: Path) -> None:
    make(tmp_path / "x.json")
    with pytest.raises(FileError, match=r"x\.json") as caught:
        read_json_object(tmp_path / "x.json")
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("make", [pipe, zeros, dangling, deep, twice, not_a_number])
def test_every_reader_of_a_checkpoint_says_so(make: Callable[[Path], object], name: str, model: Path) -> None:
    (model / name).unlink(missing_ok=True)
    make(model / name)
    error, read = READERS[name]
    with pytest.raises(error, match=name.replace(".", r"\.")):
        read(model)


NAMES = ("config.json", "tokenizer.json", "tokenizer_config.json", "hf_quant_config.json", INDEX_NAME)


@pytest.mark.parametrize("name", NAMES)
def test_inspect_finds_them(name: str, model: Path) -> None:
    write_checkpoint(model, [("norm.weight", torch.zeros(4))], 100)
    for make in (pipe, zeros, loop, rather_deep, not_a_number):
        (model / name).unlink(missing_ok=True)
        make(model / name)
        assert any(name in problem.message for problem in inspect_folder(model).problems), (name, make)


def test_the_other_files_beside_the_weights_are_read_the_same_way(model: Path) -> None:
    config = ModelConfig.from_file(model / "config.json")
    for make in (pipe, zeros, twice):
        (model / "generation_config.json").unlink(missing_ok=True)
        make(model / "generation_config.json")
        assert any("generation_config.json" in found.message for found in generation_problems(model, config))
    (model / "encoding").mkdir()
    pipe(model / "encoding" / "encoding_dsv4.py")
    with pytest.raises(FileError, match=r"encoding_dsv4\.py.*pipe"):
        release_of_folder(model)
    pipe(model / "x.safetensors")
    assert checkpoint_digest(model)


def test_what_grows_past_the_limit_is_not_read_on() -> None:
    """A file of /proc says that it has no bytes and gives some."""
    with pytest.raises(FileError, match=r"10 are read"):
        read_bytes(Path("/proc/self/status"), 10)
    assert read_text(Path("/proc/self/status")).startswith("Name:")


def test_the_limit_of_depth_is_the_last_that_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a":' * (MAX_JSON_DEPTH - 1) + "{}" + "}" * (MAX_JSON_DEPTH - 1))
    assert read_json_object(path)
    path.write_text('{"a":' * (MAX_JSON_DEPTH + 1) + "{}" + "}" * (MAX_JSON_DEPTH + 1))
    with pytest.raises(FileError, match=f"deeper than {MAX_JSON_DEPTH}"):
        read_json_object(path)


def test_a_pair_of_surrogates_is_one_character(tmp_path: Path) -> None:
    a_whole_pair(tmp_path / "x.json")
    assert read_json_object(tmp_path / "x.json") == {"a": "\U0001f600 \\ud800"}


def test_what_cannot_be_looked_at_is_not_called_absent(tmp_path: Path) -> None:
    loop(tmp_path / "model")
    with pytest.raises(ConfigError, match="symbolic links"):
        ModelConfig.from_file(tmp_path / "model" / "config.json")
    assert "symbolic links" in inspect_folder(tmp_path / "model").problems[0].message


def test_a_vocabulary_beyond_measure_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ownpath.chat.tokenizer.MAX_ENTRIES", 1000)
    with pytest.raises(TokenizerError, match=r"vocab has \d+ entries; at most 1000"):
        Tokenizer.from_folder(model)


def test_a_file_taken_away_between_look_and_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that was a file when it was looked at and is a pipe when it is opened is still not waited for."""
    path = tmp_path / "x.json"
    path.write_text("{}")
    real = os.open

    def swap(name: Path, *rest: int) -> int:
        path.unlink()
        os.mkfifo(path)
        return real(name, *rest)

    monkeypatch.setattr(files.os, "open", swap)
    with pytest.raises(FileError, match="pipe"):
        read_bytes(path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_device_for_a_file_costs_no_memory(name: str, tmp_path: Path) -> None:
    """/dev/zero took 12 GB. Measured: 1.1 MB at the peak, the buffer that config.json is read into."""
    (tmp_path / "config.json").write_bytes((default_model_dir() / "config.json").read_bytes())
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to("/dev/zero")
    tracemalloc.start()
    problems = inspect_folder(tmp_path).problems
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**22
    assert any(f"{name}: not a regular file but a device" in problem.message for problem in problems)


@pytest.mark.parametrize("command", ["inspect", "plan", "generate", "verify"])
def test_commands_end_in_a_sentence(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "config.json")
    (tmp_path / "tokenizer.json").write_bytes((default_model_dir() / "tokenizer.json").read_bytes())
    more = {"generate": ["hello"], "verify": ["--stages", "file"]}.get(command, [])
    assert main([command, str(tmp_path), *more]) in (1, 2)
    told = capsys.readouterr()
    assert "config.json" in told.out + told.err or "found neither" in told.out + told.err
    assert "Traceback" not in told.err


def test_a_whole_file_or_none(tmp_path: Path) -> None:
    """Writing is stopped in the middle: the old file stays, and nothing lies beside it."""
    path = tmp_path / "x.json"
    files.write_json(path, {"a": 1})

    def stop() -> None:
        with files.create_file(path) as write:
            write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
