"""A test that fails is named when it fails."""

from types import SimpleNamespace
from typing import Any

import pytest
from support.failures import NamedAtOnce


def lines_of(*reports: Any) -> list[str]:
    written: list[str] = []
    plugins = SimpleNamespace(get_plugin=lambda name: SimpleNamespace(write_line=written.append))
    named = NamedAtOnce(SimpleNamespace(pluginmanager=plugins))  # type: ignore[arg-type]
    for report in reports:
        named.pytest_runtest_logreport(report)
    return written


def report(failed: bool, crash: str | None) -> SimpleNamespace:
    longrepr = "setup" if crash is None else SimpleNamespace(reprcrash=SimpleNamespace(message=crash))
    return SimpleNamespace(failed=failed, nodeid="tests/a.py::test_b[3]", longrepr=longrepr)


@pytest.mark.parametrize(
    ("crash", "why"), [("AssertionError: 1 is not 2\nassert 1 == 2", ": AssertionError: 1 is not 2"), (None, "")]
)
def test_a_failed_test_has_a_line(crash: str | None, why: str) -> None:
    assert lines_of(report(False, None), report(True, crash)) == [f"\ntests/a.py::test_b[3] failed{why}"]
