"""The page: well-formed, self-contained, escaped, and it says what the table and the JSON say."""

import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support.checkpoints import random_checkpoint
from support.layer_faults import FAULTS
from support.pages import verification_text

from ownpath.cli import main
from ownpath.config import EngineConfig
from ownpath.finding import Finding, Verdict, failed
from ownpath.verify import layer_stage as stage
from ownpath.verify.html import MAX_ROWS, report_html
from ownpath.verify.layer import LoadedLayer, load_layer
from ownpath.verify.layers.measure import ROW_FACTOR, Measurement
from ownpath.verify.layers.teacher_forcing import ORDER
from ownpath.verify.plots import BOTTOM, LEFT, MAX_DECADES, RIGHT, TOP, Axis, Decades, Line, Point, small_plot
from ownpath.verify.report import report_dict
from ownpath.verify.run import StageResult, Verification, VerifyJob, verify
from ownpath.verify.subject import Selection, Subject

MAX_BYTES = 1_000_000
VOID = {"meta"}
FAULT = "wrong theta in a CSA layer"


class Page(HTMLParser):
    """The page as a browser reads it: every element with its attributes, its text and its ancestors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[int] = []
        self.tags: list[str] = []
        self.attributes: list[dict[str, str]] = []
        self.told: list[str] = []
        self.inside: list[tuple[int, ...]] = []
        self.feed(text)
        self.close()
        assert not self.open, "an element was left open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"{tag} has an attribute twice"
        self.inside.append(tuple(self.open))
        self.tags.append(tag)
        self.attributes.append({name: value or "" for name, value in attrs})
        self.told.append("")
        if tag not in VOID:
            self.open.append(len(self.tags) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.tags[self.open[-1]] == tag, f"</{tag}> closes <{self.tags[self.open[-1]]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for idx in self.open:
            self.told[idx] += data

    def find(self, tag: str, kind: str | None = None, within: int | None = None) -> list[int]:
        return [
            idx
            for idx, found in enumerate(self.tags)
            if found == tag
            and (kind is None or self.attributes[idx].get("class") == kind)
            and (within is None or within in self.inside[idx])
        ]

    def rows(self) -> list[tuple[str, ...]]:
        return [tuple(self.told[cell] for cell in self.find("td", within=row)) for row in self.find("tr")]

    def titles(self, kind: str, within: int) -> list[str]:
        """Of a plot's points of one kind."""
        return [self.told[idx] for group in self.find("g", kind, within) for idx in self.find("title", within=group)]


@pytest.fixture(scope="module")
def passing(tmp_path_factory: pytest.TempPathFactory) -> Verification:
    folder = random_checkpoint(tmp_path_factory.mktemp("page"), "full-nvfp4", seed=21).folder
    return verify(VerifyJob(folder), ["environment", "layers"])


@pytest.fixture(scope="module")
def failing(passing: Verification) -> Verification:
    """A real fault in one layer."""
    fault = FAULTS[FAULT]

    def load(subject: Subject, layer_idx: int) -> LoadedLayer:
        loaded = load_layer(subject, layer_idx)
        return fault.change(loaded) if layer_idx == fault.layer_idx else loaded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "load_layer", load)
        return verify(VerifyJob(passing.job.folder), ["environment", "layers"])


@pytest.fixture(params=["passing", "failing"])
def result(request: pytest.FixtureRequest) -> Verification:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Verification)
    assert found.passed == (request.param == "passing")
    return found


def measured(layer_idx: int, slot: str, share: float) -> Measurement:
    """share: of its budget."""
    budget = 1.6e-2
    error = share * budget
    return Measurement(layer_idx, slot, error, error, 0.999, error, 12.5, 12.5, 0.0, 0.0, budget, "cute.nvfp4_linear")


def result_of(folder: Path, findings: list[Finding], rows: list[Measurement]) -> Verification:
    return Verification(VerifyJob(folder), (StageResult("layers", tuple(findings), 1.0, "", tuple(rows)),))


