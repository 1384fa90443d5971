"""Formats a verification for people and for programs."""

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import RenderableType

from ownpath.bench.record import device_name
from ownpath.checkpoint.header import MAX_HEADER_BYTES
from ownpath.files import FileError, open_regular, read_bytes
from ownpath.finding import Finding, Verdict, failed, warned
from ownpath.plan.plan import Plan
from ownpath.plan.show import plan_dict
from ownpath.terminal.page import Listing, fact, facts, line
from ownpath.terminal.text import counted, listed
from ownpath.verify.checks import SHARE_OF_BOUND, title_of
from ownpath.verify.fold import unfold_layers
from ownpath.verify.layers.measure import Measurement
from ownpath.verify.run import StageResult, Verification
from ownpath.verify.subject import Selection
from ownpath.versions import versions

MAX_FAILURES = 8
"""Lines shown for one failing check; the rest is counted. ``--json`` has them all."""
SCHEMA = "ownpath verify 1"
_LAYER = re.compile(r"(?:layers|mtp)\.[0-9]{1,3}(?=\.|$)")


def checkpoint_digest(folder: Path) -> str:
    """Digests config.json and every shard's header, by file name, with SHA-256: names, types and places of tensors.

    It distinguishes exports, not contents: weights are not read.
    """
    digest = hashlib.sha256()
    for path in sorted((folder / "config.json", *folder.glob("*.safetensors"))):
        if path.is_file():
            data = _digested(path)
            digest.update(f"{path.name} {len(data)}\n".encode() + data)
    return digest.hexdigest()


def _digested(path: Path) -> bytes:
    """Returns config.json or a shard's header; nothing where it cannot be read, which the stages told."""
    try:
        return read_bytes(path) if path.suffix == ".json" else _header(path)
    except (FileError, OSError):
        return b""


def _header(path: Path) -> bytes:
    with open_regular(path) as shard:
        length = os.pread(shard, 8, 0)
        return length + os.pread(shard, min(int.from_bytes(length, "little"), MAX_HEADER_BYTES), 8)


def plan_digest(plan: Plan) -> str:
    """Digests the output of ``ownpath plan --json`` with SHA-256: kernels, layouts and reasons."""
    return hashlib.sha256(json.dumps(plan_dict(plan), sort_keys=True).encode()).hexdigest()


def layer_of(where: str) -> str | None:
    """Returns the layer that a finding's place is in, as ``layers.3``."""
    match = _LAYER.match(where)
    return match[0] if match else None


def first_bad_layer(findings: Iterable[Finding]) -> str | None:
    """Returns the lowest layer with a failure."""
    places = (where for finding in failed(findings) for where in unfold_layers(finding.where))
    layers = {layer for where in places if (layer := layer_of(where))}
    return min(layers, key=_depth, default=None)


def _depth(layer: str) -> tuple[bool, int]:
    stack, _, number = layer.partition(".")
    return stack != "layers", int(number)


def worst_layer(findings: Iterable[Finding]) -> tuple[str, Finding] | None:
    """Returns the layer with the largest error of the layer checks (V01, or the first of them that measured any)."""
    measured = [f for f in findings if f.id.startswith("V") and f.number is not None and layer_of(f.where)]
    if not measured:
        return None
    first = min(finding.id for finding in measured)
    worst = max((f for f in measured if f.id == first), key=lambda f: _rank(f.number))
    return layer_of(worst.where) or "", worst


def _rank(number: float | None) -> float:
    """Ranks a number; NaN is worse than any."""
    return math.inf if number is None or math.isnan(number) else number


def kernels_of(plan: Plan) -> dict[str, int]:
    """Counts the plan's slots by kernel."""
    return dict(sorted(Counter(kernel for _, kernel in plan.slots.values()).items()))


def kernels_ran(result: Verification) -> dict[str, int]:
    """Counts the slots that a prompt called by kernel; empty where the ledger stage did not run."""
    return dict(sorted(Counter(call.kernel for call in result.ran).items()))


def report_dict(result: Verification) -> dict[str, object]:
    """Returns the report for programs; the keys are documented in docs/verify.md."""
    job, findings = result.job, result.findings
    plan = plan_of(result)
    worst = worst_layer(findings)
    layers = job.selection.layer_ids
    return {
        "schema": SCHEMA,
        "verdict": verdict_of(result),
        "unreadable": result.unreadable or None,
        "engine": result.engine or None,
        "model": str(job.folder),
        "checkpoint_digest": checkpoint_digest(job.folder),
        "plan_digest": None if plan is None else plan_digest(plan),
        "device": device_name(job.engine.device),
        "dtype": str(job.engine.dtype).removeprefix("torch."),
        "caches": None if plan is None else [asdict(cache) for cache in plan.caches],
        "versions": versions(),
        "selection": {
            "layers": None if layers is None else sorted(layers),
            "num_experts": job.selection.num_experts,
            "seed": job.selection.seed,
        },
        "seconds": round(seconds_of(result), 3),
        "counts": {verdict.value.lower(): count for verdict, count in _counts(findings).items()},
        "first_bad_layer": first_bad_layer(findings),
        "worst_layer": None if worst is None else {"layer": worst[0], "finding": _finding_dict(worst[1])},
        "kernels": None if plan is None else kernels_of(plan),
        "kernels_ran": kernels_ran(result) or None,
        "stages": [_stage_dict(stage) for stage in result.stages],
        "measurements": [_measurement_dict(measured) for measured in result.measurements],
    }


