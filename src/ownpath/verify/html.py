"""Renders a verification as one HTML page: no script, no network, no other files.

It shows the same as ``report``, through the same functions. ``page.html`` and ``page.css`` are its frame.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from string import Template

from ownpath.bench.record import device_name
from ownpath.finding import Finding, failed
from ownpath.plan.plan import Plan
from ownpath.plan.show import companion_rows, plan_rows
from ownpath.verify import report
from ownpath.verify.checks import TITLES
from ownpath.verify.fold import unfold_layers
from ownpath.verify.heatmap import LEVELS, Cell, Column, columns_of, heat_map, measured_name, short_number
from ownpath.verify.layers.measure import Measurement
from ownpath.verify.markup import Html, join, render
from ownpath.verify.run import STAGES, Verification
from ownpath.versions import versions

_MARKS = {"pass": ("good", "✓"), "FAIL": ("bad", "✕"), "skipped": ("soft", "–")}
"""A verdict's class and sign, so that colour alone says nothing."""


def report_html(result: Verification) -> str:
    """Renders the page: verdict, device and kernels, failing checks, heat map, every check, every value, the plan."""
    folder = Path(__file__)
    device, verdict = device_name(result.job.engine.device), report.verdict_of(result).upper()
    return Template(folder.with_name("page.html").read_text(encoding="utf-8")).substitute(
        title=join(f"{verdict}: {_model(result)} on {device}"),
        style=folder.with_name("page.css").read_text(encoding="utf-8"),
        header=join(_verdict(result, device), _facts(result)),
        failing=_failing(result.findings),
        stages=_stages(result),
        map=_map(result),
        details=join(_values(result.measurements), _plan(report.plan_of(result)), _environment(result)),
    )


def _model(result: Verification) -> str:
    return result.job.folder.resolve().name


def _verdict(result: Verification, device: str) -> Html:
    word = "✓ PASS" if result.passed else "✕ FAIL"
    dtype = str(result.job.engine.dtype).removeprefix("torch.")
    told = render("b", word), render("span", render("strong", _model(result)), f" on {device}, {dtype}")
    return render("h1", *told, class_=f"verdict {report.verdict_of(result)}")


def _facts(result: Verification) -> Html:
    """Renders what a reader asks first: how many checks, which kernels, the first bad layer."""
    findings = result.findings
    worst = report.worst_layer(findings)
    rows = [("unreadable", result.unreadable)] if result.unreadable else []
    rows.append(("findings", f"{report.counts_text(findings)} in {report.seconds_of(result):.1f} s"))
    rows += [("limited to", limit) for limit in report.limits_of(result.job.selection)]
    rows.append(_kernels(result))
    rows.append(("first bad layer", report.first_bad_layer(findings) or "none"))
    rows += [("worst layer", report.worst_text(worst[1]))] if worst else []
    return _dl(rows)


def _dl(rows: Iterable[tuple[str, str]]) -> Html:
    return render("dl", *(join(render("dt", name), render("dd", told)) for name, told in rows), class_="facts")


def _kernels(result: Verification) -> tuple[str, Html]:
    """Renders what ran beside what was planned; a kernel that ran unplanned is marked."""
    plan, ran = report.plan_of(result), report.kernels_ran(result)
    planned = report.kernels_of(plan) if plan else {}
    told = []
    for kernel in sorted(planned | ran):
        count = f" ×{ran[kernel]}" if kernel in ran else f" {'none' if ran else planned[kernel]} planned"
        is_bad = kernel not in planned
        told.append(render("span", "✕ " * is_bad, render("code", kernel), count, class_="bad" * is_bad))
    return "kernels that ran" if ran else "planned kernels", render("div", *told, class_="chips")


