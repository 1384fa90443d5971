"""Renders a verification as one HTML page: no script, no network, no other files.

It shows the same as ``report``, through the same functions. Text that comes from a checkpoint is escaped.
"""

import math
from collections.abc import Iterable, Sequence
from html import escape

from ownpath.bench.record import device_name
from ownpath.finding import Finding, failed
from ownpath.plan.plan import Plan
from ownpath.plan.show import companion_rows, plan_rows
from ownpath.terminal.text import printable
from ownpath.verify import report
from ownpath.verify.checks import TITLES
from ownpath.verify.layers.measure import ROW_FACTOR, Measurement
from ownpath.verify.layers.teacher_forcing import ORDER
from ownpath.verify.plots import Axis, Line, Point, small_plot
from ownpath.verify.run import Verification
from ownpath.versions import versions

MAX_ROWS = 1000
"""Failing rows on the page; the rest is counted. ``--json`` has them all."""
_SLOTS = ("embed", *ORDER, "head")
_ENDS = ("embed", "head")
STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1c2024;--soft:#60646c;--edge:#d9d9e0;--card:#f7f7f9;--good:#1a7f37;
--bad:#c4161c;--engine:#0b68cb;--other:#b45309}
@media(prefers-color-scheme:dark){:root{--paper:#111113;--ink:#edeef0;--soft:#b0b4ba;--edge:#363a3f;--card:#18191b;
--good:#3dd68c;--bad:#ff7b7b;--engine:#70b8ff;--other:#ffb454}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1720px;padding:1rem;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem;overflow-wrap:anywhere}h2{font-size:1.15rem;margin:2rem 0 .5rem}
h3{font-size:1rem;margin:1rem 0 .3rem}
code,td{font:13px/1.45 ui-monospace,monospace}code,.facts td{overflow-wrap:anywhere}
.verdict{padding:.1em .5em;border-radius:.3em;color:var(--paper);background:var(--good)}
.verdict.fail{background:var(--bad)}
.pass{color:var(--good)}.FAIL{color:var(--bad);font-weight:bold}.skipped,.note{color:var(--soft)}
.wide{overflow-x:auto}table{border-collapse:collapse;min-width:100%}
th,td{text-align:left;vertical-align:top;padding:.2rem .7rem .2rem 0;border-bottom:1px solid var(--edge)}
td:last-child{min-width:12rem}.facts td:first-child{white-space:nowrap;color:var(--soft)}
th{font-weight:600;color:var(--soft);font-size:13px}
.failing{border-left:4px solid var(--bad);padding:.1rem 1rem;background:var(--card);margin:.7rem 0}
.failing li{overflow-wrap:anywhere}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,260px),1fr));gap:.6rem}
figure{margin:0;padding:.4rem .5rem;border:1px solid var(--edge);border-radius:.4rem;background:var(--card)}
figure.off{border-color:var(--bad)}figcaption{font-size:12.5px;overflow-wrap:anywhere}
@media(min-width:1200px){.beside{display:grid;grid-template-columns:minmax(0,3fr) minmax(0,2fr);gap:1.5rem}}
svg{display:block;width:100%;height:auto}svg text{font:10px system-ui,sans-serif;fill:var(--soft)}
svg .y{text-anchor:end}svg .x{text-anchor:middle}
.grid{stroke:var(--edge)}.axis{stroke:var(--soft);fill:none}
polyline{fill:none;stroke-width:1.2}polyline.engine{stroke:var(--engine);opacity:.5}
polyline.budget,polyline.reference{stroke:var(--other);stroke-dasharray:5 3;stroke-width:1.5}
.ok circle{fill:var(--engine);stroke:transparent;stroke-width:5}
.bad path{fill:var(--bad);stroke:var(--paper)}
.key-engine{color:var(--engine)}.key-other{color:var(--other)}.key-bad{color:var(--bad)}
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def report_html(result: Verification) -> str:
    """Renders the page: verdict, failing checks, plots with the plan beside them, environment, every check, failing
    rows."""
    name = _text(f"{result.job.folder.resolve().name} on {device_name(result.job.engine.device)}")
    verdict = report.verdict_of(result)
    plan = report.plan_of(result)
    head = [
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{name}: {verdict.upper()}</title>",
        f"<style>{STYLE}</style>",
    ]
    body = [
        f'<h1>{name}: <span class="verdict {verdict}">{verdict.upper()}</span></h1>',
        *_summary(result),
        *_failing(result.findings),
        '<div class="beside"><div>',
        *_plots(result.measurements),
        "</div><div>",
        *_plan(plan),
        "</div></div>",
        *_environment(result, plan),
        *_checks(result),
        *_failing_rows(failed(result.findings)),
    ]
    lines = ["<!DOCTYPE html>", '<html lang="en">', "<head>", *head, "</head>", "<body>", *body, "</body>", "</html>"]
    return "\n".join(lines) + "\n"


