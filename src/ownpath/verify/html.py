"""Renders a verification as one HTML page: no script, no network, no other files.

It shows the same as ``report``, through the same functions. ``page.html`` and ``page.css`` are its frame.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from string import Template

from ownpath.bench.record import device_name
from ownpath.finding import Finding, failed
from ownpath.verify import report
from ownpath.verify.checks import title_of
from ownpath.verify.fold import unfold_layers
from ownpath.verify.heatmap import COLUMNS, LEVELS, Cell, Column, heat_map, short_number, shown_name
from ownpath.verify.layers.measure import Measurement
from ownpath.verify.markup import Html, join, render
from ownpath.verify.run import STAGES, StageResult, Verification
from ownpath.versions import versions

_FRAME = Path(__file__).with_name("page.html")
_MARKS = {"pass": ("good", "✓"), "FAIL": ("bad", "✕"), "warning": ("warn", "!"), "skipped": ("soft", "–")}
"""Verdict -> its class and its sign, so that nothing is said by colour alone."""
_MAX_VALUES = 12
"""Values of several steps that a cell tells on hover, the worst ones."""
_MAX_TOLD = 4
"""Failures that a cell tells on hover; a layer may lack thousands of tensors."""
_PARTS = {part: [column for column in COLUMNS if column[0] == part] for part, _ in COLUMNS}


def report_html(result: Verification) -> str:
    """Renders the page: verdict, kernels that ran, failing checks, heat map, stages, every value, environment."""
    device, verdict = device_name(result.job.engine.device), report.verdict_of(result)
    name, dtype = result.job.folder.resolve().name, str(result.job.engine.dtype).removeprefix("torch.")
    word = render("b", "✓ PASS" if result.passed else "✕ FAIL")
    inside = f" in {result.engine}" * bool(result.engine)
    about = render("span", render("strong", name), f"{inside} on {device}, {dtype}")
    return Template(_FRAME.read_text(encoding="utf-8")).substitute(
        title=join(f"{verdict.upper()}: {name} on {device}"),
        style=_FRAME.with_suffix(".css").read_text(encoding="utf-8"),
        verdict=render("h1", word, about, class_=f"verdict {verdict}"),
        facts=_facts(result),
        failing=_told("Failing checks", "FAIL", report.failed_checks(result.findings)),
        warnings=_told("Warnings", "warning", report.warned_checks(result.findings)),
        map=_map(result),
        stages=_stages(result),
        details=join(_values(result.measurements), _environment(result)),
    )


def _facts(result: Verification) -> Html:
    """Renders what a reader asks first: how many findings, which kernels, the first bad layer."""
    findings, worst = result.findings, report.worst_layer(result.findings)
    rows = [("unreadable", result.unreadable)] if result.unreadable else []
    rows.append(("checks", f"{report.counts_text(findings)} in {report.seconds_of(result):.1f} s"))
    rows += [("limited to", limit) for limit in report.limits_of(result.job.selection)]
    rows.append(_kernels(result))
    plan = report.plan_of(result)
    rows += [("caches", report.caches_text(plan))] if plan else []
    rows.append(("first bad layer", report.first_bad_layer(findings) or "none"))
    rows += [("largest error", report.worst_text(worst[1]))] if worst else []
    return render("dl", *(join(render("dt", name), render("dd", told)) for name, told in rows), class_="facts")


def _kernels(result: Verification) -> tuple[str, Html]:
    """Renders the kernels and their slots: those that ran, or the plan's where none did. An unplanned one is marked."""
    plan, ran = report.plan_of(result), report.kernels_ran(result)
    planned = report.kernels_of(plan) if plan else {}
    chips = [_chip(kernel, count, kernel in planned) for kernel, count in (ran or planned).items()]
    if ran or not planned:
        return "kernels that ran", join(*chips) or Html("none")
    return "kernels planned", join(*chips, render("span", "(the ledger stage did not run them)", class_="soft"))


def _chip(kernel: str, count: int, is_planned: bool) -> Html:
    told = render("code", kernel), f" ×{count} "
    return render("span", *told) if is_planned else render("span", "✕ ", *told, "not planned ", class_="bad")


