"""Names in a checkpoint's files reach a terminal escaped, whichever command says them."""

import json
import re
from pathlib import Path

import pytest
import torch
from cpu.server.model_folder import write_model_folder
from support.broken import change_tensors
from support.terminals import SGR, Terminal

from ownpath.cli import main

NAME = "x\x1b]52;c;cGF5bG9hZA==\x07\x1b[2J[red]y[/red]\r\n\u202e\x9b1m"
ESCAPED = r"x\x1b]52;c;cGF5bG9hZA==\x07\x1b[2J[red]y[/red]\r\n\u202e\x9b1m"
DRAWN = re.compile(r"\x1b\[(\?25[lh]|2K|1A)|\r")
"""What a progress bar does to its own line."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model_folder(tmp_path / "model")


def run_on_terminal(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a command whose streams are both one terminal; returns what is left without colours and the bar's moves."""
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    assert main(argv) in (1, 2)
    return DRAWN.sub("", SGR.sub("", terminal.getvalue()))


def assert_escaped(text: str) -> None:
    assert all(character.isprintable() or character == "\n" for character in text), ascii(text)
    # Wrapped lines are joined again: neither side keeps its spaces.
    assert "".join(ESCAPED.split()) in "".join(text.split()).replace("\\\\", "\\")


@pytest.mark.parametrize("command", ["inspect", "plan", "generate", "serve --port 0", "verify --stages file"])
def test_a_tensors_name(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_tensors(folder, lambda tensors: tensors.update({NAME: torch.zeros(1)}))
    name, *options = command.split()
    rest = ["hello"] if name == "generate" else []
    assert_escaped(run_on_terminal([name, str(folder), *rest, *options], monkeypatch))


@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_a_field_of_the_configuration(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(
        json.dumps(fields | {"hidden_act": NAME, "scoring_func": NAME}), encoding="utf-8"
    )
    assert_escaped(run_on_terminal([command, str(folder)], monkeypatch))


def test_the_folder_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = folder.with_name(NAME.replace("/", "_"))
    folder.rename(hostile)
    (hostile / "tokenizer.json").unlink(missing_ok=True)
    text = run_on_terminal(["inspect", str(hostile)], monkeypatch)
    assert all(character.isprintable() or character == "\n" for character in text), ascii(text)
