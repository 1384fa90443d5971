"""Times V4 inside vLLM on a GPU, with its own kernels and then with ours, in one process, by the device's record.

    python tools/vllm_rate.py FOLDER --out rates.jsonl                  # stock, then ours: 1, 8, 64, 256 requests
    python tools/vllm_rate.py FOLDER --sides ours --requests 64

A decode step is a replayed graph of so many requests, behind a short context and one of 1,024 tokens; a chunk is 1,024
tokens of so many prompts, not captured. For each: the host's time of a step without a profiler, and of profiled steps
the span on the device, the time that it was busy, the experts' and the hyper-connections' part of that, and the number
of kernels; medians. A kernel counts by the time by which it extends the busy time, for one that was launched early
waits for the one before; plain sums of durations stand beside it. The JSON line has the experts' kernels of one step,
with their neighbours. Before a side is timed, what it runs is checked: stock may hold nothing of ours, and the record
of our decode steps must have the planned kernels (``PlannedStep``). A JSON line for each case at once, and a table
last. Exit code: 1 if a check fails.

Stock is first because our hyper-connections replace functions of vLLM's in the whole process. Stock compiles for each
new class of rows, so every step that only reads prompts has 1,024 rows, or all of the prompts of a case in one step.
"""

import argparse
import gc
import os
import random
import re
import shlex
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ownpath.bench.record import append_lines, provenance
from ownpath.integrations.vllm.breaks import SWITCH
from ownpath.integrations.vllm.names import VARIABLE
from ownpath.integrations.vllm.proof.device import STOCK_EXPERTS, STOCK_HYPER, PlannedStep
from ownpath.integrations.vllm.proof.walk import describe_modules
from ownpath.integrations.vllm.seam import installed_kernel
from ownpath.kernels.registry import SPECS
from ownpath.ops import OpKind
from ownpath.trace.launches import DeviceLaunch, DeviceRecord, MarkedTime, busy_times

CHUNK = 1024
SHORT, LONG = 16, 1024
WARM_UPS, PROFILED, TIMED = 3, 8, 24
STEP = "step "
_OF_DEVICE = ("span_us", "busy_us", "experts_us", "hyper_us", "sum_us", "experts_sum_us", "hyper_sum_us")
_NAME_LENGTH = 120
ACTIVATION, SUM = re.compile("silu_and_mul_with_clamp|clamp.*silu|act_and_mul"), re.compile("reduce_kernel")
MARLIN = re.compile("marlin_moe")
SIDES: Mapping[str, str] = {"stock": "none", "ours": "all"}


@dataclass(frozen=True)
class Timed:
    """Medians of one case, in microseconds. wall: of a step, on the host. Of the device: the span of a step, the time
    that it was busy, and the part that experts and hyper-connections add to it; plain sums of durations. kernels: of
    one step; the names' number."""

    wall_us: float
    span_us: float = 0.0
    busy_us: float = 0.0
    experts_us: float = 0.0
    hyper_us: float = 0.0
    sum_us: float = 0.0
    experts_sum_us: float = 0.0
    hyper_sum_us: float = 0.0
    num_kernels: int = 0


@dataclass(frozen=True)
class TimedCase:
    """A case's times, what of its record should not be so, and the experts' kernels of one step, with neighbours.

    num_others: kernels of no step."""

    timed: Timed
    faults: Sequence[str] = ()
    num_others: int = 0
    experts: Sequence[Mapping[str, object]] = ()


def main() -> int:
    """Times each side, and prints the table."""
    args = _arguments()
    os.environ.setdefault(SWITCH, "1")  # as vLLM sets it for V4, and as a process that `vllm serve` starts has it
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    origin = provenance(args.device, args.commit, shlex.join(sys.argv), "cupti kernel records")
    found: dict[tuple[str, int, int], dict[str, Timed]] = {}
    faults = list[str]()
    for side in args.sides:
        start = time.perf_counter()
        engine = Engine(args, side)
        print(f"{side}: started in {time.perf_counter() - start:.0f} s", flush=True)
        faults += engine.faults()
        for case, seen in engine.cases():
            found.setdefault(case, {})[side] = seen.timed
            faults += [f"{side}, {case}: {fault}" for fault in seen.faults]
            row = {"bench": "vllm", "side": side, "case": case[0], "requests": case[1], "context": case[2]}
            print(side, *case, seen.timed, flush=True)
            if args.out:
                extra = {"faults": seen.faults, "other_kernels": seen.num_others, "experts": seen.experts}
                append_lines(args.out, [row | vars(seen.timed) | extra | engine.facts | origin])
        engine.close()
    for fault in dict.fromkeys(faults):
        print(f"FAIL {fault}")
    for line in table(found):
        print(line)
    return int(bool(faults))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sides", nargs="+", choices=tuple(SIDES), default=["stock", "ours"])
    parser.add_argument("--requests", nargs="+", type=int, default=[1, 8, 64, 256])
    parser.add_argument("--contexts", nargs="+", type=int, default=[SHORT, LONG], help="tokens before a decode step")
    parser.add_argument("--kinds", nargs="+", choices=("decode", "chunk"), default=["decode", "chunk"])
    parser.add_argument("--cache-gib", type=float, default=8.0, help="for keys, of each side")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append a JSON line for each case")
    parser.add_argument("--commit", default="unknown", metavar="ID", help="recorded with every row")
    args = parser.parse_args()
    if "stock" in args.sides[1:]:
        parser.error("--sides: stock must be first")
    return args


