"""The result of one check in one place, shared by inspect, verify, selftest and diff.

Each of these commands prints findings in its own form; no other type carries a verdict through the package.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any


class Verdict(Enum):
    """A check's outcome.

    FAIL: the answer here would be wrong or incomplete. WARN: what is wrong changes no answer here; other engines, which
    the message names, are wrong with it. SKIPPED: there was nothing to check.
    """

    PASS = "pass"
    FAIL = "FAIL"
    WARN = "warning"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Finding:
    """The verdict of one check in one place.

    id: the check's stable name, such as ``K01`` or ``missing-tensor``. where: the tensor, expert, slot, layer, file or
    field; empty where the check looks at the whole. message: one line. number, allowed: the measured number, and in
    words what it had to be. limit: the same as a number, where it is one. kernel: the kernel that was looked at.
    """

    id: str
    where: str
    verdict: Verdict
    message: str
    number: float | None = None
    allowed: str = ""
    remedy: str = ""
    kernel: str = ""
    limit: float | None = None

    @classmethod
    def judged(
        cls,
        id: str,
        where: str,
        is_good: bool,
        message: str,
        number: float | None = None,
        allowed: str = "",
        remedy: str = "",
        kernel: str = "",
    ) -> "Finding":
        """Returns a finding that passed or failed; ``remedy`` is kept for a failure only."""
        verdict = Verdict.PASS if is_good else Verdict.FAIL
        return cls(id, where, verdict, message, number, allowed, "" if is_good else remedy, kernel)


def failed(findings: Iterable[Finding]) -> list[Finding]:
    """Returns the findings that failed, in their order."""
    return [finding for finding in findings if finding.verdict is Verdict.FAIL]


def warned(findings: Iterable[Finding]) -> list[Finding]:
    """Returns the findings that are warnings, in their order."""
    return [finding for finding in findings if finding.verdict is Verdict.WARN]


def finding_fields(finding: Finding) -> dict[str, object]:
    """Returns a finding as JSON values; ``finding_from`` reads it back."""
    return asdict(finding) | {"verdict": finding.verdict.name}


def finding_from(fields: Mapping[str, Any]) -> Finding:
    """Reads what ``finding_fields`` wrote. Errors: KeyError or TypeError for anything else."""
    return Finding(**{**fields, "verdict": Verdict[fields["verdict"]]})
