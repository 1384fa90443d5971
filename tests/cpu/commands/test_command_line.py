"""Around a command: the list of them, quiet ends, and escapes in what is repeated."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pytest

from ownpath.cli import main
from ownpath.loading import default_model_dir
from ownpath.ranks.peers import PeerLost

OWNPATH = [sys.executable, "-m", "ownpath"]


def test_bare_ownpath_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    for command in ("inspect", "plan", "verify", "generate", "chat", "serve", "diff", "quantize", "bench"):
        assert f"\n    {command} " in out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == out


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ownpath {version('ownpath')}\n"


@pytest.mark.parametrize("argv", [["--help"], ["plan", "--list"]])
def test_nobody_reads_the_output_and_nothing_is_said(argv: list[str]) -> None:
    """As `ownpath plan | head -1`, when head is gone: the code that shells give for SIGPIPE."""
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run([*OWNPATH, *argv], stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr.replace("planning ...\n", "")) == (141, "")


def test_nobody_reads_a_page_and_nothing_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as stdout:  # noqa: PTH123 (a number of a file)
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["plan"]) == 141
    assert capsys.readouterr().err == ""


def test_a_full_disk_is_said() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*OWNPATH, "--help"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "No space left" in done.stderr


def test_closed_streams_and_narrow_encodings_are_no_error() -> None:
    command = " ".join(OWNPATH)
    for arguments in ("--help >&-", "--help 2>&-", "plan --device tpü 2>&1"):
        done = subprocess.run(
            f"{command} {arguments}", shell=True, capture_output=True, text=True, timeout=60,
            env=os.environ | {"PYTHONIOENCODING": "ascii"},
        )  # fmt: skip
        assert "Traceback" not in done.stdout + done.stderr
        assert "Exception" not in done.stdout + done.stderr


def test_an_interrupt_is_quiet() -> None:
    """Here while the prompt is read from a pipe that stays open."""
    process = subprocess.Popen(
        [*OWNPATH, "generate"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what runs in its background with interrupts ignored, and tests may run there.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    out, told = process.communicate(timeout=60)
    assert (process.returncode, out, told) == (130, "", "")


HOSTILE = "\x1b]8;;http://evil\x07[red]x[/red]\x1b[2J\r\n\u202e\x9b31m"
ESCAPED = r"\x1b]8;;http://evil\x07[red]x[/red]\x1b[2J\r\n\u202e\x9b31m"


@pytest.mark.parametrize(
    "argv",
    [
        [HOSTILE],
        ["plan", HOSTILE],
        ["plan", "--device", HOSTILE],
        ["generate", "./" + HOSTILE],
        ["plan", f"--{HOSTILE}"],
    ],
)
def test_what_was_typed_is_repeated_escaped(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    told = capsys.readouterr().err
    assert told.removesuffix("\n").isprintable()
    assert ESCAPED in told.replace("\\\\", "\\")


def test_a_bug_is_told_with_an_escaped_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: object) -> int:
        raise RuntimeError(HOSTILE)

    monkeypatch.setattr("ownpath.commands.plan.run", fail)
    assert main(["plan"]) == 70
    told = capsys.readouterr().err
    assert "\nRuntimeError: \\x1b]8;;" in told
    assert "this is a bug in ownpath" in told
    assert all(line.isprintable() for line in told.splitlines())


def test_a_lost_rank_is_no_bug(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(args: object) -> int:
        raise PeerLost(1, "layers.0.ffn.reduce", "no answer in 5 s")

    monkeypatch.setattr("ownpath.commands.plan.run", fail)
    assert main(["plan"]) == 75
    assert capsys.readouterr().err == "ownpath: rank 1 is lost, in layers.0.ffn.reduce: no answer in 5 s\n"


def test_an_error_of_a_command_is_one_escaped_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: object) -> int:
        raise ValueError(HOSTILE)

    monkeypatch.setattr("ownpath.commands.plan.run", fail)
    assert main(["plan"]) == 2
    assert capsys.readouterr().err == f"ownpath: {ESCAPED}\n"


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ("serve --draft --ranks 2", "--draft: several ranks (--ranks) do not draft"),
        ("serve --ranks 2 --device cuda:1", "--device cuda:1: of several ranks each has a device of its own"),
        ("serve --ranks 9", "--ranks: must be a whole number from 1 to 8"),
        ("verify --ranks 2 --work w", "--work: several ranks compare layers alone"),
        ("bench moe --ranks 2 --device cpu", "--ranks: an option of bench step and bench parallel"),
    ],
)
def test_what_several_ranks_do_not_take_is_refused(argv: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv.split()) == 2
    assert told in capsys.readouterr().err


def test_as_many_ranks_as_torchrun_has_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert main(["serve", "--ranks", "3"]) == 2
    assert "--ranks 3: 2 were started" in capsys.readouterr().err


def test_a_draft_is_refused_where_the_checkpoint_has_none(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shutil.copytree(default_model_dir(), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    config["num_nextn_predict_layers"] = 0
    (tmp_path / "model" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert main(["generate", str(tmp_path / "model"), "a", "--draft"]) == 2
    assert "a draft was asked for" in capsys.readouterr().err
