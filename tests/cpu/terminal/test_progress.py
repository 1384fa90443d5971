"""Progress: a bar on a terminal from the start, a line now and then elsewhere."""

import re
import time

import pytest
from support.terminals import Terminal

from ownpath.terminal import progress
from ownpath.terminal.progress import Progress


def stderr_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Called in the test itself: pytest sets its own stream behind a fixture."""
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    return stream


def test_a_terminal_sees_the_work_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = stderr_terminal(monkeypatch)
    with Progress("loading", in_bytes=True):
        assert "loading" in terminal.page(), "before the first part is ready"


def test_bytes_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 GB of 20 in 4 s: 2 GB/s, 6 s for the other 12."""
    stderr_terminal(monkeypatch)
    bar = Progress("loading", in_bytes=True)
    told: list[str] = []
    monkeypatch.setattr(bar._display, "update", lambda done, total, text: told.append(text))
    clock = iter([100.0, 104.0, 110.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    for num_bytes in (0, 8 * 10**9, 20 * 10**9):
        bar(num_bytes, 20 * 10**9)
    assert told == [
        "0 B of 20.0 GB",
        "8.0 GB of 20.0 GB, 2.0 GB/s  6.0 s left",
        "20.0 GB of 20.0 GB, 2.0 GB/s",
    ]


def test_a_resumed_work_counts_its_own_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """40 of 43 layers are an earlier run's; one more took 10 s, so two more take 20."""
    stderr_terminal(monkeypatch)
    bar = Progress("layers")
    told: list[str] = []
    monkeypatch.setattr(bar._display, "update", lambda done, total, text: told.append(text))
    clock = iter([0.0, 10.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    bar(40, 43, "layers.40")
    bar(41, 43, "layers.41")
    assert told == ["40 of 43  layers.40", "41 of 43  20 s left  layers.41"]


def test_displays_nest_and_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = stderr_terminal(monkeypatch)
    with Progress("loading", in_bytes=True) as outer:
        outer(1, 2)
        with Progress("compiling kernels") as inner:
            inner(1, 3, "a\x1b]52;x\x07[red]")
            time.sleep(0.25)  # both are drawn ten times a second
    shown = terminal.getvalue()
    assert re.search(r"compiling kernels .* 1 of 3 .*a\\x1b\]52;x\\x07\[red\]", terminal.page())
    assert shown.endswith(("\x1b[2K", "\x1b[1A\x1b[2K")), "the lines are cleared"


def test_an_error_ends_the_display(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = stderr_terminal(monkeypatch)
    with pytest.raises(KeyboardInterrupt), Progress("loading"):
        raise KeyboardInterrupt
    assert terminal.getvalue().count("\x1b[?25l") == terminal.getvalue().count("\x1b[?25h"), "the cursor is back"


def test_elsewhere_short_work_says_nothing_and_long_work_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("loading", in_bytes=True) as bar:
        bar(1, 2)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(progress, "FIRST_LINE_S", 0.02)
    monkeypatch.setattr(progress, "LINE_INTERVAL_S", 0.02)
    with Progress("checking: layers") as bar:
        time.sleep(0.15)  # a part that takes longer than the interval
        bar(1, 4, "layers.1")
        time.sleep(0.15)
    out, told = capsys.readouterr()
    assert out == ""
    assert told.startswith("checking: layers ...\n")
    assert "checking: layers: 1 of 4  layers.1\n" in re.sub(r"  [\d.]+ s left", "", told)


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(progress, "FIRST_LINE_S", 0.01)
    with Progress("loading"):
        time.sleep(0.1)
    assert stream.getvalue() == "loading ...\n"