def test_every_measurement_reaches_the_report(passing: Verification) -> None:
    num_layers = passing.job.subject.config.num_hidden_layers
    assert {m.layer_idx for m in passing.measurements} == set(range(-1, num_layers + 1))
    rows = report_dict(passing)["measurements"]
    assert len(rows) == len(passing.measurements) == len({(row["layer_idx"], row["slot"]) for row in rows})
    assert all(row["is_within"] and row["rel_l2"] <= row["budget"] for row in rows)


def test_it_is_well_formed_and_the_same_every_time(result: Verification) -> None:
    text = report_html(result)
    page = Page(text)
    assert text == report_html(result)
    assert page.tags.count("h1") == 1
    assert page.told[page.find("h1")[0]].endswith(f": {'PASS' if result.passed else 'FAIL'}")
    kinds = {m.slot for m in result.measurements}
    assert page.tags.count("figure") == 2 * len(kinds)


def test_it_asks_for_nothing(result: Verification) -> None:
    text = report_html(result)
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "embed", "image", "use", "a"} & set(page.tags)
    assert all(word not in text for word in ("http:", "https:", "url(", "@import", "javascript:"))
    assert not {"src", "href", "style"} & {name for found in page.attributes for name in found}
    assert not [name for found in page.attributes for name in found if name.startswith("on")]


def test_it_says_what_the_other_forms_say(result: Verification) -> None:
    page, text, programs = Page(report_html(result)), verification_text(result), report_dict(result)
    facts = dict(row for row in page.rows() if len(row) == 2)
    assert f"findings         {facts['findings']}" in text
    assert facts["findings"].startswith(f"{programs['counts']['fail']} failed, {programs['counts']['pass']} passed")
    assert f"first bad layer  {facts['first bad layer']}" in text
    assert facts["first bad layer"] == (programs["first_bad_layer"] or "none")
    assert f"worst layer      {facts['worst layer']}" in text
    assert programs["worst_layer"]["finding"]["where"] == facts["worst layer"].partition(":")[0]
    assert facts["checkpoint digest"] == programs["checkpoint_digest"]
    assert facts["plan digest"] == programs["plan_digest"]
    assert {name: facts[name] for name in programs["versions"] if name in facts} == {
        name: version for name, version in programs["versions"].items() if version
    }
    checks = {row[1] for row in page.rows() if len(row) == 5}
    assert checks == {finding["id"] for stage_ in programs["stages"] for finding in stage_["findings"]}
    assert all(any(line.split()[1:2] == [check] for line in text.splitlines()) for check in checks)
    kernels = " ".join(cell for row in page.rows() for cell in row)
    assert all(kernel in kernels for kernel in programs["kernels"])


def test_what_failed_comes_first_with_what_to_do(failing: Verification) -> None:
    text = report_html(failing)
    page, bad = Page(text), failed(failing.findings)
    boxes = page.find("div", "failing")
    assert [page.told[box].split()[0] for box in boxes] == list(dict.fromkeys(finding.id for finding in bad))
    assert text.index('class="failing"') < text.index("<figure")
    told = "".join(page.told[box] for box in boxes)
    assert all(finding.remedy in told for finding in bad)
    rows = [row for row in page.rows() if len(row) == 6 and row[0] in {finding.id for finding in bad}]
    assert [(row[0], row[1], row[5]) for row in rows] == [(f.id, f.where, f.message) for f in bad]


