"""The page: well-formed, self-contained, escaped, it says what the other reports say, and a browser shows it well."""

import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support.checkpoints import random_checkpoint
from support.layer_faults import FAULTS
from support.pages import verification_text
from support.verifications import NAMES, hostile, measured, result_of, whole_model

from ownpath.cli import main
from ownpath.finding import Finding, Verdict, failed
from ownpath.verify import layer_stage as stage
from ownpath.verify.heatmap import LEVELS
from ownpath.verify.html import report_html
from ownpath.verify.layer import LoadedLayer, load_layer
from ownpath.verify.layers.teacher_forcing import ORDER
from ownpath.verify.ledger_check import RanSlot
from ownpath.verify.report import kernels_ran, report_dict
from ownpath.verify.run import StageResult, Verification, VerifyJob, verify
from ownpath.verify.subject import Subject

MAX_BYTES = 1_000_000
VOID = {"meta"}
FAULT = "wrong theta in a CSA layer"
STAGES_SHOWN = ("environment", "layers", "ledger")


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

    def words(self, tag: str, kind: str | None = None) -> list[str]:
        return [self.told[idx] for idx in self.find(tag, kind)]


@pytest.fixture(scope="module")
def passing(tmp_path_factory: pytest.TempPathFactory) -> Verification:
    folder = random_checkpoint(tmp_path_factory.mktemp("page"), "full-nvfp4", seed=21).folder
    return verify(VerifyJob(folder), STAGES_SHOWN)


@pytest.fixture(scope="module")
def failing(passing: Verification) -> Verification:
    """A real fault in one layer."""
    fault = FAULTS[FAULT]

    def load(subject: Subject, layer_idx: int) -> LoadedLayer:
        loaded = load_layer(subject, layer_idx)
        return fault.change(loaded) if layer_idx == fault.layer_idx else loaded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "load_layer", load)
        return verify(VerifyJob(passing.job.folder), STAGES_SHOWN)


@pytest.fixture(params=["passing", "failing"])
def result(request: pytest.FixtureRequest) -> Verification:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Verification)
    assert found.passed == (request.param == "passing")
    return found


def test_every_measurement_reaches_the_report(passing: Verification) -> None:
    num_layers = passing.job.subject.config.num_hidden_layers
    assert {m.layer_idx for m in passing.measurements} == set(range(-1, num_layers + 1))
    rows = report_dict(passing)["measurements"]
    assert len(rows) == len(passing.measurements) == len({(row["layer_idx"], row["slot"]) for row in rows})
    assert all(row["is_within"] and row["rel_l2"] <= row["budget"] for row in rows)


def test_it_is_well_formed_and_the_same_every_time(result: Verification) -> None:
    text = report_html(result)
    page, word = Page(text), "PASS" if result.passed else "FAIL"
    assert text == report_html(result)
    name = result.job.folder.name
    assert page.words("title") == [f"{word}: {name} on cpu x86_64"]
    assert page.words("h1") == [f"{'✓' if result.passed else '✕'} {word}{name} on cpu x86_64, float32"]
    assert page.attributes[page.find("h1")[0]]["class"] == f"verdict {word.lower()}"


def test_it_asks_for_nothing(result: Verification) -> None:
    text = report_html(result)
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "embed", "image", "use", "a", "svg"} & set(page.tags)
    assert all(word not in text for word in ("http:", "https:", "url(", "@import", "javascript:"))
    assert not {"src", "href", "style"} & {name for found in page.attributes for name in found}
    assert not [name for found in page.attributes for name in found if name.startswith("on")]
    policies = [found["content"] for found in page.attributes if "http-equiv" in found]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_it_says_what_the_other_forms_say(result: Verification) -> None:
    page, text, programs = Page(report_html(result)), verification_text(result), report_dict(result)
    facts = dict(zip(page.words("dt"), page.words("dd"), strict=True)) | {
        row[0]: row[1] for row in page.rows() if len(row) == 2
    }
    assert facts["checks"].partition(" in ")[0] in text
    assert facts["checks"].startswith(f"{programs['counts']['fail']} failed, {programs['counts']['pass']} passed")
    assert facts["first bad layer"] == (programs["first_bad_layer"] or "none")
    assert programs["worst_layer"]["finding"]["where"] == facts["largest error"].partition(":")[0]
    assert facts["checkpoint digest"] == programs["checkpoint_digest"]
    assert facts["plan digest"] == programs["plan_digest"]
    assert {name: facts[name] for name in programs["versions"] if name in facts} == {
        name: version for name, version in programs["versions"].items() if version
    }
    assert programs["kernels_ran"] == programs["kernels"], "a whole model ran as planned"
    chips = (f"{kernel} ×{count}" for kernel, count in programs["kernels_ran"].items())
    assert facts["kernels that ran"].split() == " ".join(chips).split()
    checks = {row[1].split()[0] for row in page.rows() if len(row) == 3}
    assert checks == {finding["id"] for stage_ in programs["stages"] for finding in stage_["findings"]}
    assert all(any(line.split()[1:2] == [check] for line in text.splitlines()) for check in checks)
    skipped = [told for told in page.words("p") if "not asked for" in told]
    assert [told.split()[1] for told in skipped] == ["file", "load", "kernels"]


