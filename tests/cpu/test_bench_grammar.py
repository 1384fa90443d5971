"""The tool that takes steps with grammars apart: times without those inside, and a whole run without a model."""

import itertools
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import bench_grammar  # noqa: E402
from grammar_parts import StepParts  # noqa: E402
from shaped_engine import made_up_tokens  # noqa: E402


def test_a_part_is_without_the_parts_inside_it() -> None:
    """A clock that ticks once a look: each inner part takes one tick, and two looks of the outer one are its own."""
    ticks = itertools.count()
    parts = StepParts(lambda: float(next(ticks)))
    launch, land = parts._timed("launch", lambda: None), parts._timed("read and report", lambda: None)
    outer = parts._timed("other", lambda: (launch(), land()))
    for _ in range(3):
        parts._note(outer)
    assert parts.medians_us() == {"launch": 1e6, "read and report": 1e6, "other": 3e6}
    parts._note(parts._timed("other", launch))
    assert len(parts._steps) == 3, "a step that read none is no whole one"


def test_the_hosts_part_can_be_measured_without_a_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bound answers stay within their grammar, or the run fails; each line names its rows."""
    arguments = ["--host-only", "--requests", "2", "--beside", "1", "--tokens", "12"]
    monkeypatch.setattr(sys, "argv", ["bench_grammar.py", *arguments])
    bench_grammar.main()
    lines = capsys.readouterr().out.splitlines()
    kinds = ("2 free beside 1", "2 bound beside 1", "masks of 2 answers")
    assert [line.strip().startswith(kind) for line, kind in zip(lines, kinds, strict=True)] == [True] * 3
    assert "second draw" not in lines[0]
    assert "second draw" in lines[1]


def test_steps_of_a_published_shape_are_bound_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its vocabulary is larger than any tokenizer here: made-up words are bound like known ones, or the run fails."""
    arguments = ["--shape", "small", "--layers", "1", "--expert-sets", "1", "--requests", "2", "--tokens", "5"]
    monkeypatch.setattr(sys, "argv", ["bench_grammar.py", *arguments, "--rounds", "1", "--max-model-len", "256"])
    bench_grammar.main()
    shape, rates, masks = capsys.readouterr().out.splitlines()
    assert shape.startswith("small: 4096 tokens, ready in ")
    assert rates.startswith("2 requests: free ")
    assert masks.strip().startswith("masks of 2 answers")


def test_made_up_tokens_are_different_and_begin_with_the_known_ones() -> None:
    known = [b"a", b"", b" the"]
    tokens = made_up_tokens(known, 20_000)
    assert tokens[:3] == known
    assert len({*tokens}) == 20_000
    assert tokens == made_up_tokens(known, 20_000)
    assert made_up_tokens(known, 2) == known[:2]
