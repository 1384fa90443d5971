"""Breaks in captured graphs: a file that is imported before they are turned on gets them, and nothing else changes."""

import functools
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ownpath.integrations.vllm.breaks import marked_methods, mend_breaks

SOURCE = """
import switch
from switch import eager_break_during_capture


def other(function):
    return function


class Attention:
    def forward(self, x):
        return self.attend(x), self.index(x)

    @eager_break_during_capture
    def attend(self, x):
        return ["attend", x]

    @other
    @eager_break_during_capture
    def index(self, x):
        return ["index", x]

    @other
    def project(self, x):
        return ["project", x]


class Fewer(Attention):
    def index(self, x):
        return ["fewer", x]
"""


class Switch(ModuleType):
    """vLLM's decorator: it looks whether breaks are on when it is applied."""

    is_on = False

    def eager_break_during_capture(self, function: Any) -> Any:
        if not self.is_on:
            return function

        @functools.wraps(function)
        def marked(*args: Any) -> Any:
            return ["break", *function(*args)]

        return marked


@pytest.fixture
def switch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Switch:
    made = Switch("switch")
    monkeypatch.setitem(sys.modules, "switch", made)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "attention_file.py").write_text(SOURCE)
    monkeypatch.delitem(sys.modules, "attention_file", raising=False)
    return made


def test_methods_imported_too_early_break_and_others_do_not(switch: Switch) -> None:
    file = import_module("attention_file")
    attention, fewer = file.Attention(), file.Fewer()
    switch.is_on = True
    assert attention.forward(1) == (["attend", 1], ["index", 1])
    assert mend_breaks(file, switch.eager_break_during_capture) == ("Attention.attend", "Attention.index")
    assert attention.forward(1) == (["break", "attend", 1], ["break", "index", 1])
    assert fewer.forward(1) == (["break", "attend", 1], ["fewer", 1])
    assert attention.project(1) == ["project", 1]
    assert mend_breaks(file, switch.eager_break_during_capture) == ()
    assert attention.forward(1) == (["break", "attend", 1], ["break", "index", 1])


def test_a_file_imported_in_time_is_left_alone(switch: Switch) -> None:
    switch.is_on = True
    file = import_module("attention_file")
    before = dict(vars(file.Attention))
    assert mend_breaks(file, switch.eager_break_during_capture) == ()
    assert dict(vars(file.Attention)) == before


def test_nothing_breaks_where_breaks_are_off(switch: Switch) -> None:
    file = import_module("attention_file")
    assert mend_breaks(file, switch.eager_break_during_capture) == ()
    assert file.Attention().forward(1) == (["attend", 1], ["index", 1])


def test_marks_are_read_from_the_source() -> None:
    assert list(marked_methods(SOURCE)) == [("Attention", "attend"), ("Attention", "index")]