def test_what_failed_comes_first_with_what_to_do(failing: Verification) -> None:
    text = report_html(failing)
    page, bad = Page(text), failed(failing.findings)
    told = page.words("article")
    assert [article.split()[1] for article in told] == list(dict.fromkeys(finding.id for finding in bad))
    assert text.index("<article") < text.index("Stages</h2>") < text.index("Every value")
    assert all(any(finding.remedy in article for article in told) for finding in bad)
    firsts = {finding.id: finding for finding in reversed(bad)}
    assert all(finding.where in article for finding, article in zip(reversed(firsts.values()), told, strict=True))
    rows = [row[0].split()[1] for row in page.rows() if len(row) == 3 and row[1].startswith("V")]
    assert rows == sorted(rows, key=lambda verdict: verdict != "FAIL")


def cells_of(page: Page) -> dict[tuple[str, str], tuple[str, str, str]]:
    """(layer, sub-block) -> number, class, title."""
    (heat,) = page.find("table", "heat")
    found = {}
    for idx in page.find("td", within=heat):
        title = page.attributes[idx].get("title", "")
        if title:
            layer, _, place = title.partition(":")[0].partition(" ")
            found[layer, place] = page.told[idx], page.attributes[idx]["class"].split()[0], title
    return found


def test_every_value_is_in_the_map_and_those_beyond_their_budget_are_marked(result: Verification) -> None:
    page = Page(report_html(result))
    shown = cells_of(page)
    told = "\n".join(title for _, _, title in shown.values())
    assert all(f"{m.slot} [{m.kernel}]: " in told for m in result.measurements)
    budget = LEVELS.index(1.0)
    beyond = {place for place, (_, level, _) in shown.items() if int(level[1:]) > budget}
    bad = failed(result.findings)
    wrong = {f"layers.{m.layer_idx}" for m in result.measurements if not m.is_within}
    wrong |= {"head" for finding in bad if finding.where == "logits"}
    assert {layer for layer, _ in beyond} == wrong
    assert {place for place, (number, _, _) in shown.items() if number[0] == "V" or float(number) > 1} == beyond
    marked = [page.told[head] for row in page.find("tr") for head in page.find("th", within=row)]
    flags = [told for told in marked if "first bad layer" in told]
    first = next((finding.where for finding in bad), None)
    assert flags == ([f"▼ first bad layer: {first} (V01)"] if first else [])
    rows = {told[2:] for told in marked if told.startswith("✕ ")}
    assert {f"layers.{row}" if row.isdecimal() else row for row in rows} == wrong
    listed = {row[0]: row[1] for row in page.rows() if len(row) == 6}
    assert len(listed) == len(result.measurements), "what hovering shows can be read without a pointer"
    assert sum(number.startswith("✕") for number in listed.values()) == sum(
        not m.is_within for m in result.measurements
    )


def test_other_stages_failures_are_on_the_map(folder: Path) -> None:
    findings = [
        Finding("L02", "layers.1.ffn.experts.5.w3.weight", Verdict.FAIL, "moved by one"),
        Finding("LG03", "layers.{2-3}.attn.wq_b", Verdict.FAIL, "another kernel"),
    ]
    page = Page(report_html(result_of(folder, findings, [measured(1, "ffn.experts", 0.5)])))
    told = {place: number for place, (number, _, _) in cells_of(page).items()}
    assert told == {
        ("layers.1", "ffn experts"): "L02",
        ("layers.2", "attention q"): "LG03",
        ("layers.3", "attention q"): "LG03",
    }


