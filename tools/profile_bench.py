"""Asks Nsight Compute what bounds the kernels of a bench: each case's first call alone, caches cold, clocks free.

    PYTHONPATH=src python tools/profile_bench.py attend --shape "flash CSA 8k fp8" --tokens 1,128 --out ncu.jsonl

The bench judges a call's result before it is profiled, as it does before it times one. Needs ``ncu`` on the path.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ownpath.bench.benches import BENCHES
from ownpath.bench.measure import Settings
from ownpath.bench.record import append_lines, provenance
from ownpath.bench.request import BenchRequest
from ownpath.bench.row import Timing
from ownpath.bench.timing import TimedCall

SEPARATOR = "spin_kernel"
"""The name of the kernel that is launched in front of each case."""
SECTIONS = (
    "SpeedOfLight",
    "MemoryWorkloadAnalysis",
    "ComputeWorkloadAnalysis",
    "WarpStateStats",
    "Occupancy",
    "LaunchStats",
)
STALL, PER_ISSUE = "smsp__average_warps_issue_stalled_", "_per_issue_active.ratio"
MEASURED = {
    "time_us": "gpu__time_duration.sum",
    "dram_pct": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "l2_pct": "lts__t_sectors.avg.pct_of_peak_sustained_elapsed",
    "memory_pct": "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed",
    "sm_pct": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "issue_slots_pct": "sm__inst_issued.avg.pct_of_peak_sustained_elapsed",
    "tensor_pct": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "warps_active_pct": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
    "waves": "launch__waves_per_multiprocessor",
}
"""Field of a record -> the profiler's metric."""
TO_US = {"ns": 1e-3, "us": 1.0, "usecond": 1.0, "nsecond": 1e-3, "ms": 1e3, "msecond": 1e3}


@dataclass(frozen=True)
class ProfilerTimer:
    """Stands for a bench's timer: profiles the first call instead of timing any."""

    name: str = "nsight compute"

    def time(self, calls: Sequence[TimedCall]) -> Timing:
        """Runs the first call between the profiler's start and stop."""
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        torch.cuda._sleep(1)
        calls[0]()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        return Timing(0.0, 0.0, 0.0, 1, 1)


def run_bench(args: argparse.Namespace) -> None:
    """Runs the bench under the profiler and writes each case that was profiled to ``--cases``."""
    settings = replace(Settings.of("cuda"), timer=ProfilerTimer())
    tokens = tuple(int(count) for count in args.tokens.split(",")) if args.tokens else None
    asked = BenchRequest(settings, args.shape, tokens, args.contenders)
    with args.cases.open("w") as out:
        for row in BENCHES[args.bench].load()(asked):
            was_run = row.timing is not None
            case = {"shape": row.case.shape, "tokens": row.case.num_tokens, "status": row.status, "why": row.reason}
            print(json.dumps({**case, "contender": row.contender, "was_run": was_run}), file=out, flush=True)


def profiled(page: str) -> Iterator[list[Mapping[str, str]]]:
    """Yields each case's kernels from the profiler's CSV; its row of units joins the names of the values."""
    lines = page[page.index('"ID"') :].splitlines()
    rows = list(csv.DictReader(lines))
    units, kernels = rows[0], rows[1:]
    found: list[list[Mapping[str, str]]] = []
    for kernel in kernels:
        if SEPARATOR in kernel["Kernel Name"]:
            found.append([])
        else:
            found[-1].append({**kernel, "time unit": units[MEASURED["time_us"]]})
    yield from found


def measured(kernel: Mapping[str, str]) -> dict[str, object]:
    """Returns a record of one kernel: shares of what the GPU can do, and the reasons for which its warps wait most, in
    warps waiting for each instruction issued."""
    values = {name: float(kernel[metric].replace(",", "")) for name, metric in MEASURED.items() if kernel.get(metric)}
    values["time_us"] *= TO_US[kernel["time unit"]]
    stalls = {
        name.removeprefix(STALL).removesuffix(PER_ISSUE): float(value.replace(",", ""))
        for name, value in kernel.items()
        if name.startswith(STALL) and name.endswith(PER_ISSUE) and value
    }
    most = sorted(stalls.items(), key=lambda stall: -stall[1])[:4]
    place = {"grid": kernel["Grid Size"], "block": kernel["Block Size"], "kernel": kernel["Kernel Name"][:80]}
    return {**{name: round(value, 2) for name, value in values.items()}, "stalls": dict(most), **place}


def main() -> None:
    """Profiles, prints a line for each kernel, and appends it to ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench")
    parser.add_argument("--shape", action="append", default=[])
    parser.add_argument("--tokens")
    parser.add_argument("--contenders")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--raw", type=Path, help="where the profiler's whole CSV goes")
    parser.add_argument("--cases", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cases is not None:
        run_bench(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        cases = Path(folder) / "cases"
        command = ["ncu", "--csv", "--page", "raw", "--clock-control", "none", "--profile-from-start", "off"]
        command += [word for section in SECTIONS for word in ("--section", section)]
        command += [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--cases", str(cases)]
        done = subprocess.run(command, capture_output=True, text=True)
        if args.raw is not None:
            args.raw.write_text(done.stdout + done.stderr)
        if done.returncode or '"ID"' not in done.stdout:
            sys.exit(f"ncu ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
        rows = [json.loads(line) for line in cases.read_text().splitlines()]
    origin = provenance("cuda", args.commit, "python tools/profile_bench.py " + " ".join(sys.argv[1:]), "ncu")
    for row, kernels in zip([row for row in rows if row["was_run"]], profiled(done.stdout), strict=True):
        for kernel in kernels:
            record = {"bench": f"ncu {args.bench}", **row, **measured(kernel)}
            print(json.dumps(record), flush=True)
            if args.out is not None:
                append_lines(args.out, [{**record, **origin}])


if __name__ == "__main__":
    main()