def _text(told: str) -> str:
    return escape(printable(told))


def _summary(result: Verification) -> list[str]:
    findings = result.findings
    worst = report.worst_layer(findings)
    rows = [("unreadable", result.unreadable)] if result.unreadable else []
    rows.append(("findings", f"{report.counts_text(findings)} in {report.seconds_of(result):.1f} s"))
    rows.append(("first bad layer", report.first_bad_layer(findings) or "none"))
    rows += [("worst layer", report.worst_text(worst[1]))] if worst else []
    rows += [("limited to", limit) for limit in report.limits_of(result.job.selection)]
    rows += [(f"stage {stage.name}", f"not run: {stage.skipped}") for stage in result.stages if stage.skipped]
    return _table((), rows)


def _failing(findings: Iterable[Finding]) -> list[str]:
    """Renders failures like the text report: the first places of each failing check, then the remedies."""
    parts = []
    for check in report.failed_checks(findings):
        parts.append(f'<div class="failing"><h3>{_text(check.id)} {_text(TITLES.get(check.id, ""))}</h3><ul>')
        parts += [f"<li>{_place(finding)}</li>" for finding in check.shown]
        parts += [f"<li>and {check.num_more} more, below</li>"] if check.num_more else []
        parts.append("</ul>")
        parts += [f"<p><b>Remedy:</b> {_text(remedy)}</p>" for remedy in check.remedies]
        parts.append("</div>")
    return ["<h2>Failing checks</h2>", *parts] if parts else []


def _place(finding: Finding) -> str:
    kernel = f" [{_text(finding.kernel)}]" if finding.kernel else ""
    allowed = f"; allowed: {_text(finding.allowed)}" if finding.allowed else ""
    return f"<code>{_text(finding.where)}</code>{kernel}: {_text(finding.message)}{allowed}"


def _plots(measurements: Sequence[Measurement]) -> list[str]:
    if not measurements:
        return ["<h2>Error and magnitude</h2>", '<p class="note">No layer was compared: nothing to plot.</p>']
    by_slot: dict[str, list[Measurement]] = {slot: [] for slot in _SLOTS}
    for measured in measurements:
        by_slot.setdefault(measured.slot, []).append(measured)
    layers = [m.layer_idx for m in measurements if m.slot not in _ENDS]
    common = Axis(min(layers, default=0), max(layers, default=0))
    shown = [
        (slot, sorted(found, key=lambda m: m.layer_idx), common if slot not in _ENDS else _single_axis(found[0]))
        for slot, found in by_slot.items()
        if found
    ]
    return [
        "<h2>Error by layer</h2>",
        f'<p class="note"><span class="key-engine">●</span> relative L2 distance to the reference over all rows, or '
        f"1/{ROW_FACTOR:g} of the worst row's where that is more, given the reference's streams; "
        '<span class="key-other">┅</span> budget; <span class="key-bad">◆</span> beyond it, or not finite.</p>',
        '<div class="plots">',
        *(_error_plot(*kind) for kind in shown),
        "</div>",
        "<h2>Largest magnitude by layer</h2>",
        '<p class="note"><span class="key-engine">●</span> engine; <span class="key-other">┅</span> reference; '
        f'<span class="key-bad">◆</span> further apart than {ROW_FACTOR:g} budgets, relative.</p>',
        '<div class="plots">',
        *(_amax_plot(*kind) for kind in shown),
        "</div>",
    ]


def _single_axis(measured: Measurement) -> Axis:
    """The axis of values that belong to no layer."""
    return Axis(measured.layer_idx, measured.layer_idx, is_numbered=False)


def _error_plot(slot: str, found: Sequence[Measurement], axis: Axis) -> str:
    points = [Point(m.layer_idx, m.excess * m.budget, _error_title(m), not m.is_within) for m in found]
    engine = Line("engine", tuple((point.layer_idx, point.value) for point in points))
    budget = Line("budget", tuple((m.layer_idx, m.budget) for m in found))
    worst = max(m.excess for m in found)
    told = f"at most {worst:.2g} of its budget" if math.isfinite(worst) else "not finite"
    return _figure(slot, told, small_plot(f"{slot}: error by layer", axis, points, [engine, budget]), points)