def test_warnings_follow_failures_and_are_not_on_the_map(folder: Path) -> None:
    told = [Finding("F06", "layers.1.ffn.experts.0", Verdict.WARN, "apart", remedy="one scale for both")]
    page = Page(report_html(result_of(folder, told, [measured(1, "ffn.experts", 0.5)])))
    assert page.words("h1")[0].startswith("✓ PASS")
    assert page.words("h2")[0] == "Warnings"
    assert page.words("article")[0].startswith("! F06 ")
    assert [number for number, _, _ in cells_of(page).values()] == ["0.50"]
    failure = Finding("F05", "layers.1.ffn.experts.0", Verdict.FAIL, "zero")
    assert Page(report_html(result_of(folder, [*told, failure], []))).words("h2")[:2] == ["Failing checks", "Warnings"]


def test_a_layer_that_lacks_all_its_tensors_fits_on_the_page(folder: Path) -> None:
    findings = [Finding("F02", f"layers.1.ffn.experts.{idx}.w1", Verdict.FAIL, "missing") for idx in range(5000)]
    html = report_html(result_of(folder, findings, []))
    assert len(html) < 20_000
    ((number, _, title),) = cells_of(Page(html)).values()
    assert (number, title.split("\n")[-1]) == ("F02", "and 4996 more failures")
    assert "and 4992 more (--json lists them)" in html


def test_kernels_that_ran_and_were_not_planned_are_marked(folder: Path) -> None:
    job = VerifyJob(folder)
    (slot, (_, kernel)), *_ = job.subject.plan.slots.items()
    ran = (RanSlot(slot, kernel), RanSlot("layers.0.attn.wo_b", "unregistered <b>"))
    result = Verification(job, (StageResult("ledger", (), 1.0, ran=ran),))
    assert kernels_ran(result) == {kernel: 1, "unregistered <b>": 1}
    page = Page(report_html(result))
    assert page.words("span", "bad") == ["✕ unregistered <b> ×1 not planned "]


def test_what_is_not_finite_is_beyond_every_budget(folder: Path) -> None:
    rows = [measured(0, "out", 0.5), replace(measured(1, "out", 0.1), nonfinite_share=0.25)]
    result = result_of(folder, [], [*rows, replace(measured(2, "out", 0.5), rel_l2=math.inf)])
    shown = cells_of(Page(report_html(result)))
    worst = f"l{len(LEVELS)}"
    assert [shown[f"layers.{idx}", "layer out"][:2] for idx in (0, 1, 2)] == [
        ("0.50", "l2"),
        ("inf", worst),
        ("inf", worst),
    ]
    programs = report_dict(result)["measurements"][2]
    assert (programs["rel_l2"], programs["excess"], programs["is_within"]) == ("inf", "inf", False)
    json.dumps(report_dict(result), allow_nan=False)


def test_nothing_from_a_checkpoint_is_taken_for_markup(folder: Path) -> None:
    page = Page(report_html(hostile(folder)))
    assert not {"script", "img"} & set(page.tags)
    assert "<script>&'\"model on " in page.words("h1")[0]
    places = page.words("code")
    assert f"layers.0.{NAMES[0]}" in places
    assert f"layers.0.{NAMES[1]}" in places
    assert "layers.0.a & b &lt; \\x1b[31m\\u202e</td>" in places, "what a browser would act on is spelled out"
    (title,) = (title for _, _, title in cells_of(page).values())
    assert all(name in title for name in (NAMES[0], NAMES[1], NAMES[3]))


@pytest.mark.parametrize("share", [0.3, 3.0])
def test_a_whole_model_stays_under_a_megabyte(share: float, folder: Path) -> None:
    html = report_html(whole_model(folder, share))
    assert len(html.encode()) < MAX_BYTES
    count = 61 * len(ORDER)
    assert html.count(" of its budget ") == count
    assert (f"and {count - 8} more (--json lists them)" in html) == (share > 1), "8 are listed"


def test_without_the_layers_stage_the_map_is_empty(folder: Path) -> None:
    page = Page(report_html(verify(VerifyJob(folder), ["file"])))
    assert "No layer was compared." in page.words("p")
    assert not page.find("table", "heat")


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
        assert f"'{path}' cannot be written" in captured.err
        assert not captured.out