def caches_text(plan: Plan) -> str:
    """Names the formats of the caches, those of one format together."""
    kinds: dict[str, list[str]] = {}
    for cache in plan.caches:
        kinds.setdefault(f"{cache.format} ({cache.stored})", []).append(cache.keys)
    return "; ".join(f"{listed(names)}: {form}" for form, names in kinds.items())


def plan_of(result: Verification) -> Plan | None:
    """Returns the plan, if any stage made it."""
    subject = vars(result.job).get("subject")
    return None if subject is None else subject.plan


def verdict_of(result: Verification) -> str:
    """Returns "pass" or "fail"."""
    return "pass" if result.passed else "fail"


def seconds_of(result: Verification) -> float:
    """Sums the seconds of all stages."""
    return sum(stage.seconds for stage in result.stages)


def _counts(findings: Iterable[Finding]) -> dict[Verdict, int]:
    counts = Counter(finding.verdict for finding in findings)
    return {verdict: counts[verdict] for verdict in Verdict}


def _stage_dict(stage: StageResult) -> dict[str, object]:
    findings = [_finding_dict(finding) for finding in stage.findings]
    skipped = stage.skipped or None
    return {"name": stage.name, "seconds": round(stage.seconds, 3), "skipped": skipped, "findings": findings}


def _finding_dict(finding: Finding) -> dict[str, object]:
    fields = {name: value for name, value in vars(finding).items() if name != "limit"}
    return _named(fields | {"verdict": finding.verdict.value.lower()})


def _measurement_dict(measured: Measurement) -> dict[str, object]:
    return _named(dict(vars(measured)) | {"excess": measured.excess, "is_within": measured.is_within})


def _named(fields: dict[str, object]) -> dict[str, object]:
    """Replaces NaN and infinity, which JSON lacks, by their names."""
    strange = {key: str(x) for key, x in fields.items() if isinstance(x, float) and not math.isfinite(x)}
    return fields | strange


def report_page(result: Verification) -> list[RenderableType]:
    """Returns verdict, first bad and worst layer, kernels; failures with remedies; then every check in a line."""
    job, findings = result.job, result.findings
    worst, plan = worst_layer(findings), plan_of(result)
    rows = [("unreadable", result.unreadable)] if result.unreadable else []
    rows.append(("findings", f"{counts_text(findings)} in {seconds_of(result):.1f} s"))
    rows.append(("first bad layer", first_bad_layer(findings) or "none"))
    rows += [("largest error", worst_text(worst[1]))] if worst else []
    kernels = kernels_of(plan) if plan else kernels_ran(result)
    rows += [("kernels", ", ".join(f"{n} x {kernel}" for kernel, n in kernels.items()))] if kernels else []
    rows += [("caches", caches_text(plan))] if plan else []
    rows += [("limited to", limit) for limit in limits_of(job.selection)]
    rows += [("not run", told) for told in _skipped_stages(result.stages)]
    inside = f" in {result.engine}" * bool(result.engine)
    where = f"{job.folder.resolve().name}{inside} on {device_name(job.engine.device)}: "
    return [
        line(where, verdict_of(result).upper()),
        facts(rows),
        line(""),
        *_failure_parts(findings),
        Listing(("", "check", "what holds", "found"), [(*row[:3], row[4]) for row in check_rows(result)], num_lead=3),
    ]


def _skipped_stages(stages: Iterable[StageResult]) -> list[str]:
    """Says each reason once, with all the stages that it kept from running."""
    names: dict[str, list[str]] = {}
    for stage in stages:
        if stage.skipped:
            names.setdefault(stage.skipped, []).append(stage.name)
    return [f"{'stage' if len(those) == 1 else 'stages'} {listed(those)}: {why}" for why, those in names.items()]


_WORDS = {
    Verdict.FAIL: "failed",
    Verdict.WARN: "with a warning",
    Verdict.PASS: "passed",
    Verdict.SKIPPED: "skipped",
}


def counts_text(findings: Iterable[Finding]) -> str:
    """Formats how many findings have which verdict; a skipped check had nothing to look at."""
    counts = _counts(findings)
    shown = (verdict for verdict in _WORDS if counts[verdict] or verdict is not Verdict.WARN)
    return ", ".join(f"{counts[verdict]} {_WORDS[verdict]}" for verdict in shown)