def _told(title: str, verdict: str, checks: Iterable[report.FailedCheck]) -> Html:
    """Renders failures or warnings like the text report: each check's first places, then what to do."""
    kind, sign = _MARKS[verdict]
    articles = []
    for check in checks:
        first, *others = (render("li", _place(finding)) for finding in check.shown)
        others += [render("li", f"and {check.num_more} more (--json lists them)")] if check.num_more else []
        summary = render("summary", f"{len(check.shown) + check.num_more - 1} more")
        more = render("details", summary, render("ul", *others)) if others else Html()
        head = render("h3", render("span", f"{sign} {check.id} ", class_=kind), title_of(check.id))
        remedies = [render("p", render("b", "Remedy: "), remedy) for remedy in check.remedies]
        articles.append(render("article", head, render("ul", first), more, *remedies))
    return render("section", render("h2", title), *articles, class_=f"{kind}-list") if articles else Html()


def _place(finding: Finding) -> Html:
    kernel = f" [{finding.kernel}]" if finding.kernel else ""
    allowed = f"; allowed: {finding.allowed}" if finding.allowed else ""
    return join(render("code", finding.where), f"{kernel}: {finding.message}{allowed}")


def _map(result: Verification) -> Html:
    """Renders the heat map, with a line above the first bad layer that says where the layer goes wrong first."""
    rows, lines, first_bad = heat_map(result), [], report.first_bad_layer(result.findings)
    for name, cells in rows.items():
        if name == first_bad:
            told = f"▼ first bad layer: {_first_failure(name, result.findings)}"
            lines.append(render("tr", render("th", told, colspan=str(len(COLUMNS) + 1)), class_="flag"))
        lines.append(_row(name, cells, name == first_bad))
    heat = render("table", _headings(), render("tbody", *lines), class_="heat")
    note = "1 is all that rounding explains. A cell beyond it failed, and so did one that names a check. "
    note += "Hover, or open “Every value”, for the numbers behind a cell."
    if not result.measurements:
        note = "No layer was compared." + " Cells name the checks that failed there." * bool(rows)
    shown = [_legend(), heat] if result.measurements else [heat] if rows else []
    title = render("h2", "Error over budget, layer by layer")
    return render("section", title, render("p", note, class_="soft"), *shown, class_="map")


def _first_failure(layer: str, findings: Iterable[Finding]) -> str:
    """Returns the place in a layer, and the check, that is the first to fail."""
    places = ((where, finding.id) for finding in failed(findings) for where in unfold_layers(finding.where))
    where, id_ = next(place for place in places if report.layer_of(place[0]) == layer)
    return f"{where} ({id_})"


def _legend() -> Html:
    steps = (*(f"≤ {end:g}" for end in LEVELS), f"> {LEVELS[-1]:g}")
    cells = (render("td", told, class_=f"l{level}") for level, told in enumerate(steps))
    return render("table", render("tr", *cells), class_="heat legend")


def _headings() -> Html:
    """Renders two lines: parts of a layer, and the sub-blocks in them."""
    parts = [
        render("th", part, class_="cut", scope="colgroup", colspan=str(len(columns)))
        for part, columns in _PARTS.items()
    ]
    subs = [render("th", column[1], class_=f"sub {_cut(column)}", scope="col") for column in COLUMNS]
    return render("thead", render("tr", render("td"), *parts), render("tr", render("th", "layer", scope="col"), *subs))


def _cut(column: Column) -> str:
    """Returns the class of a part's first column, which stands apart."""
    return "cut" * (column == _PARTS[column[0]][0])


def _row(name: str, cells: dict[Column, Cell], is_first: bool) -> Html:
    """Renders a layer; the embedding and the head are one cell wide."""
    stack, _, number = name.partition(".")
    label = number if stack == "layers" else name.replace(".", " ")
    is_off = any(cell.is_bad for cell in cells.values())
    shown = [_cell(f"{name} {' '.join(column)}", cells.get(column), _cut(column)) for column in COLUMNS]
    if not number:
        shown = [_cell(name, cell, "cut", colspan=str(len(COLUMNS))) for cell in cells.values()]
    kind = "off" * is_off + " first" * is_first
    return render("tr", render("th", "✕ " * is_off + label, scope="row"), *shown, class_=kind)