def _failing(findings: Iterable[Finding]) -> Html:
    """Renders failures like the text report: each failing check's first places, then what to do."""
    articles = []
    for check in report.failed_checks(findings):
        first, *others = (render("li", _place(finding)) for finding in check.shown)
        others += [render("li", f"and {check.num_more} more (--json lists them)")] if check.num_more else []
        count = len(check.shown) + check.num_more - 1
        more = render("details", render("summary", f"{count} more"), render("ul", *others))
        title = render("h3", render("span", f"✕ {check.id} ", class_="bad"), TITLES.get(check.id, ""))
        remedies = [render("p", render("b", "Remedy: "), remedy) for remedy in check.remedies]
        articles.append(render("article", title, render("ul", first), *([more] if others else []), *remedies))
    return render("section", render("h2", "Failing checks"), *articles, class_="failing") if articles else Html()


def _place(finding: Finding) -> Html:
    kernel = f" [{finding.kernel}]" if finding.kernel else ""
    allowed = f"; allowed: {finding.allowed}" if finding.allowed else ""
    return join(render("code", finding.where), f"{kernel}: {finding.message}{allowed}")


def _map(result: Verification) -> Html:
    """Renders the heat map, with a line above the first bad layer that says where the layer goes wrong first."""
    rows = heat_map(result)
    columns, first_bad = columns_of(rows), report.first_bad_layer(result.findings)
    title = render("h2", "Error over budget, layer by layer")
    if not rows:
        return render("section", title, render("p", "No layer was compared.", class_="soft"), class_="map")
    lines = []
    for name, cells in rows.items():
        is_first = name == first_bad
        if is_first:
            told = f"▼ first bad layer: {_first_failure(name, result.findings)}"
            lines.append(render("tr", render("th", told, colspan=str(len(columns) + 1)), class_="flag"))
        lines.append(_row(name, cells, columns, is_first))
    heat = render("table", _headings(columns), render("tbody", *lines), class_="heat")
    return render("section", title, _legend(), heat, class_="map")


def _first_failure(layer: str, findings: Iterable[Finding]) -> str:
    """Returns the place in a layer, and the check, that is the first to fail."""
    places = ((where, finding.id) for finding in failed(findings) for where in unfold_layers(finding.where))
    where, id_ = next(place for place in places if report.layer_of(place[0]) == layer)
    return f"{where} ({id_})"


def _headings(columns: Sequence[Column]) -> Html:
    """Renders two lines: parts of a layer, and the sub-blocks in them."""
    parts = [
        render("th", part, class_="part", scope="colgroup", colspan=str(sum(column[0] == part for column in columns)))
        for part in dict.fromkeys(part for part, _ in columns)
    ]
    subs = [render("th", column[1], class_=f"sub {_cut(column, columns)}", scope="col") for column in columns]
    return render("thead", render("tr", render("td"), *parts), render("tr", render("th", "layer", scope="col"), *subs))


def _cut(column: Column, columns: Sequence[Column]) -> str:
    """Returns the class of a part's first column, which stands apart."""
    return "cut" if column == next(other for other in columns if other[0] == column[0]) else ""


def _row(name: str, cells: dict[Column, Cell], columns: Sequence[Column], is_first: bool) -> Html:
    """Renders a layer; the embedding and the head are one cell wide."""
    stack, _, number = name.partition(".")
    label = number if stack == "layers" else name.replace("mtp.", "mtp ")
    is_off = any(cell.is_bad for cell in cells.values())
    shown = [_cell(f"{name} {' '.join(column)}", cells.get(column), _cut(column, columns)) for column in columns]
    if not number:
        (cell,) = cells.values()
        shown = [_cell(name, cell, "cut", colspan=str(len(columns)))]
    kind = f"{'off' * is_off} {'first' * is_first}".strip()
    return render("tr", render("th", "✕ " * is_off, label, scope="row"), *shown, class_=kind)


def _cell(name: str, cell: Cell | None, kind: str, **attributes: str) -> Html:
    """Renders a cell: its number, and on hover everything that it stands for."""
    if cell is None:
        return render("td", "·", class_=kind)
    lines = [f"{name}: {cell.text}", *map(_value_title, cell.values)]
    lines += [f"{finding.id} {finding.where}: {finding.message}" for finding in cell.failures]
    return render("td", cell.text, class_=f"l{cell.level} {kind}".strip(), title=tuple(lines), **attributes)


