"""Times V4 inside vLLM on a GPU, with its own kernels and with ours, on the host and by the device's record.

    python tools/vllm_rate.py FOLDER --out rates.jsonl                  # stock and ours: 1, 8, 64, 256 requests
    python tools/vllm_rate.py FOLDER --sides ours --requests 64 --calls calls.jsonl

A decode step is a replayed graph of so many requests, behind a short context and one of 1,024 tokens; a chunk is 1,024
tokens of so many prompts, not captured. For each: the host's time of a step in a process that has had no profiler yet,
and of profiled steps the span on the device, the time that it was busy, the experts' and the hyper-connections' part
of that, and the number of kernels; medians. A kernel counts by the time by which it extends the busy time, for one
that was launched early waits for the one before; plain sums of durations stand beside it. The JSON line has the
experts' kernels of one step, with their neighbours, and what each kernel of a step adds, by name. What runs is
checked: stock may hold nothing of ours, and the record of our decode steps must have the planned kernels
(``PlannedStep``). A JSON line for each case at once, and a table last. Exit code: 1 if a check fails.

Each side is a process of its own; both are started at once on one device, and take turns, a case each, those with the
most prompt tokens last (``vllm_cases``). All cases' host times come first, in ``--visits``, then device and, with
``--calls``, what the host calls (``vllm_host``). vLLM's warm-ups of sizes and of routers that no case has are left out
on both sides. ``--seconds`` bounds the time from when both sides are up: nothing begins after it, and no visit but the
first in its second half, or where the case's last one would have reached into that. Each host time is a row at once.
With ``--gate`` both sides start beside other work, and wait for it.
"""

import argparse
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from vllm_cases import (
    CHUNK,
    LONG,
    PROFILED,
    SHORT,
    TIMED,
    WARM_UPS,
    Case,
    all_cases,
    num_steps,
    prompt_groups,
    steps_of_a_prompt,
)
from vllm_host import HostTime, Turns, collected, host_calls
from vllm_record import Timed, experts_record, kernels_record, split_steps, summed

from ownpath.bench.record import append_lines, provenance
from ownpath.integrations.vllm.breaks import SWITCH
from ownpath.integrations.vllm.names import VARIABLE
from ownpath.integrations.vllm.proof.device import PlannedStep
from ownpath.integrations.vllm.proof.walk import describe_modules
from ownpath.integrations.vllm.seam import installed_kernel
from ownpath.trace.launches import DeviceRecord

VISITS, STEP = 3, "step "
NEEDLESS = ("deepseek_v4_mhc_warmup", "_warmup_ll_bf16_router_gemm")
"""Of vLLM's warm-ups: for token counts from 1 to 1,024, with a kernel that V4's layers do not call, and for routers of
other widths than V4-Flash's."""
SIDES: Mapping[str, str] = {"stock": "none", "ours": "all"}


@dataclass(frozen=True)
class TimedCase:
    """A case's times, what of its record should not be so, and the experts' kernels of one step, with neighbours.

    num_others: kernels of no step. kernels: of one step, those that add the most time, by name."""

    timed: Timed
    faults: Sequence[str] = ()
    num_others: int = 0
    experts: Sequence[Mapping[str, object]] = ()
    kernels: Sequence[Mapping[str, object]] = ()


def main() -> int:
    """Times the sides, each in a process of its own, and prints the table."""
    args = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that a side does not outlive this process
    if args.turns is not None:
        return run_side(args, args.sides[0])
    with tempfile.TemporaryDirectory() as folder:
        codes = _run_sides(args.sides, Path(folder))
        rows = [json.loads(line) for path in Path(folder).glob("rows.*") for line in path.read_text().splitlines()]
    found: dict[Case, dict[str, Timed]] = {}
    for row in sorted(rows, key=lambda row: args.sides.index(row["side"])):
        timed = Timed(**{field.name: row[field.name] for field in fields(Timed)})
        found.setdefault((row["case"], row["requests"], row["context"]), {})[row["side"]] = timed
    for line in table(found):
        print(line)
    return int(any(codes))


