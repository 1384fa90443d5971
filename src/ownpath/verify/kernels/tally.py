"""Collects results of the kernels stage into findings, all written in one way."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from ownpath.conformance.bounds import NO_DEVIATION, Deviation
from ownpath.finding import Finding, Verdict

NEAR_FLOAT64 = "at most what rounding may cause"


@dataclass
class Tally:
    """Results of one check in one layer: a finding for each wrong place, or one with the largest of the right results.

    A deviation's number is the worst element's error over what its arithmetic allows.
    """

    id: str
    where: str
    what: str
    remedy: str
    nothing: str = "there is none here"
    count: int = 0
    worst: Deviation = NO_DEVIATION
    worst_at: str = ""
    kernels: dict[str, None] = field(default_factory=dict)
    failures: dict[str, Finding] = field(default_factory=dict)

    def add(self, where: str, kernel: str, found: Deviation, message: str = "") -> None:
        """Adds one comparison. The worst of each place is reported."""
        self.count += 1
        self.kernels.setdefault(kernel)
        if found.ratio >= self.worst.ratio:
            self.worst, self.worst_at = found, where
        earlier = self.failures.get(where)
        if not found.is_allowed and (earlier is None or found.ratio > (earlier.number or 0.0)):
            text = message or str(found)
            self.failures[where] = Finding(
                self.id, where, Verdict.FAIL, text, found.ratio, NEAR_FLOAT64, self.remedy, kernel
            )

    def fail(self, where: str, kernel: str, message: str) -> None:
        """Adds a wrong place that has no number."""
        self.count += 1
        self.failures.setdefault(where, Finding(self.id, where, Verdict.FAIL, message, None, "", self.remedy, kernel))

    def judge(self, where: str, kernel: str, problem: str) -> None:
        """Adds a place that is right if ``problem`` is empty, and has no number."""
        if problem:
            self.fail(where, kernel, problem)
            return
        self.count += 1
        self.kernels.setdefault(kernel)

    @contextmanager
    def catch_errors(self, where: str, kernel: str, prefix: str = "") -> Iterator[None]:
        """Turns any exception raised inside into a wrong place."""
        try:
            yield
        except Exception as error:
            self.fail(where, kernel, f"{prefix}{error_of(error)}")

    def findings(self) -> Iterator[Finding]:
        """Yields the failures, or one pass; a skip where nothing was looked at."""
        if self.failures:
            yield from self.failures.values()
        elif not self.count:
            yield Finding(self.id, self.where, Verdict.SKIPPED, f"{self.what}: {self.nothing}")
        else:
            worst = f", worst in {self.worst_at}" if self.worst_at else ""
            number, allowed = (self.worst.ratio, NEAR_FLOAT64) if self.worst_at else (None, "")
            message = f"{self.what}: {self.count} comparisons{worst}"
            yield Finding(self.id, self.where, Verdict.PASS, message, number, allowed, kernel=", ".join(self.kernels))


def error_of(error: Exception) -> str:
    """Formats an error as one line."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
