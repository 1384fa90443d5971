"""Words and numbers as people read them, and what of a text is escaped."""

import pytest

from ownpath.terminal.text import (
    MAX_CHARS,
    counted,
    duration_text,
    listed,
    printable,
    printable_lines,
    printable_prose,
    quoted,
    size_text,
)

ACTED_ON = {
    "escape": "\x1b[31m",
    "link": "\x1b]8;;http://evil\x1b\\",
    "clipboard": "\x1b]52;c;cGF5bG9hZA==\x07",
    "carriage return": "safe\rspoofed",
    "backspace": "a\x08b",
    "C1 control": "\x9b31m",
    "C1 string": "\x9d0;title\x9c",
    "bidi override": "\u202egpj.exe",
    "bidi isolate": "\u2066x\u2069",
    "line separator": "a\u2028b",
    "surrogate": "a\udcff",
    "delete": "\x7f",
}


@pytest.mark.parametrize("text", ACTED_ON.values(), ids=ACTED_ON)
def test_no_text_keeps_what_a_terminal_acts_on(text: str) -> None:
    for shown in (printable(text), printable_lines(text), printable_prose(text)):
        assert shown.isprintable()
        assert shown.encode("utf-8")
        assert "\\" in shown


def test_a_name_is_one_line_and_prose_is_what_it_was() -> None:
    assert printable("a\nb\tc") == r"a\nb\tc"
    assert printable_lines("a\x07\nb\n") == "a\\x07\nb\n"
    kept = (
        "Zeile\n\tmit Tab, Köln, 北京\u3000全角, \u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645, 👩\u200d🔬, a\u00a0b"
    )
    assert printable_prose(kept) == kept
    assert printable("layers.0.attn.wq_a [red]x[/red]") == "layers.0.attn.wq_a [red]x[/red]"


def test_a_name_of_megabytes_is_cut_and_says_so() -> None:
    assert printable("x" * MAX_CHARS) == "x" * MAX_CHARS
    shown = printable("\x1b" * (MAX_CHARS + 1000))
    assert shown.startswith(r"\x1b" * MAX_CHARS)
    assert shown.endswith("… (1,000 more characters)")
    assert quoted("a" * 100) == f"'{'a' * 60}…'"


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (counted(0, "problem"), "0 problems"),
        (counted(1, "problem"), "1 problem"),
        (counted(2, "problem"), "2 problems"),
        (counted(1, "matrix", "matrices"), "1 matrix"),
        (counted(12345, "matrix", "matrices"), "12,345 matrices"),
        (listed([]), ""),
        (listed(["a"]), "a"),
        (listed(["a", "b"]), "a and b"),
        (listed(["a", "b", "c"]), "a, b and c"),
        (size_text(0), "0 B"),
        (size_text(999), "999 B"),
        (size_text(1000), "1.0 kB"),
        (size_text(14_300_000), "14.3 MB"),
        (size_text(1.4e9), "1.4 GB"),
        (size_text(160e9), "160.0 GB"),
        (duration_text(0.26), "0.3 s"),
        (duration_text(59.6), "1 min 00 s"),
        (duration_text(12.3), "12 s"),
        (duration_text(245), "4 min 05 s"),
    ],
)
def test_numbers_read_well(shown: str, expected: str) -> None:
    assert shown == expected
