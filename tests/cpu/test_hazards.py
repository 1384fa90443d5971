"""Hazards that racecheck reports are ours, but for the byte by which warps are told their part."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import hazards

FILE, KERNEL = hazards.KERNELS / "chunks" / "window.py", "attend_chunk_window_kernel"
HEAD, SUMMARY = (
    "========= COMPUTE-SANITIZER\n",
    "========= RACECHECK SUMMARY: 1 hazards displayed (1 errors, 0 warnings)\n",
)


def line_of(text: str) -> int:
    lines = [line.strip() for line in FILE.read_text(encoding="utf-8").splitlines()]
    return 1 + lines.index(text)


def report(*at: int) -> list[str]:
    """As compute-sanitizer 2025.3 writes one: a read, then writes, then an empty line."""
    first, *others = at
    lines = [f"========= Error: Race reported between Read access at {KERNEL}+0x100 in window.py:{first}\n"]
    lines += [f"=========     and Write access at {KERNEL}+0xc1f0 in window.py:{line} [2 hazards]\n" for line in others]
    return [*lines, "========= \n", "gluon.attend_chunk flash SWA\n"]


def test_the_byte_of_warp_specialize_is_the_compilers() -> None:
    start, call = line_of(f"def {KERNEL}("), line_of("gl.warp_specialize(")
    assert hazards.reports([HEAD, *report(start, call), *report(start, start, call), SUMMARY])
    assert not hazards.own_hazards([HEAD, *report(start, call), *report(start, start, call), SUMMARY])


@pytest.mark.parametrize(
    "text", ["angles = gl.allocate_shared_memory(gl.float32, [4, 2, F], ANGLES)", "fill_angles(angles)"]
)
def test_any_other_line_is_ours(text: str) -> None:
    start, other = line_of(f"def {KERNEL}("), line_of(text)
    found = hazards.own_hazards([HEAD, *report(start, other), *report(start, line_of("gl.warp_specialize(")), SUMMARY])
    assert [f"window.py:{other}" in line for line in found[0]] == [False, True]
    assert len(found) == 1


def test_a_report_that_names_no_line_is_ours() -> None:
    lines = [
        "========= Error: Race reported between Read access at kernel+0x100\n",
        "=========     and Write access at kernel+0x2\n",
    ]
    assert len(hazards.own_hazards(lines)) == 1


@pytest.mark.parametrize(("printed", "code"), [(SUMMARY, 0), ("nothing\n", 1)])
def test_a_run_without_a_summary_fails(
    printed: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["hazards.py", "printf", "%s", printed])
    assert hazards.main() == code
    assert printed in capsys.readouterr().out