def limits_of(selection: Selection) -> list[str]:
    """Lists what was left out on request; empty where nothing was."""
    limits = []
    if selection.layer_ids is not None:
        layers = "layer" if len(selection.layer_ids) == 1 else "layers"
        limits.append(f"{layers} {', '.join(map(str, sorted(selection.layer_ids)))}")
    if selection.num_experts is not None:
        limits.append(f"{counted(selection.num_experts, 'expert')} a layer, drawn with seed {selection.seed}")
    return limits


def worst_text(finding: Finding) -> str:
    """Formats place, check, number and limit of a finding."""
    number = math.nan if finding.number is None else finding.number
    if finding.id in SHARE_OF_BOUND:
        return f"{finding.where}: {share_text(number)} of what rounding may cause ({finding.id})"
    allowed = f", allowed: {finding.allowed}" if finding.allowed else ""
    return f"{finding.where}: {number:.3g}{allowed} ({finding.id})"


def share_text(share: float) -> str:
    """Formats a share of what is allowed: as a percentage, or how many times it was exceeded."""
    if not math.isfinite(share):
        return f"{share} times"
    return f"{100 * share:.2g} %" if share <= 1 else f"{share:.3g} times"


def _failure_parts(findings: Iterable[Finding]) -> list[RenderableType]:
    """Groups failures by check, then warnings: the places, then what to do, once for each remedy."""
    every = list(findings)
    parts = [part for check in failed_checks(every) for part in _places("FAIL", check)]
    parts += [part for check in warned_checks(every) for part in _places("warning", check)]
    return [*parts, line("")] if parts else []


def _places(word: str, check: "FailedCheck") -> Iterator[RenderableType]:
    for finding in check.shown:
        kernel = f" [{finding.kernel}]" if finding.kernel else ""
        allowed = f"; allowed: {finding.allowed}" if finding.allowed else ""
        yield line(word, f" {check.id} {finding.where}{kernel}: {finding.message}{allowed}")
    if check.num_more:
        yield line(word, f" {check.id} and {check.num_more:,} more (--json lists them)")
    yield from (fact("remedy", remedy, indent=5) for remedy in check.remedies)


@dataclass(frozen=True)
class FailedCheck:
    """The failures or the warnings of one check.

    shown: the first places; num_more: how many others there are; remedies: each once.
    """

    id: str
    shown: tuple[Finding, ...]
    num_more: int
    remedies: tuple[str, ...]


def failed_checks(findings: Iterable[Finding]) -> list[FailedCheck]:
    """Returns the failing checks in their order, with the places that every form of the report shows first."""
    return _checks_with(failed(findings))


def warned_checks(findings: Iterable[Finding]) -> list[FailedCheck]:
    """Returns the checks with warnings likewise."""
    return _checks_with(warned(findings))


def _checks_with(findings: list[Finding]) -> list[FailedCheck]:
    return [
        FailedCheck(
            id_,
            tuple(found[:MAX_FAILURES]),
            max(0, len(found) - MAX_FAILURES),
            tuple(dict.fromkeys(finding.remedy for finding in found if finding.remedy)),
        )
        for id_, found in _by_id(findings).items()
    ]


CHECK_HEADINGS = ("", "check", "", "worst", "found")


def check_rows(result: Verification) -> list[tuple[str, ...]]:
    """Returns one row for each check of each stage: the worst number, and the message or a count of verdicts."""
    rows: list[tuple[str, ...]] = []
    for stage in result.stages:
        for id_, found in sorted(_by_id(stage.findings).items()):
            counts = _counts(found)
            verdict = next(
                verdict for verdict in (Verdict.FAIL, Verdict.WARN, Verdict.PASS, Verdict.SKIPPED) if counts[verdict]
            )
            numbers = [finding.number for finding in found if finding.number is not None]
            number = f"{max(numbers, key=_rank):.4g}" if numbers else "-"
            rows.append((verdict.value, id_, title_of(id_), number, _outcome(found)))
    return rows


def _outcome(found: list[Finding]) -> str:
    """Formats one finding (or one reason to skip) by its message, several by counts of verdicts and, where their number
    is a share of what is allowed, the largest."""
    messages = dict.fromkeys(finding.message for finding in found)
    counts = _counts(found)
    if len(messages) == 1 and found[0].verdict in (Verdict.PASS, Verdict.SKIPPED):
        return found[0].message
    told = ", ".join(f"{counts[verdict]} {word}" for verdict, word in _WORDS.items() if counts[verdict])
    shares = [f.number for f in found if f.id in SHARE_OF_BOUND and f.number is not None]
    return f"{told}; at most {share_text(max(shares, key=_rank))} of what rounding may cause" if shares else told


def _by_id(findings: Iterable[Finding]) -> dict[str, list[Finding]]:
    groups: dict[str, list[Finding]] = {}
    for finding in findings:
        groups.setdefault(finding.id, []).append(finding)
    return groups
