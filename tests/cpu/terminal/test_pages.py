"""Pages: whole lines for a pipe, the terminal's width otherwise, and nothing in a name that is acted on."""

import logging
import os
import pty
import re
import subprocess
import sys

import pytest
from rich.cells import cell_len
from support.terminals import SGR, Terminal

from ownpath.loading import default_model_dir, plan_model
from ownpath.plan.show import plan_page, plan_rows
from ownpath.terminal.console import SafeFormatter, plain_text, show, tell, wrapped, write_prose
from ownpath.terminal.page import Listing, fact, facts, line

HOSTILE = "w\x1b]8;;http://evil\x07[red]x[/red][link=http://evil]y[/link]\r\n\u202e\x9b31m:smile:"
ESCAPED = r"w\x1b]8;;http://evil\x07[red]x[/red][link=http://evil]y[/link]\r\n\u202e\x9b31m:smile:"


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("device", ["cpu", "sm_90", "sm_100"])
def test_a_plan_fits_a_terminal_and_loses_nothing(width: int, device: str) -> None:
    plan = plan_model(default_model_dir(), device)
    text = plain_text(*plan_page(plan), width=width)
    assert max(map(cell_len, text.splitlines())) <= width
    words = set(text.split())
    for row in plan_rows(plan):
        assert {row.title, *row.cells} <= words, "no name is cut or broken"


def test_a_pipe_gets_a_row_a_line_however_long() -> None:
    name = "layers.0." + "x" * 3000
    text = plain_text(
        Listing(("module", "kernel"), [(name, "ref.a"), ("head", "b" * 500)]), fact("why", "word " * 2999)
    )
    headings, first, second, why = text.splitlines()
    assert first == f"{name}  ref.a"
    assert second.split() == ["head", "b" * 500]
    assert headings.split() == ["module", "kernel"]
    assert why == "why: " + " ".join(["word"] * 2999)


def test_a_narrow_table_puts_the_lead_on_a_line_of_its_own() -> None:
    rows = [("layers.0.attn.wq_a", "NVFP4", "12"), ("head", "BF16", "1,234")]
    listing = Listing(("module", "format", "bytes"), rows, to_right=frozenset({2}))
    assert plain_text(listing, width=20).splitlines() == [
        "module",
        "    format  bytes",
        "layers.0.attn.wq_a",
        "    NVFP4      12",
        "head",
        "    BF16    1,234",
    ]
    assert plain_text(listing, width=17).splitlines()[1:5] == [
        "    format bytes",
        "layers.0.attn.wq_",
        "a",
        "    NVFP4     12",
    ]


def test_long_lines_hang() -> None:
    assert plain_text(fact("why", "a bb ccc dddd eeeee", indent=2), width=18).splitlines() == [
        "  why: a bb ccc",
        "    dddd eeeee",
    ]
    assert plain_text(facts([("a", "b"), ("long", "c d")])).splitlines() == ["a     b", "long  c d"]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_names_from_files_are_never_acted_on(is_terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part of a page and every line beside one; 200 columns, so that nothing is wrapped."""
    out = Terminal()
    if not is_terminal:
        monkeypatch.setattr(Terminal, "isatty", lambda self: False)
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", out)
    monkeypatch.setenv("COLUMNS", "200")
    parts = [line(HOSTILE), fact(HOSTILE, HOSTILE), facts([(HOSTILE, HOSTILE)]), Listing(("a", "b"), [(HOSTILE, "x")])]
    show(*parts)
    tell("warning", f": {HOSTILE}")
    plain = "".join(out.page().split())
    assert "\x1b" not in plain
    assert all(part.isprintable() for part in out.page().splitlines())
    assert plain.count("".join(ESCAPED.split())) == 7


def test_generated_text_is_raw_in_a_pipe_and_harmless_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Köln\n\tis \x1b[31mred\x07\u202e"
    for isatty, expected in ((True, "Köln\n\tis \\x1b[31mred\\x07\\u202e"), (False, text)):
        out = Terminal()
        monkeypatch.setattr(Terminal, "isatty", lambda self, isatty=isatty: isatty)
        monkeypatch.setattr("sys.stdout", out)
        write_prose(text)
        assert out.getvalue() == expected


def test_a_line_of_the_log_is_one_line() -> None:
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "found %s", (HOSTILE,), sys.exc_info())
    first, *trace = SafeFormatter().format(record).split("\n")
    assert first == f"error: found {ESCAPED}"
    assert trace[-1] == f"ValueError: {ESCAPED}"
    assert all(part.isprintable() for part in trace)


def test_running_text_is_wrapped_for_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    assert max(map(len, wrapped("word " * 99, "  ", "    ").splitlines())) <= 120


SHOW = "from ownpath.terminal.console import show; from ownpath.terminal.page import line; show(line('x ', 'FAIL'))"


def shown(*, on_terminal: bool, **environment: str) -> str:
    """The bytes that a process writes to a terminal, or to a pipe."""
    kept = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", "COLORTERM")}
    read, write = pty.openpty() if on_terminal else os.pipe()
    try:
        subprocess.run(
            [sys.executable, "-c", SHOW], stdout=write, env=kept | {"TERM": "xterm"} | environment, check=True
        )
        return os.read(read, 10_000).decode().replace("\r\n", "\n")
    finally:
        os.close(read)
        os.close(write)


def test_colours_are_for_terminals_and_can_be_had_or_not() -> None:
    assert shown(on_terminal=False) == "x FAIL\n"
    assert "31m" in shown(on_terminal=True)
    assert "31m" in shown(on_terminal=False, FORCE_COLOR="1")
    for text in (shown(on_terminal=True, NO_COLOR="1"), shown(on_terminal=True, TERM="dumb")):
        assert "31m" not in text
        assert SGR.sub("", text).strip() == "x FAIL"
    assert re.fullmatch(r"x FAIL\s*", SGR.sub("", shown(on_terminal=True)))