def _run_sides(sides: Sequence[str], folder: Path) -> list[int]:
    """Starts a process for each side with this one's arguments; returns their exit codes."""
    size, children = len(sides), list[subprocess.Popen[bytes]]()
    for place, side in enumerate(sides):
        own = ["--sides", side, "--turns", str(folder), str(place), str(size)]
        children.append(subprocess.Popen([sys.executable, *sys.argv, *own]))
    try:
        while any(child.poll() is None for child in children):
            for place, child in enumerate(children):
                if child.poll() is not None:
                    Turns(folder, place, size).leave()
            time.sleep(1)
    finally:
        for child in children:
            child.kill()
    return [child.wait() for child in children]


def run_side(args: argparse.Namespace, side: str) -> int:
    """Times one side, in turns with the others; returns the exit code."""
    os.environ.setdefault(SWITCH, "1")  # as vLLM sets it for V4, and as a process that `vllm serve` starts has it
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    folder, place, size = args.turns
    turns, start = Turns(Path(folder), int(place), int(size)), time.perf_counter()
    engine = Engine(args, side)
    print(f"{side}: started in {time.perf_counter() - start:.0f} s", flush=True)
    origin = engine.facts | provenance(args.device, args.commit, shlex.join(sys.argv), "cupti kernel records")
    measure = Measurement(args, side, engine, turns, origin, Path(folder, f"rows.{side}"))
    faults = [*engine.faults(), *measure.run()]
    for fault in dict.fromkeys(faults):
        print(f"FAIL {side}, {fault}", flush=True)
    return int(bool(faults))


class Measurement:
    """One side's measurements, in turns with the others. rows: the file of this side's rows."""

    def __init__(
        self,
        args: argparse.Namespace,
        side: str,
        engine: "Engine",
        turns: Turns,
        origin: dict[str, object],
        rows: Path,
    ) -> None:
        self._args, self._side, self._engine, self._turns = args, side, engine, turns
        self._origin, self._rows = origin, rows
        self._hosts: dict[Case, HostTime] = {}
        self._took: dict[Case, float] = {}
        self._turn, self._end = 0, 0.0

    def run(self) -> list[str]:
        """Times every case on the host, then on the device; returns what should not be so."""
        with self._next():
            while self._args.gate and not self._args.gate.exists():
                time.sleep(0.1)
        with self._next():  # every side has started
            self._end = time.time() + self._args.seconds
        for visit in range(self._args.visits):
            for case in self._engine.cases:
                with self._next():
                    if time.time() + self._took.get(case, 0.0) < self._end - (self._args.seconds / 2 if visit else 0):
                        self._time_host(case)
        return [fault for case in self._engine.cases for fault in self._record(case)]

    @contextmanager
    def _next(self) -> Iterator[None]:
        with self._turns.turn(self._turn):
            yield
        self._turn += 1

    def _time_host(self, case: Case) -> None:
        start = time.time()
        seen = self._engine.time_host(case)
        self._took[case] = time.time() - start
        self._hosts[case] = seen + self._hosts[case] if case in self._hosts else seen
        print(self._side, *case, seen, flush=True)
        if self._args.out:
            append_lines(self._args.out, [self._row("vllm_host", case) | seen.numbers | self._origin])

    def _record(self, case: Case) -> list[str]:
        """Records a case; returns what should not be so."""
        with self._next():
            if case not in self._hosts or time.time() > self._end:
                return [f"{case}: not recorded, for want of time"]
            seen = self._engine.record(case, self._hosts[case].wall_us)
            calls = self._engine.calls(case) if self._args.calls else []
        print(self._side, *case, seen.timed, flush=True)
        row = self._row("vllm", case)
        extra = {"faults": seen.faults, "other_kernels": seen.num_others}
        extra |= {"experts": seen.experts, "kernels": seen.kernels}
        for path in filter(None, (self._rows, self._args.out)):
            append_lines(path, [row | self._hosts[case].numbers | vars(seen.timed) | extra | self._origin])
        if self._args.calls:
            append_lines(self._args.calls, [row | {"calls": calls}])
        return [f"{case}: {fault}" for fault in seen.faults]

    def _row(self, bench: str, case: Case) -> dict[str, object]:
        return {"bench": bench, "side": self._side, "case": case[0], "requests": case[1], "context": case[2]}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sides", nargs="+", choices=tuple(SIDES), default=["stock", "ours"])
    parser.add_argument("--requests", nargs="+", type=int, default=[1, 8, 64, 256])
    parser.add_argument("--contexts", nargs="+", type=int, default=[SHORT, LONG], help="tokens before a decode step")
    parser.add_argument("--chunks", nargs="*", type=int, default=[1, 64], help="prompts of a chunk")
    parser.add_argument("--visits", type=int, default=VISITS, help="to each case for the host's times")
    parser.add_argument("--gate", type=Path, metavar="FILE", help="measuring begins when it is there")
    parser.add_argument("--seconds", type=float, default=3600.0, help="of measuring; nothing is begun after them")
    parser.add_argument("--most-tokens", type=int, default=2**20, help="of a case's prompts; larger ones are left out")
    parser.add_argument("--cache-gib", type=float, default=8.0, help="for keys, of each side")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append a JSON line for each case")
    parser.add_argument("--calls", type=Path, metavar="FILE", help="append what the host calls in a step of each case")
    parser.add_argument("--commit", default="unknown", metavar="ID", help="recorded with every row")
    parser.add_argument("--turns", nargs=3, metavar=("FOLDER", "PLACE", "SIZE"), help="of a side's own process")
    return parser.parse_args()


