"""Verifications that are made up: what a report does with them does not depend on how they came about."""

from dataclasses import replace
from pathlib import Path

from ownpath.config import EngineConfig
from ownpath.finding import Finding, Verdict
from ownpath.verify.layers.measure import ROW_FACTOR, Measurement
from ownpath.verify.layers.teacher_forcing import ORDER
from ownpath.verify.run import StageResult, Verification, VerifyJob
from ownpath.verify.subject import Selection


def measured(layer_idx: int, slot: str, share: float) -> Measurement:
    """share: of its budget."""
    budget = 1.6e-2
    error = share * budget
    return Measurement(layer_idx, slot, error, error, 0.999, error, 12.5, 12.5, 0.0, 0.0, budget, "cute.nvfp4_linear")


def result_of(folder: Path, findings: list[Finding], rows: list[Measurement]) -> Verification:
    return Verification(VerifyJob(folder), (StageResult("layers", tuple(findings), 1.0, "", tuple(rows)),))


NAMES = ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a & b &lt; \x1b[31m\u202e</td>", "</table>")


def hostile(folder: Path) -> Verification:
    """Markup wherever a report has text from files."""
    moved = folder.rename(folder.with_name("<script>&'\"model"))
    findings = [Finding(name, f"layers.0.{name}", Verdict.FAIL, name, 1.0, name, name, name) for name in NAMES]
    rows = [replace(measured(0, name, 2.0), kernel=name) for name in NAMES]
    stages = (StageResult("<script>", tuple(findings), 1.0, "<script>why</script>", tuple(rows)),)
    return Verification(VerifyJob(moved, EngineConfig(), Selection()), stages, "<script>unreadable</script>")


def whole_model(folder: Path, share: float) -> Verification:
    """61 layers with every kind of value, within their budgets or all beyond them."""
    rows = [measured(layer_idx, slot, share) for layer_idx in range(61) for slot in ORDER]
    verdict = Verdict.PASS if share < 1 else Verdict.FAIL
    text = (
        "the first of this layer beyond its budget: rel-L2 4.8e-02, worst row 4.8e-02, budget 1.6e-02, cosine 0.999000"
    )
    allowed = f"1 time its budget over all rows, {ROW_FACTOR:g} times in one row, and finite"
    findings = [
        Finding("V01", f"layers.{m.layer_idx}.{m.slot}", verdict, text, m.excess, allowed, "the kernel", m.kernel)
        for m in rows
    ]
    warning = Finding("F06", "layers.3.ffn.experts.0", Verdict.WARN, "w1 and w3 have scales of their own")
    return result_of(folder, [*findings, warning], rows)