def _value_title(m: Measurement) -> str:
    kernel = f" [{m.kernel}]" if m.kernel else ""
    return f"{m.slot}{kernel}: {short_number(m.excess)} of its budget {m.budget:.1e}"


def _legend() -> Html:
    ends = (f"≤ {end:g}" for end in LEVELS)
    steps = [render("td", told, class_=f"l{level}") for level, told in enumerate((*ends, f"> {LEVELS[-1]:g}"))]
    note = "1 is all that rounding explains; more is a failure, and so is a cell that names a check. "
    where = "A cell shows its worst value: hover for all of them, or open “Every value”."
    return join(render("p", note, where, class_="soft"), render("table", render("tr", *steps), class_="heat legend"))


def _stages(result: Verification) -> Html:
    """Renders a line for each stage, which opens on its checks, those that failed first."""
    lines = [_stage(replace(result, stages=(stage,))) for stage in result.stages]
    ran = {stage.name for stage in result.stages}
    lines += [render("p", f"– {name}: not asked for", class_="soft") for name in STAGES if name not in ran]
    return render("section", render("h2", "Stages"), *lines, class_="stages")


def _stage(alone: Verification) -> Html:
    """Renders one stage. alone: the result without the others."""
    (stage,) = alone.stages
    kind, sign = _MARKS["pass" if alone.passed else "FAIL"]
    told = f"not run: {stage.skipped}" if stage.skipped else report.counts_text(stage.findings)
    summary = render("summary", render("b", f"{sign} {stage.name} ", class_=kind), f"{told} in {stage.seconds:.1f} s")
    rows = sorted(report.check_rows(alone), key=lambda row: row[0] != "FAIL")
    return render("details", summary, render("table", *(_check(*row) for row in rows), class_="list"))


def _check(verdict: str, id_: str, title: str, number: str, found: str) -> Html:
    kind, sign = _MARKS.get(verdict, ("bad", "!"))
    told = join(f"{id_} {title}", render("div", found, class_="soft"))
    cells = render("td", f"{sign} {verdict}", class_=kind), render("td", told), render("td", number, class_="num")
    return render("tr", *cells)


def _values(measurements: Sequence[Measurement]) -> Html:
    """Renders the numbers behind the map, for those without a pointer."""
    rows = [
        (
            join(measured_name(m), render("div", m.kernel, class_="soft")),
            f"{'✕ ' * (not m.is_within)}{short_number(m.excess)}",
            f"{m.rel_l2:.1e}",
            f"{m.worst_row:.1e}",
            f"{m.budget:.1e}",
            f"{m.amax:.4g} / {m.reference_amax:.4g}",
        )
        for m in measurements
    ]
    headings = ("value", "error / budget", "all rows", "worst row", "budget", "largest: here / reference")
    return _more(f"Every value ({len(rows)})", headings, rows) if rows else Html()


def _plan(plan: Plan | None) -> Html:
    """Renders the plan's rows, folded as ``ownpath plan`` folds them."""
    if plan is None:
        return Html()
    rows: list[tuple[str, ...]] = []
    for row in plan_rows(plan):
        encoding, format_, runner, kernel, layout = row.cells
        rows.append((row.title, f"{runner} ({kernel})", layout, f"{format_} ({encoding})"))
    rows += [(row.title, f"{row.cells[0]} ({row.cells[1]})", "-", "-") for row in companion_rows(plan)]
    return _more("Plan", ("slot", "runner (kernel)", "layout", "format (stored as)"), rows)


def _environment(result: Verification) -> Html:
    job, plan = result.job, report.plan_of(result)
    digests = [("checkpoint digest", report.checkpoint_digest(job.folder))]
    digests += [("plan digest", report.plan_digest(plan))] if plan else []
    rows = [("model", str(job.folder)), *digests, *((name, told) for name, told in versions().items() if told)]
    return _more("Environment", ("", ""), rows)


def _more(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
    """Renders a table that opens on demand."""
    lines = [render("tr", *(render("td", cell) for cell in row)) for row in rows]
    head = render("tr", *(render("th", heading, scope="col") for heading in headings))
    table = render("table", *([head] if any(headings) else []), *lines)
    return render("details", render("summary", title), table, class_="more")