class Engine:
    """vLLM with one side's kernels."""

    def __init__(self, args: argparse.Namespace, side: str) -> None:
        os.environ[VARIABLE] = SIDES[side]
        from vllm import LLM

        leave_out(NEEDLESS)
        self._args, self._side = args, side
        self._is_cuda = torch.device(args.device).type == "cuda"
        options: dict[str, Any] = {"enforce_eager": True}
        if self._is_cuda:
            graphs = {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sorted(args.requests)}
            options = {"compilation_config": graphs, "gpu_memory_utilization": 0.15}
            options |= {"kv_cache_memory_bytes": int(args.cache_gib * 2**30), "block_size": 256}
        longest = max(context + num_steps(count, context) for _, count, context in self.cases)
        self._llm = LLM(
            model=str(args.folder),
            kv_cache_dtype="fp8",
            max_model_len=max(CHUNK, longest) + 1,
            max_num_seqs=max(args.requests),
            max_num_batched_tokens=CHUNK,
            enable_prefix_caching=False,
            async_scheduling=False,
            seed=0,
            **options,
        )
        self._engine = self._llm.llm_engine
        (self._rank,) = self._llm.apply_model(look)
        self._planned = PlannedStep.of(self._rank)
        self._vocab = self._llm.model_config.get_vocab_size()
        self._count = 0

    @property
    def facts(self) -> dict[str, object]:
        """The kernels of the experts' and the dense layers' methods, and vLLM's version."""
        import vllm

        methods = Counter(
            " ".join([found["method"], *found["chose"], found.get("kernel", "")]).strip()
            for found in self._rank["modules"].values()
            if "parameters" in found
        )
        return {"vllm": vllm.__version__, "methods": dict(methods), "hyper": self._rank["hyper"] or "vLLM's"}

    def faults(self) -> Iterator[str]:
        """Yields what this side has of the other."""
        own = [path for path, found in self._rank["modules"].items() if "slot" in found]
        if self._side == "stock" and (own or self._rank["hyper"]):
            yield f"stock runs kernels of ours: {own[:3]}, {self._rank['hyper']}"
        if self._side == "ours" and not (own and self._rank["hyper"]):
            yield "ours runs no kernel of ours: is the plugin installed (entry point vllm.general_plugins)?"

    @property
    def cases(self) -> list[Case]:
        """Every case, those with the most prompt tokens last."""
        cases = all_cases(self._args.requests, self._args.contexts, self._args.chunks)
        return [case for case in cases if case[1] * case[2] <= self._args.most_tokens]

    def time_host(self, case: Case) -> HostTime:
        """Times steps without a profiler."""
        with self._steps(case) as step, collected() as pauses:
            walls = tuple(step() for _ in range(TIMED))
            return HostTime(walls, 1e6 * sum(pauses))

    def record(self, case: Case, wall_us: float) -> TimedCase:
        """Records steps by the device's profiler."""
        with self._steps(case) as step:
            return self._profiled(step, wall_us)

    def calls(self, case: Case) -> list[dict[str, object]]:
        """Returns what the host calls in a step."""
        with self._steps(case) as step:
            return host_calls(step, PROFILED)

    @contextmanager
    def _steps(self, case: Case) -> Iterator[Callable[[], float]]:
        """Yields a call that runs one step of a case and returns its microseconds; requests end with the block."""
        kind, num_requests, context = case
        names = [] if kind == "chunk" else self._read_prompts(num_requests, context)

        def step() -> float:
            for _ in range(num_requests if kind == "chunk" else 0):
                self._add(CHUNK // num_requests, 1)
            return self._timed_step(num_requests)

        for _ in range(WARM_UPS):
            step()
        yield step
        self._engine.abort_request(names)
        self._step()

    def _read_prompts(self, num_requests: int, context: int) -> list[str]:
        """Adds requests and reads their prompts; returns their names."""
        names = list[str]()
        for lengths in prompt_groups(num_requests, context):
            names += [self._add(length, num_steps(num_requests, context)) for length in lengths]
            for _ in range(steps_of_a_prompt(context)):
                self._step()
        return names

    def _profiled(self, step: Callable[[], float], wall_us: float) -> TimedCase:
        if not self._is_cuda:
            return TimedCase(Timed(wall_us))
        record = DeviceRecord()
        record.start()
        for idx in range(PROFILED):
            with record.mark(f"{STEP}{idx}"):
                step()
        steps, num_others = split_steps(record.stop(), record.marks)
        if len(steps) != PROFILED:
            said = f"{PROFILED} steps were recorded, and {len(steps)} have kernels"
            return TimedCase(Timed(wall_us), [said], num_others)
        told = [fault for one in steps for fault in self._planned.faults(Counter(launch.kernel for launch in one))]
        one = steps[PROFILED // 2]
        parts = list(experts_record(one)), kernels_record(one)
        return TimedCase(summed(steps, wall_us), list(dict.fromkeys(told)), num_others, *parts)

    def _add(self, num_tokens: int, num_answers: int) -> str:
        from vllm import SamplingParams

        draw = random.Random(self._count)
        ids = [draw.randrange(3, self._vocab) for _ in range(num_tokens)]
        self._count += 1
        params = SamplingParams(temperature=0, max_tokens=num_answers, ignore_eos=True, detokenize=False)
        name = f"r{self._count}"
        self._engine.add_request(name, {"prompt_token_ids": ids}, params)
        return name

    def _step(self) -> list[str]:
        return [output.request_id for output in self._engine.step() if output.outputs and output.outputs[0].token_ids]

    def _timed_step(self, num_requests: int) -> float:
        """Runs a step that answers every request; returns its microseconds. Errors: RuntimeError if it does not."""
        start = time.perf_counter()
        answered = self._step()
        if self._is_cuda:
            torch.cuda.synchronize()
        wall_us = 1e6 * (time.perf_counter() - start)
        if len(answered) != num_requests:
            raise RuntimeError(f"a step of {num_requests} requests answered {len(answered)}")
        return wall_us


def leave_out(names: Sequence[str]) -> None:
    """Makes warm-ups of vLLM do nothing. Errors: AttributeError for a name that vLLM lacks."""
    from vllm.model_executor.warmup import kernel_warmup

    for name in names:
        getattr(kernel_warmup, name)
        setattr(kernel_warmup, name, lambda *_, **__: None)


def look(model: torch.nn.Module) -> dict[str, Any]:
    """Describes a worker's model, as ``PlannedStep.of`` takes it."""
    own = next(kind for kind in type(model).__mro__ if kind.__module__.startswith("vllm."))
    return {"modules": describe_modules(model), "hyper": installed_kernel(sys.modules[own.__module__])}


def table(found: Mapping[tuple[str, int, int], Mapping[str, Timed]]) -> Iterator[str]:
    """Formats a line for each case: microseconds of both sides, and how many times faster ours is."""
    sums = "sum | experts' sum | hyper's sum"
    yield f"| step | requests | context | side | wall | span | busy | experts | hyper | {sums} | kernels |"
    yield "|---|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
    for (kind, requests, context), sides in found.items():
        for side, timed in sides.items():
            numbers = " | ".join(f"{value:,.0f}" for value in vars(timed).values())
            yield f"| {kind} | {requests} | {context} | {side} | {numbers} |"
        if len(sides) == 2 and all(timed.experts_us for timed in sides.values()):
            stock, ours = (vars(sides[side]) for side in SIDES)
            ratios = [f"{stock[key] / ours[key]:.2f}x" if ours[key] else "" for key in stock if key != "num_kernels"]
            yield f"| {kind} | {requests} | {context} | faster | {' | '.join(ratios)} | |"


if __name__ == "__main__":
    sys.exit(main())