def test_points_beyond_their_budget_are_marked_and_no_others(result: Verification) -> None:
    page = Page(report_html(result))
    marked: list[str] = []
    for figure in page.find("figure"):
        (plot,) = page.find("svg", within=figure)
        if "error" not in page.attributes[plot]["aria-label"]:
            continue
        marked += [title.split(":")[0].split(" [")[0] for title in page.titles("bad", figure)]
        (line,) = page.find("polyline", "budget", figure)
        budget = dict(place.split(",") for place in page.attributes[line]["points"].split())
        dots = [page.attributes[idx] for idx in page.find("circle", within=figure)]
        assert all(float(dot["cy"]) >= float(budget.get(dot["cx"], next(iter(budget.values())))) for dot in dots)
        for idx in page.find("path", within=page.find("g", "bad", figure)[0]):
            x, top = page.attributes[idx]["d"].split("l")[0][1:].split()
            assert float(top) + 4 <= float(budget[x]), "the middle of the mark lies above the budget's line"
    wrong = [m for m in result.measurements if not m.is_within]
    assert sorted(marked) == sorted(f"layers.{m.layer_idx}.{m.slot}" for m in wrong)
    named = {finding.where for finding in failed(result.findings) if finding.id == "V01"}
    assert set(marked) == named, "V01 names the same values"


def test_magnitudes_that_v03_refuses_are_marked(folder: Path) -> None:
    good, bad = measured(0, "attn.q", 0.5), replace(measured(1, "attn.q", 0.5), amax=12.5 * (1 + 8.1 * 1.6e-2))
    near = replace(measured(2, "attn.q", 0.5), amax=12.5 * (1 - 7.9 * 1.6e-2))
    page = Page(report_html(result_of(folder, [], [good, bad, near])))
    figure = page.find("figure")[1]
    assert page.titles("bad", figure) == ["layers.1.attn.q: 14.12, reference 12.5"]
    assert len(page.titles("ok", figure)) == 2


def test_what_is_not_finite_is_marked_on_the_upper_edge(folder: Path) -> None:
    rows = [measured(0, "out", 0.5), replace(measured(1, "out", 0.1), nonfinite_share=0.25)]
    result = result_of(folder, [], [*rows, replace(measured(2, "out", 0.5), rel_l2=math.inf)])
    page = Page(report_html(result))
    figure = page.find("figure")[0]
    titles = page.titles("bad", figure)
    assert [title.partition(" ")[0] for title in titles] == ["layers.1.out", "layers.2.out"]
    assert "25.0% not finite" in titles[0]
    marks = page.find("path", within=page.find("g", "bad", figure)[0])
    assert all(float(page.attributes[idx]["d"].split("l")[0].split()[1]) == TOP - 4 for idx in marks)
    programs = report_dict(result)["measurements"][2]
    assert (programs["rel_l2"], programs["is_within"]) == ("inf", False)
    json.dumps(report_dict(result), allow_nan=False)