def _amax_plot(slot: str, found: Sequence[Measurement], axis: Axis) -> str:
    points = [Point(m.layer_idx, m.amax, _amax_title(m), not m.is_as_large) for m in found]
    engine = Line("engine", tuple((point.layer_idx, point.value) for point in points))
    reference = Line("reference", tuple((m.layer_idx, m.reference_amax) for m in found))
    told = f"up to {max(m.amax for m in found):.3g}"
    plot = small_plot(f"{slot}: largest magnitude by layer", axis, points, [engine, reference])
    return _figure(slot, told, plot, points)


def _figure(slot: str, told: str, plot: str, points: Sequence[Point]) -> str:
    num_bad = sum(point.is_bad for point in points)
    mark = f' <b class="FAIL">{num_bad} of {len(points)} off</b>' if num_bad else ""
    kind = ' class="off"' if num_bad else ""
    return f"<figure{kind}><figcaption><b>{_text(slot)}</b> {told}{mark}</figcaption>{plot}</figure>"


def _name(measured: Measurement) -> str:
    return measured.slot if measured.slot in _ENDS else f"layers.{measured.layer_idx}.{measured.slot}"


def _error_title(m: Measurement) -> str:
    bad = f", {m.nonfinite_share:.1%} not finite" if m.nonfinite_share else ""
    kernel = f" [{m.kernel}]" if m.kernel else ""
    return f"{_name(m)}{kernel}: {m.rel_l2:.1e}, worst row {m.worst_row:.1e}, budget {m.budget:.1e}{bad}"


def _amax_title(m: Measurement) -> str:
    return f"{_name(m)}: {m.amax:.4g}, reference {m.reference_amax:.4g}"


def _plan(plan: Plan | None) -> list[str]:
    """Renders the plan's rows, folded as ``ownpath plan`` folds them."""
    if plan is None:
        return ["<h2>Plan</h2>", '<p class="note">There is none.</p>']
    rows: list[tuple[str, ...]] = []
    for row in plan_rows(plan):
        encoding, format_, runner, kernel, layout = row.cells
        rows.append((row.title, runner, kernel, layout, format_, encoding))
    rows += [(row.title, *row.cells, "-", "-", "-") for row in companion_rows(plan)]
    return ["<h2>Plan</h2>", *_table(("slot", "runner", "kernel", "layout", "format", "stored as"), rows)]


def _environment(result: Verification, plan: Plan | None) -> list[str]:
    job = result.job
    rows = [
        ("model", str(job.folder)),
        ("checkpoint digest", report.checkpoint_digest(job.folder)),
        *([("plan digest", report.plan_digest(plan))] if plan else []),
        ("device", device_name(job.engine.device)),
        ("dtype", str(job.engine.dtype).removeprefix("torch.")),
        *((name, version) for name, version in versions().items() if version),
    ]
    kernels = report.kernels_of(plan) if plan else {}
    rows += [("kernels", ", ".join(f"{count} x {kernel}" for kernel, count in kernels.items()))] if kernels else []
    return ["<h2>Environment</h2>", *_table((), rows)]


def _checks(result: Verification) -> list[str]:
    return ["<h2>Checks</h2>", *_table(report.CHECK_HEADINGS, report.check_rows(result))]


def _failing_rows(findings: Sequence[Finding]) -> list[str]:
    if not findings:
        return []
    rows = [(f.id, f.where, f.kernel, _number(f.number), f.allowed, f.message) for f in findings[:MAX_ROWS]]
    more = len(findings) - MAX_ROWS
    note = [f'<p class="note">and {more} more (--json lists them)</p>'] if more > 0 else []
    return ["<h2>Failing rows</h2>", *_table(("check", "where", "kernel", "number", "allowed", "found"), rows), *note]


def _number(number: float | None) -> str:
    if number is None:
        return ""
    return f"{number:.4g}" if math.isfinite(number) else str(number)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Renders a table; without headings, of names and values. A cell that is a verdict has its colour."""
    head = f"<tr>{''.join(f'<th>{_text(heading)}</th>' for heading in headings)}</tr>" if headings else ""
    lines = [f"<tr>{''.join(_cell(cell) for cell in row)}</tr>" for row in rows]
    kind = "" if headings else ' class="facts"'
    return [f'<div class="wide"><table{kind}>', *([head] if head else []), *lines, "</table></div>"]


def _cell(told: str) -> str:
    kind = f' class="{told}"' if told in ("pass", "FAIL", "skipped") else ""
    return f"<td{kind}>{_text(told)}</td>"