def _cell(name: str, cell: Cell | None, kind: str, **attributes: str) -> Html:
    """Renders a cell: its number, and on hover everything that it stands for."""
    if cell is None:
        return render("td", "·", class_=kind)
    values = sorted(cell.values, key=lambda m: -m.excess)[:_MAX_VALUES] if cell.is_of_runs else cell.values
    told = [
        f"{m.slot}{', ' * bool(m.run)}{m.run} [{m.kernel}]: {short_number(m.excess)} of its budget {m.budget:.1e}"
        for m in values
    ]
    told += [f"{finding.id} {finding.where}: {finding.message}" for finding in cell.failures[:_MAX_TOLD]]
    told += [f"and {len(cell.failures) - _MAX_TOLD} more failures"] if len(cell.failures) > _MAX_TOLD else []
    title = (f"{name}: {cell.text}", *told)
    return render("td", cell.text, class_=f"l{cell.level} {kind}", title=title, **attributes)


def _stages(result: Verification) -> Html:
    """Renders a line for each stage; one that ran opens on its checks, those that failed first."""
    by_name = {stage.name: stage for stage in result.stages}
    lines = [
        _stage(name, by_name.get(name), result)
        for name in dict.fromkeys((*([] if result.engine else STAGES), *by_name))
    ]
    return render("section", render("h2", "Stages"), *lines, class_="stages")


def _stage(name: str, stage: StageResult | None, result: Verification) -> Html:
    reason = "not asked for" if stage is None else f"not run: {stage.skipped}" if stage.skipped else ""
    if stage is None or (stage.skipped and not stage.findings):
        return render("p", f"– {name} {reason}", class_="soft")
    alone = replace(result, stages=(stage,))
    kind, sign = _MARKS["pass" if alone.passed else "FAIL"]
    told = f"{report.counts_text(stage.findings)} in {stage.seconds:.1f} s {reason}"
    summary = render("summary", render("b", f"{sign} {name} ", class_=kind), told)
    rows = sorted(report.check_rows(alone), key=lambda row: row[0] != "FAIL")
    return render("details", summary, render("table", *(_check(*row) for row in rows), class_="list"))


def _check(verdict: str, id_: str, title: str, number: str, found: str) -> Html:
    kind, sign = _MARKS[verdict]
    told = join(f"{id_} {title}", render("div", found, class_="soft"))
    return _line(render("span", f"{sign} {verdict}", class_=kind), told, number)


def _values(measurements: Sequence[Measurement]) -> Html:
    """Renders the numbers behind the map, for those without a pointer."""
    names = ("value", "error / budget", "all rows", "worst row", "budget", "largest: here / reference")
    rows = [
        _line(
            join(shown_name(m), render("div", m.kernel, class_="soft")),
            "✕ " * (not m.is_within) + short_number(m.excess),
            *(f"{number:.1e}" for number in (m.rel_l2, m.worst_row, m.budget)),
            f"{m.amax:.4g} / {m.reference_amax:.4g}",
        )
        for m in measurements
    ]
    head = render("tr", *(render("th", name, scope="col") for name in names))
    return _more(f"Every value ({len(rows)})", head, *rows) if rows else Html()


def _environment(result: Verification) -> Html:
    job, plan = result.job, report.plan_of(result)
    digests = {"model": str(job.folder), "checkpoint digest": report.checkpoint_digest(job.folder)}
    digests |= {"plan digest": report.plan_digest(plan)} if plan else {}
    return _more("Environment", *(_line(name, told) for name, told in (digests | versions()).items() if told))


def _more(title: str, *lines: Html) -> Html:
    return render("details", render("summary", title), render("table", *lines), class_="more")


def _line(*cells: str) -> Html:
    return render("tr", *(render("td", cell) for cell in cells))
