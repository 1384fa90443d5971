"""One check's verdict: what was looked at, what was measured, what it had to be, and what to do about it."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ownpath.verdict import Verdict


@dataclass(frozen=True)
class Finding:
    """What one check found in one place.

    id: the check's stable name, such as ``K01``. where: the tensor, expert, slot, layer or file.
    message: one line. number, allowed: what was measured, and what it had to be, in words.
    kernel: the kernel that was looked at, where there was one.
    """

    id: str
    where: str
    verdict: Verdict
    message: str
    number: float | None = None
    allowed: str = ""
    remedy: str = ""
    kernel: str = ""


def failed(findings: Iterable[Finding]) -> list[Finding]:
    """Those that failed, in their order."""
    return [finding for finding in findings if finding.verdict is Verdict.FAIL]


def plain(finding: Finding) -> dict[str, Any]:
    """A finding as JSON says it; ``finding_of`` reads it back."""
    return asdict(finding) | {"verdict": finding.verdict.name}


def finding_of(fields: Mapping[str, Any]) -> Finding:
    """Errors: KeyError or TypeError for what ``plain`` never wrote."""
    return Finding(**{**fields, "verdict": Verdict[fields["verdict"]]})