class Engine:
    """vLLM with one side's kernels."""

    def __init__(self, args: argparse.Namespace, side: str) -> None:
        os.environ[VARIABLE] = SIDES[side]
        from vllm import LLM

        self._args, self._side = args, side
        self._is_cuda = torch.device(args.device).type == "cuda"
        options: dict[str, Any] = {"enforce_eager": True}
        if self._is_cuda:
            graphs = {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sorted(args.requests)}
            options = {"compilation_config": graphs, "gpu_memory_utilization": 0.4}
            options |= {"kv_cache_memory_bytes": int(args.cache_gib * 2**30), "block_size": 256}
        longest = max(context + num_steps(max(args.requests), context) for context in args.contexts)
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

    def cases(self) -> Iterator[tuple[tuple[str, int, int], TimedCase]]:
        """Times every case, few requests first."""
        for num_requests in sorted(self._args.requests):
            for context in self._args.contexts if "decode" in self._args.kinds else ():
                yield ("decode", num_requests, context), self._decode(num_requests, context)
            if "chunk" in self._args.kinds:
                yield ("chunk", num_requests, 0), self._chunks(num_requests)

    def close(self) -> None:
        """Frees the engine's memory."""
        from vllm.distributed import cleanup_dist_env_and_memory

        del self._engine, self._llm
        gc.collect()
        cleanup_dist_env_and_memory()

    def _decode(self, num_requests: int, context: int) -> TimedCase:
        names = list[str]()
        for lengths in prompt_groups(num_requests, context):
            names += [self._add(length, num_steps(num_requests, context)) for length in lengths]
            for _ in range(steps_of_a_prompt(context)):
                self._step()
        answered = [self._step() for _ in range(WARM_UPS)]
        if any(len(found) != num_requests for found in answered):
            raise RuntimeError(f"{len(names)} prompts of about {context} tokens were not read in their steps")
        walls = [self._timed_step(num_requests) for _ in range(TIMED)]
        seen = self._profiled(lambda: self._timed_step(num_requests), statistics.median(walls))
        self._engine.abort_request(names)
        self._step()
        return seen

    def _chunks(self, num_requests: int) -> TimedCase:
        def chunk() -> float:
            for _ in range(num_requests):
                self._add(CHUNK // num_requests, 1)
            return self._timed_step(num_requests)

        for _ in range(WARM_UPS):
            chunk()
        walls = [chunk() for _ in range(PROFILED)]
        return self._profiled(chunk, statistics.median(walls))

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
        experts = list(experts_record(steps[PROFILED // 2]))
        return TimedCase(summed(steps, wall_us), list(dict.fromkeys(told)), num_others, experts)

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


def num_steps(num_requests: int, context: int) -> int:
    """Returns the most steps that a request may be answered in: those in which the others are read, and the timed."""
    return len(prompt_groups(num_requests, context)) * steps_of_a_prompt(context) + WARM_UPS + PROFILED + TIMED + 2


def steps_of_a_prompt(context: int) -> int:
    """Returns the number of steps that read one group of prompts."""
    return max(1, context // CHUNK)


def prompt_groups(num_requests: int, context: int) -> list[list[int]]:
    """Returns lengths of prompts, group by group; a group is read before the next one is added.

    If they do not fit one step together, all steps have the same number of rows, ``CHUNK`` where contexts divide it:
    one of each request that already decodes, and the rest of prompts. So later prompts are shorter, by what earlier
    requests have answered when all are read.
    """
    if num_requests * context <= CHUNK:
        return [[context] * num_requests]
    num_groups = -(-num_requests // max(1, CHUNK // context))
    num_reading = steps_of_a_prompt(context)
    rows = num_requests * context // (num_groups * num_reading)
    firsts = [num_requests * idx // num_groups for idx in range(num_groups + 1)]
    groups = []
    for first, last in pairwise(firsts):
        short, num_longer = divmod(num_reading * (rows - first), last - first)
        groups.append([short + 1] * num_longer + [short] * (last - first - num_longer))
    return groups


def look(model: torch.nn.Module) -> dict[str, Any]:
    """Describes a worker's model, as ``PlannedStep.of`` takes it."""
    own = next(kind for kind in type(model).__mro__ if kind.__module__.startswith("vllm."))
    return {"modules": describe_modules(model), "hyper": installed_kernel(sys.modules[own.__module__])}


def split_steps(launches: Iterable[DeviceLaunch], marks: Sequence[MarkedTime]) -> tuple[list[list[DeviceLaunch]], int]:
    """Splits a record by the step in which the host launched each kernel; returns how many belong to no step too.

    A kernel whose launch was not seen belongs to the step during which it began: a step waits for the device.
    """
    steps: dict[str, list[DeviceLaunch]] = {mark.slot: [] for mark in marks}
    num_others = 0
    for launch in sorted(launches, key=lambda launch: launch.start_us):
        around = (mark.slot for mark in marks if mark.start_us <= launch.start_us <= mark.end_us)
        slot = launch.slot if launch.slot in steps else next(around, None)
        if slot is None:
            num_others += 1
        else:
            steps[slot].append(launch)
    return [step for step in steps.values() if step], num_others


def summed(steps: Sequence[Sequence[DeviceLaunch]], wall_us: float) -> Timed:
    """Returns medians over steps."""
    hyper = re.compile("|".join((STOCK_HYPER, *_patterns(OpKind.HYPER))))
    rows = []
    for step in steps:
        busy = busy_times(step)
        experts = {id(one) for one in experts_of(step)}
        parts = [(one, added) for one, added in busy if id(one) in experts]
        mixing = [(one, added) for one, added in busy if hyper.search(one.kernel)]
        span = max(one.start_us + one.duration_us for one in step) - step[0].start_us
        added = [sum(added for _, added in chosen) for chosen in (busy, parts, mixing)]
        plain = [sum(one.duration_us for one, _ in chosen) for chosen in (busy, parts, mixing)]
        rows.append([span, *added, *plain])
    medians = [round(statistics.median(column), 1) for column in zip(*rows, strict=True)]
    timed = dict(zip(_OF_DEVICE, medians, strict=True))
    return Timed(round(wall_us, 1), **timed, num_kernels=int(statistics.median(len(step) for step in steps)))


def experts_record(step: Sequence[DeviceLaunch]) -> Iterator[dict[str, object]]:
    """Yields the experts' kernels of a step, and those right before and behind: start and end from the step's start,
    and the time that each adds, in microseconds."""
    busy, experts = busy_times(step), {id(one) for one in experts_of(step)}
    chosen = [id(one) in experts for one, _ in busy]
    for idx, (one, added) in enumerate(busy):
        if any(chosen[max(0, idx - 1) : idx + 2]):
            start = one.start_us - step[0].start_us
            times = {"start": start, "end": start + one.duration_us, "added": added}
            rounded = {key: round(value, 1) for key, value in times.items()}
            yield {"kernel": one.kernel[:_NAME_LENGTH], "is_expert": chosen[idx]} | rounded


def experts_of(step: Sequence[DeviceLaunch]) -> Iterator[DeviceLaunch]:
    """Yields the kernels of routed experts: those that bear their names, and of vLLM's also the activation and the sum.

    Shared and routed experts have one activation kernel: that over more rows is the routed ones'. The sum over a
    token's experts is torch's, the first reduction behind a product.
    """
    named = re.compile("|".join((STOCK_EXPERTS, *_patterns(OpKind.MOE))))
    is_stock = any(MARLIN.search(one.kernel) for one in step)
    most = max((one.num_ctas for one in step if ACTIVATION.search(one.kernel)), default=0)
    is_behind_product = False
    for one in step:
        if named.search(one.kernel):
            is_behind_product |= bool(MARLIN.search(one.kernel))
            yield one
        elif is_stock and ACTIVATION.search(one.kernel) and one.num_ctas == most:
            yield one
        elif is_behind_product and SUM.search(one.kernel):
            is_behind_product = False
            yield one


def _patterns(kind: OpKind) -> list[str]:
    return [pattern for spec in SPECS if spec.kind is kind for pattern in spec.launches]


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
