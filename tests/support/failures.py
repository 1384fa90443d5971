"""Names a failed test when it fails: a run that is cut off never writes its summary."""

import pytest


class NamedAtOnce:
    """Writes a line for each test that fails, with the first line of why."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and terminal is not None:
            crash = getattr(report.longrepr, "reprcrash", None)
            why = "" if crash is None else f": {crash.message.splitlines()[0]}"
            terminal.write_line(f"\n{report.nodeid} failed{why}")
