"""The state of the process that ``/health`` and ``/ready`` tell, and for which the server ends itself."""

from dataclasses import dataclass

from ownpath.engine.engine import Engine

_MOST_SEEN_S = 1.0
"""A look counts at most this long, however long ago the last one was: a process that was stopped did not hang."""


@dataclass
class Vitals:
    """The state of the engine, looked at from outside.

    step_timeout_s: a step that takes longer hangs. failed_checks: ids of the self-test's checks that failed.
    """

    engine: Engine
    step_timeout_s: float = 300.0
    failed_checks: str = ""
    is_draining: bool = False
    _seen_step: int = 0
    _seen_s: float = 0.0
    _looked_at: float | None = None

    def look(self, now: float) -> str | None:
        """Looks at the engine; returns why it will answer no request any more, if it will not.

        A fault found once stays: ``Engine.give_up`` is called with it. now: seconds of a monotonic clock.
        """
        since = 0.0 if self._looked_at is None else min(now - self._looked_at, _MOST_SEEN_S)
        self._looked_at = now
        is_same = self.engine.is_stepping and self.engine.num_steps == self._seen_step
        self._seen_step = self.engine.num_steps
        self._seen_s = self._seen_s + since if is_same else 0.0
        fault = self.fault()
        if fault is None and self._seen_s > self.step_timeout_s:
            fault = f"a step of the engine has taken more than {self.step_timeout_s:g} seconds"
        if fault is not None:
            self.engine.give_up(fault)
        return fault

    def fault(self) -> str | None:
        """Returns why the engine stopped by itself; None while it runs, and if it was asked to stop."""
        if self.engine.failure is not None:
            return self.engine.failure
        return "the engine's thread has ended" if self.engine.has_died else None

    def health(self) -> str | None:
        """Returns why no request can be run; None if one can."""
        return self.fault() or (None if self.engine.is_alive else "the engine has stopped")

    def readiness(self) -> str | None:
        """Returns why no request should be sent here; None if one should."""
        if self.is_draining:
            return "the server is shutting down"
        if self.failed_checks:
            return f"served unverified: the self-test failed {self.failed_checks}"
        return self.health()
