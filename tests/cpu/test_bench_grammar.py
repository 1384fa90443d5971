"""The tool that takes steps with grammars apart: times without those inside, and a whole run without a model."""

import itertools
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import bench_grammar  # noqa: E402
from grammar_parts import StepParts  # noqa: E402


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
