"""Runs a command under racecheck, and says which of the hazards that it reports are not the compiler's own.

    python3 tools/hazards.py compute-sanitizer --tool racecheck python3 tools/small_shapes.py

Gluon's ``warp_specialize`` tells warps their part by a byte in shared memory: written, barrier 1 of all warps, read,
barrier 1 again; and once more at the end. Racecheck reports these accesses now and then, though both barriers are in
the machine code (sm_90a, Triton 3.6). They have the lines of the kernel's ``def`` and of that call. Any other line is
a hazard of ours.

Exit code: the command's; 1 if a hazard is ours, or if no summary came.
"""

import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

KERNELS = Path(__file__).parent.parent / "src" / "ownpath" / "kernels"
ACCESS = re.compile(r"(?:Read|Write) access at (?P<kernel>\w+)\S* in (?P<file>[\w.]+):(?P<line>\d+)")
REPORT, SUMMARY, PREFIX = "Race reported", "RACECHECK SUMMARY", "========="


def reports(lines: Iterable[str]) -> list[list[str]]:
    """Returns the lines of each report of a race."""
    found: list[list[str]] = []
    is_open = False
    for line in lines:
        if REPORT in line:
            found.append([])
        is_open = REPORT in line or (is_open and line.startswith(PREFIX) and bool(line.strip(f"{PREFIX[0]} \n")))
        if is_open:
            found[-1].append(line.rstrip())
    return found


def is_of_dispatch(line: str) -> bool:
    """Returns True if an access is at the kernel's ``def`` or at its call of ``warp_specialize``."""
    access = ACCESS.search(line)
    if access is None:
        return False
    for path in KERNELS.rglob(access["file"]):
        text = path.read_text(encoding="utf-8").splitlines()
        at = int(access["line"]) - 1
        if at < len(text) and text[at].strip() in (f"def {access['kernel']}(", "gl.warp_specialize("):
            return True
    return False


def own_hazards(lines: Sequence[str]) -> list[list[str]]:
    """Returns the reports in which an access is not ``warp_specialize``'s own."""
    return [report for report in reports(lines) if not all(map(is_of_dispatch, report))]


def main() -> int:
    """Runs the command, repeats what it prints, and judges it."""
    lines: list[str] = []
    with subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            print(line, end="", flush=True)
    ours, is_whole = own_hazards(lines), any(SUMMARY in line for line in lines)
    others = len(reports(lines)) - len(ours)
    print(
        f"hazards: {len(ours)} of ours, {others} of warp_specialize's own" + ("" if is_whole else "; no summary came")
    )
    for report in ours:
        print(*report, sep="\n")
    return process.returncode or int(bool(ours) or not is_whole)


if __name__ == "__main__":
    sys.exit(main())
