"""`ownpath generate`: which words are the model, which are the prompt, and what is read from standard input."""

import io
import sys
from pathlib import Path

import pytest
from support.terminals import Terminal

from ownpath.cli import main
from ownpath.commands.generate import _model_and_prompt


def pipe(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))


@pytest.mark.parametrize(
    ("data", "prompt"),
    [(b"2 + 2 =\n", "2 + 2 ="), (b"a\r\n", "a"), (b"two\nlines\n\n", "two\nlines\n"), ("Köln".encode(), "Köln")],
)
def test_a_piped_prompt_loses_its_last_line_end_only(
    data: bytes, prompt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for words, folder in (([], None), (["-"], None), ([str(tmp_path)], tmp_path), ([str(tmp_path), "-"], tmp_path)):
        pipe(monkeypatch, data)
        assert _model_and_prompt(words) == (folder, prompt)


@pytest.mark.parametrize("prompt", ["hello", "The capital of France is", "and / or", "1/2", "x" * 100_000, "-1"])
def test_a_text_alone_is_a_prompt_of_the_embedded_model(prompt: str, tmp_path: Path) -> None:
    assert _model_and_prompt([prompt]) == (None, prompt)
    assert _model_and_prompt([str(tmp_path), prompt]) == (tmp_path, prompt)


@pytest.mark.parametrize(
    "word", ["/no/such/folder", "./gone", "../gone", "~/gone", "deepseek-ai/DeepSeek-V4", "hf://deepseek-ai/V4"]
)
def test_a_path_alone_is_never_a_prompt(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe(monkeypatch, b"piped")
    with pytest.raises(ValueError, match="MODEL: "):
        _model_and_prompt([word])


def test_a_folder_or_file_beside_one_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny").mkdir()
    Path("weights").touch()
    pipe(monkeypatch, b"piped")
    assert _model_and_prompt(["tiny"]) == (Path("tiny"), "piped")
    with pytest.raises(ValueError, match="is a file; a model is a folder"):
        _model_and_prompt(["weights"])


def test_at_a_terminal_the_missing_prompt_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in ([], [str(tmp_path)]):
        monkeypatch.setattr(sys, "stdin", Terminal())
        assert main(["generate", *words]) == 2
        told = capsys.readouterr().err
        assert "there is no prompt" in told
        assert 'ownpath generate [MODEL] "PROMPT"' in told


@pytest.mark.parametrize(("data", "words"), [(b"", "the prompt is empty"), (b"\n", "is empty"), (b"\xff", "UTF-8")])
def test_what_is_no_prompt_is_told(data: bytes, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe(monkeypatch, data)
    with pytest.raises(ValueError, match=words):
        _model_and_prompt([])


def test_a_piped_prompt_is_continued(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pipe(monkeypatch, b"The capital of France is\n")
    assert main(["generate", "--chat"]) == 0
    assert "Paris" in capsys.readouterr().out
