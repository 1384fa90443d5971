"""The page as a browser shows it: nothing is cut off, every text can be read, and the first screen says it all."""

import re
from collections.abc import Callable, Iterator
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image
from support.browser import Browser, find_browser, running_browser
from support.contrast import TEXTS, contrast, luminance
from support.verifications import hostile, measured, result_of, whole_model

from ownpath.verify.heatmap import LEVELS
from ownpath.verify.html import report_html
from ownpath.verify.layers.teacher_forcing import ORDER
from ownpath.verify.run import Verification


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_browser()
    if program is None:
        pytest.skip("there is no Chromium here (.ci/run installs it)")
    with running_browser(program, tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(params=["passing", "failing", "hostile"])
def written(request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> Path:
    """A page in a file."""
    made = {"passing": passing, "failing": failing, "hostile": hostile}
    return write_page(made[request.param](folder), tmp_path)


def passing(folder: Path) -> Verification:
    return result_of(folder, [], [measured(0, slot, 0.3) for slot in ORDER])


def failing(folder: Path) -> Verification:
    return whole_model(folder, 3.0)


def write_page(result: Verification, folder: Path) -> Path:
    result.job.subject  # noqa: B018 - the plan's kernels are shown
    path = folder / "page.html"
    path.write_text(report_html(result), encoding="utf-8")
    return path


@pytest.mark.parametrize("width", [1280, 480])
def test_it_fits_and_can_be_read(width: int, written: Path, browser: Browser) -> None:
    """No horizontal scrolling with everything open, and WCAG 2's contrast for every text, light and dark."""
    browser.open(written, width)
    for scheme in ("light", "dark"):
        browser.prefer(scheme)
        pairs = browser.evaluate(TEXTS)
        assert len(pairs) > 10
        for pair, text in pairs.items():
            assert contrast(*map(luminance, pair.split("|"))) >= 4.5, (scheme, pair, text)
    wide, shown = browser.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert wide <= shown == width
    assert browser.evaluate("[...document.querySelectorAll('.heat td')].every(e => e.scrollWidth <= e.clientWidth)")
    assert browser.evaluate("document.scripts.length + document.images.length") == 0


@pytest.mark.parametrize(
    ("made", "is_the_colour"), [(passing, lambda r, g, b: g > 1.5 * r), (failing, lambda r, g, b: r > 3 * g)]
)
def test_the_first_screen_has_verdict_kernels_failures_and_map(
    made: Callable[[Path], Verification],
    is_the_colour: Callable[[int, int, int], bool],
    folder: Path,
    tmp_path: Path,
    browser: Browser,
) -> None:
    """As a screenshot shows it: a band of the verdict's colour with white letters in it, and the rest below."""
    browser.open(write_page(made(folder), tmp_path), 1280)
    browser.prefer("light")
    for place in (".verdict", ".facts code", ".heat tbody tr", *(["article"] if made is failing else [])):
        assert browser.evaluate(f"document.querySelector('{place}').getBoundingClientRect().top") < 720, place
    word = browser.evaluate(
        "(r => [r.left, r.top, r.right, r.bottom])(document.querySelector('.verdict b').getBoundingClientRect())"
    )
    left, upper, right, lower = map(int, word)
    shown = Image.open(BytesIO(browser.screenshot())).convert("RGB").crop((left, upper, right, lower))
    (_, behind), (_, letters) = sorted(shown.getcolors(1 << 16) or [], reverse=True)[:2]
    assert isinstance(behind, tuple)
    assert is_the_colour(*behind)
    assert letters == (255, 255, 255)
    assert lower - upper >= 40


SIGHT = {
    "any": ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
    "protanopia": ((0.152, 1.053, -0.205), (0.115, 0.786, 0.099), (-0.004, -0.048, 1.052)),
    "deuteranopia": ((0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969)),
    "tritanopia": ((1.256, -0.077, -0.179), (-0.078, 0.931, 0.148), (0.005, 0.691, 0.304)),
}
"""Linear red, green and blue as they are seen. Source: Machado, Oliveira, Fernandes, 2009, severity 1."""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_are_in_order_for_everybody(scheme: str, folder: Path, tmp_path: Path, browser: Browser) -> None:
    """Each colour is further from the paper's brightness than the one before, at the budget by more: in grey too."""
    browser.open(write_page(passing(folder), tmp_path), 480)
    browser.prefer(scheme)
    colours = browser.evaluate(
        "[...document.querySelectorAll('.legend td')].map(e => getComputedStyle(e).backgroundColor)"
    )
    assert len(colours) == len(LEVELS) + 1
    for sight, matrix in SIGHT.items():
        seen = [luminance(seen_as(matrix, colour)) for colour in colours]
        assert seen == sorted(seen, reverse=scheme == "light"), sight
        steps = [contrast(*pair) for pair in pairwise(seen)]
        assert min(steps) > 1.05, sight
        assert steps[LEVELS.index(1.0)] > 1.2, sight


def seen_as(matrix: tuple[tuple[float, ...], ...], color: str) -> str:
    """Computes a colour as it is seen, in sRGB."""
    shares = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in shares]
    seen = [min(max(sum(m * x for m, x in zip(row, linear, strict=True)), 0.0), 1.0) for row in matrix]
    back = [12.92 * x if x <= 0.0031308 else 1.055 * x ** (1 / 2.4) - 0.055 for x in seen]
    return f"rgb({', '.join(str(round(255 * x)) for x in back)})"