def test_nothing_from_a_checkpoint_is_taken_for_markup(folder: Path) -> None:
    names = ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a & b &lt; \x1b[31m\u202e</td>", "</svg>")
    hostile = folder.rename(folder.with_name("<script>&'\"model"))
    findings = [Finding(name, name, Verdict.FAIL, name, 1.0, name, name, name) for name in names]
    rows = [replace(measured(0, name, 2.0), kernel=name) for name in names]
    job = VerifyJob(hostile, EngineConfig(), Selection())
    stages = (StageResult("<script>", tuple(findings), 1.0, "<script>why</script>", tuple(rows)),)
    page = Page(report_html(Verification(job, stages, "<script>unreadable</script>")))
    assert not {"script", "img"} & set(page.tags)
    assert page.told[page.find("h1")[0]].startswith("<script>&'\"model on ")
    told = [cell for row in page.rows() for cell in row]
    assert names[0] in told
    assert names[1] in told
    assert "a & b &lt; \\x1b[31m\\u202e</td>" in told, "what a terminal or a browser would act on is spelled out"
    assert len(page.find("svg")) == 2 * len(names)


@pytest.mark.parametrize("share", [0.3, 3.0])
def test_a_whole_model_stays_under_a_megabyte(share: float, folder: Path) -> None:
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
    result = result_of(folder, findings, rows)
    result.job.subject  # noqa: B018 - the plan is on the page too
    html = report_html(result)
    assert len(html.encode()) < MAX_BYTES
    page = Page(html)
    assert page.tags.count("title") == 1 + 2 * len(rows)
    if share > 1:
        assert sum(row[0] == "V01" for row in page.rows() if len(row) == 6) == MAX_ROWS
        assert f"and {len(rows) - MAX_ROWS} more (--json lists them)" in html


def test_without_the_layers_stage_there_is_nothing_to_plot(folder: Path) -> None:
    page = Page(report_html(verify(VerifyJob(folder), ["file"])))
    assert "svg" not in page.tags
    assert any("nothing to plot" in page.told[idx] for idx in page.find("p"))


def test_decades() -> None:
    decades = Decades.of([3e-4, 2.0, 0.0, math.inf, math.nan])
    assert decades == Decades(-4, 1)
    steps = [decades.y(10.0**exponent) for exponent in range(-4, 2)]
    assert steps == pytest.approx([BOTTOM - step * (BOTTOM - TOP) / 5 for step in range(6)])
    assert decades.y(0.0) == decades.y(1e-9) == BOTTOM
    assert decades.y(math.inf) == decades.y(math.nan) == decades.y(1e9) == TOP
    assert Decades.of([1e-300, 1.0]) == Decades(-MAX_DECADES, 0)
    assert Decades.of([100.0]) == Decades(1, 2), "one decade at least"
    assert Decades.of([]) == Decades.of([0.0, math.nan]) == Decades(-1, 0)
    assert list(Decades(-8, 0).labelled) == [-8, -6, -4, -2, 0]


def test_layers_from_left_to_right() -> None:
    assert Axis(0, 60).labelled == [0, 10, 20, 30, 40, 50, 60]
    assert (Axis(0, 60).x(0), Axis(0, 60).x(60), Axis(0, 60).x(30)) == (LEFT, RIGHT, (LEFT + RIGHT) / 2)
    assert Axis(3, 3).x(3) == (LEFT + RIGHT) / 2
    assert Axis(3, 3).labelled == [3]
    assert not Axis(-1, -1, is_numbered=False).labelled


def test_a_plot() -> None:
    points = [Point(0, 1e-3, "layers.0"), Point(2, 1.0, 'layers.2 <"b">', is_bad=True)]
    text = small_plot("a & b", Axis(0, 2), points, [Line("budget", ((0, 1e-2), (2, 1e-2)))])
    page = Page(text)
    third = (BOTTOM - TOP) / 3
    (line,) = page.find("polyline", "budget")
    assert page.attributes[line]["points"] == f"{LEFT:.1f},{TOP + 2 * third:.1f} {RIGHT:.1f},{TOP + 2 * third:.1f}"
    (dot,) = page.find("circle")
    assert (page.attributes[dot]["cx"], page.attributes[dot]["cy"]) == (f"{LEFT:.1f}", f"{BOTTOM:.1f}")
    assert page.titles("bad", page.find("svg")[0]) == ['layers.2 <"b">']
    assert page.attributes[page.find("svg")[0]]["aria-label"] == "a & b"
    assert [page.told[idx] for idx in page.find("text", "y")] == ["1e-3", "1e-2", "1e-1", "1e0"]
    assert [page.told[idx] for idx in page.find("text", "x")] == ["0", "1", "2"]


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.html"
    assert main(["verify", str(folder), "--stages", "environment", "--html", str(path)]) == 0
    assert capsys.readouterr().out.startswith("model on cpu"), "a file does not take the place of the table"
    assert Page(path.read_text(encoding="utf-8")).tags[0] == "html"


@pytest.mark.parametrize("option", ["--html", "--json"])
def test_where_nothing_can_be_written_is_said_before_the_work(
    option: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (tmp_path / "nowhere" / "report", tmp_path):
        assert main(["verify", str(folder), option, str(path)]) == 2
        captured = capsys.readouterr()
        assert f"{path}: the report cannot be written there" in captured.err
        assert not captured.out
