"""Measures how well the engine feeds the device: served tokens per second beside graphs replayed back to back.

    PYTHONPATH=src python tools/overlap_rate.py --device cuda --requests 1,8,32,64 --out overlap.jsonl

The embedded model, greedy, each request submitted by itself. Served: from the moment when all requests have begun to
the first end, so that neither prompts nor a last straggler count. Replayed: the same bucket, over the same range of
positions, with nothing between two replays. The gap is from the end of a graph to the start of the next, by the
device's clock, twice: by events in the stream, in a run of its own, as they cost some time; and by the profiler,
which slows all of it. The profiler also tells what the device did between two graphs.

The host's part of a step is taken apart in another run of its own, on the engine's thread, in microseconds of a step:
plan (who runs, and what the prefix cache takes up), stage (rows as the device holds them, and their upload's buffer),
launch (upload, graph, copy of the results), wait (until the device is there), read (tokens out of the copy), report
(tokens to requests, ends), rest. Without ``wait`` they are what a graph has to hide. A step was late if the device had
nothing left when it was launched: after the first step that is what costs throughput.
A CPU only tries the harness.
"""

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from ownpath.bench.record import append_lines, provenance
from ownpath.config import EngineConfig
from ownpath.engine.decoder import Decoder
from ownpath.engine.engine import Engine
from ownpath.engine.graphs import Mark
from ownpath.engine.request import Request, SamplingParams, StepOutput
from ownpath.engine.rows import DecodeRow, StepRows
from ownpath.loading import default_model_dir, load_model
from ownpath.model.model import Model
from ownpath.startup import warm_up
from ownpath.trace.launches import TraceEvent

MAX_MODEL_LEN = 1024
MAX_NUM_SEQS = 64
LIMIT_S = 300.0
ROUNDS = 3
"""Rounds of each measurement; the median counts."""
PROFILED_TOKENS = 200
"""Tokens of a request under the profiler, and two more for each request: a trace has every kernel."""
PARTS = ("plan", "stage", "launch", "wait", "read", "report", "rest")
LEAST_KERNELS = 10
"""Kernels of one launch from which on it is taken for a step's graph."""
DEVICE_WORK, NAME_CHARS, LEAST_OFTEN = ("kernel", "gpu_memcpy", "gpu_memset"), 60, 0.05
"""Categories of the device's work; of what is told of it: characters of a name, and least times a graph."""


class StampedDecoder(Decoder):
    """A decoder that can put events around its graphs. stamps: a pair for each launch, while that is a list."""

    stamps: "list[tuple[torch.cuda.Event, torch.cuda.Event]] | None" = None
    num_late = 0
    """Launches for which the device had nothing left to do."""

    def launch(self, count: int) -> torch.Tensor:
        """As ``Decoder.launch``."""
        if self.stamps is None:
            return super().launch(count)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        logits_TV = super().launch(count)
        after.record()
        self.stamps.append((before, after))
        return logits_TV

    def _enqueue(self, work: Callable[[], None], turn: int) -> Mark:
        self.num_late += self._marks[turn - 1].is_reached
        return super()._enqueue(work, turn)

    def gaps_us(self) -> list[float]:
        """Returns the time from each launch's end to the next one's start."""
        torch.cuda.synchronize(self.pool.spec.device)
        stamps = self.stamps or []
        return [1e3 * after.elapsed_time(before) for (_, after), (before, _) in pairwise(stamps)]


class HostClock:
    """Time of calls on one thread, by part, each without the calls inside it that count for themselves."""

    def __init__(self) -> None:
        self.spent_s: dict[str, float] = defaultdict(float)
        self._inside_s = 0.0

    def time(self, part: str, owner: object, name: str) -> None:
        """Lets a method of this object count for a part, from now on."""
        call: Callable[..., object] = getattr(owner, name)

        def timed(*args: object) -> object:
            outside_s, self._inside_s = self._inside_s, 0.0
            start = time.perf_counter()
            try:
                return call(*args)
            finally:
                spent_s = time.perf_counter() - start
                self.spent_s[part] += spent_s - self._inside_s
                self._inside_s = outside_s + spent_s

        setattr(owner, name, timed)


def host_parts(engine: Engine, decoder: StampedDecoder, count: int, num_tokens: int) -> dict[str, object]:
    """Measures the host's part of a step, part by part, and how many steps were late."""
    clock, runner = HostClock(), engine._runner
    for part, owner, names in (
        ("rest", engine, ("_step_or_fail",)),
        ("plan", engine, ("_schedule", "_note")),
        ("stage", decoder, ("begin", "repeat")),
        ("launch", decoder, ("_enqueue",)),
        ("read", decoder, ("finish",)),
        ("report", runner, ("_land",)),
        *(("wait", mark, ("wait",)) for mark in decoder._marks),
    ):
        for name in names:
            clock.time(part, owner, name)
    before, decoder.num_late = engine.load().times.num_steps, 0
    Crowd(engine, count, num_tokens).rate()
    num_steps = engine.load().times.num_steps - before
    for owner in (decoder, *decoder._marks):
        for name in [name for name, value in vars(owner).items() if getattr(value, "__name__", "") == "timed"]:
            delattr(owner, name)
    parts = {part: round(1e6 * clock.spent_s[part] / num_steps, 2) for part in PARTS}
    whole = round(sum(us for part, us in parts.items() if part != "wait"), 2)
    return {"host_us": whole, "host_parts_us": parts, "late_share": round(decoder.num_late / num_steps, 4)}


class Crowd:
    """Requests that run together. rate: tokens per second while all of them ran."""

    def __init__(self, engine: Engine, count: int, num_tokens: int) -> None:
        self._count, self._num_begun, self._num_tokens = count, 0, 0
        self._start: tuple[float, int] | None = None
        self._end: tuple[float, int] | None = None
        self._num_left, self._ended = count, threading.Event()
        params = SamplingParams(num_tokens, temperature=0.0)
        for idx in range(count):
            engine.submit([Request([3 + idx, 5, 7, 9], params, self._sink())])

    def _sink(self) -> Callable[[StepOutput], None]:
        num_heard = 0

        def hear(output: StepOutput) -> None:
            nonlocal num_heard
            assert output.error is None, output.error
            num_heard += 1
            self._num_tokens += 1
            if num_heard == 2:
                self._num_begun += 1
                if self._num_begun == self._count:
                    self._start = time.perf_counter(), self._num_tokens
            if output.finish_reason is not None:
                self._end = self._end or (time.perf_counter(), self._num_tokens)
                self._num_left -= 1
                if not self._num_left:
                    self._ended.set()

        return hear

    def rate(self) -> float:
        """Waits for all and returns the tokens per second."""
        assert self._ended.wait(LIMIT_S), "a request did not end"
        assert self._start is not None
        assert self._end is not None
        assert self._start < self._end, "the first request ended before the last began: ask for more tokens"
        return (self._end[1] - self._start[1]) / (self._end[0] - self._start[0])


@torch.inference_mode()
def replay_us(model: Model, decoder: Decoder, count: int, num_steps: int) -> float:
    """Returns the microseconds of a step of ``count`` rows, ``num_steps`` of them back to back."""
    caches = [model.new_cache() for _ in range(count)]
    decoder.upload(StepRows.of([DecodeRow(cache, 5 + row) for row, cache in enumerate(caches)]))
    bucket = next(size for size in decoder.buckets if size >= count)
    _wait(decoder)
    start = time.perf_counter()
    for _ in range(num_steps):
        decoder.launch(bucket)
    _wait(decoder)
    spent = time.perf_counter() - start
    for cache in caches:
        cache.release()
    return 1e6 * spent / num_steps


def _wait(decoder: Decoder) -> None:
    if decoder.pool.spec.device.type == "cuda":
        torch.cuda.synchronize(decoder.pool.spec.device)


def graph_gaps(events: Iterable[TraceEvent]) -> list[float]:
    """Returns the microseconds from the last kernel of each graph to the first of the next, of a Chrome trace: kernels
    of one launch are a graph if they are many."""
    spans: dict[object, list[tuple[float, float]]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "kernel":
            start = float(event["ts"])
            spans[event["args"].get("correlation")].append((start, start + float(event["dur"])))
    graphs = sorted(
        (min(start for start, _ in found), max(end for _, end in found))
        for found in spans.values()
        if len(found) >= LEAST_KERNELS
    )
    return [later[0] - earlier[1] for earlier, later in pairwise(graphs)]


def between_graphs(events: Sequence[TraceEvent]) -> dict[str, tuple[float, float]]:
    """Returns what the device did outside of graphs, by name: how often a graph, and the microseconds of each."""
    launches = Counter(event["args"].get("correlation") for event in events if event.get("cat") == "kernel")
    num_graphs = sum(count >= LEAST_KERNELS for count in launches.values())
    found: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") in DEVICE_WORK and launches[event["args"].get("correlation")] < LEAST_KERNELS:
            found[event["name"][:NAME_CHARS]].append(float(event["dur"]))
    often = sorted(found.items(), key=lambda pair: -sum(pair[1]))
    rates = {name: (round(len(us) / max(num_graphs, 1), 3), round(statistics.mean(us), 2)) for name, us in often}
    return {name: rate for name, rate in rates.items() if rate[0] >= LEAST_OFTEN}


def profiled(run: Callable[[], object]) -> list[TraceEvent]:
    """Runs under the profiler and returns its events."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events: list[TraceEvent] = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        return events


def spread(name: str, gaps: Sequence[float]) -> dict[str, object]:
    """Returns median and ninetieth percentile of gaps. The first quarter is left out: requests join there."""
    kept = sorted(gaps[len(gaps) // 4 :])
    if not kept:
        return {name: None, f"{name}_p90": None}
    return {name: round(statistics.median(kept), 2), f"{name}_p90": round(kept[len(kept) * 9 // 10], 2)}


def measure(device: str, counts: Sequence[int], num_tokens: int) -> Iterator[dict[str, object]]:
    """Yields a record for each number of requests."""
    config = replace(EngineConfig.for_device(device, MAX_MODEL_LEN), max_num_seqs=MAX_NUM_SEQS)
    model = load_model(default_model_dir(), config)
    decoder = StampedDecoder(model, config.max_num_seqs, model.config.vocab_size)
    is_on_gpu = torch.device(device).type == "cuda"
    if is_on_gpu:
        warm_up(model, config)
        with torch.inference_mode():
            decoder.capture(lambda *_: None)
    for count in counts:
        us = statistics.median(replay_us(model, decoder, count, num_tokens) for _ in range(ROUNDS))
        engine = Engine(model, config, model.config.vocab_size, end_token_ids=(), decoder=decoder)
        engine.start()
        rate = statistics.median([Crowd(engine, count, num_tokens).rate() for _ in range(ROUNDS)])
        times = engine.load().times
        gaps = gaps_of(engine, decoder, count, num_tokens) if is_on_gpu else {}
        parts = host_parts(engine, decoder, count, num_tokens)
        engine.stop()
        yield {
            "requests": count,
            "served_tokens_per_s": round(rate, 1),
            "replay_tokens_per_s": round(1e6 * count / us, 1),
            "served_share": round(rate * us / (1e6 * count), 4),
            "step_us": round(1e6 * count / rate, 2),
            "replay_us": round(us, 2),
            **parts,
            **gaps,
            "host_gap_share": round(times.gap_s / (times.gap_s + times.busy_s), 4),
        }


def gaps_of(engine: Engine, decoder: StampedDecoder, count: int, num_tokens: int) -> dict[str, object]:
    """Measures the gaps between the graphs of requests that run together, both ways."""
    decoder.stamps = []
    Crowd(engine, count, num_tokens).rate()
    by_events, decoder.stamps = decoder.gaps_us(), None
    fewer = min(num_tokens, PROFILED_TOKENS + 2 * count)
    events = profiled(lambda: Crowd(engine, count, fewer).rate())
    gaps = spread("gap_us", by_events) | spread("gap_us_profiler", graph_gaps(events))
    return {**gaps, "between_graphs": between_graphs(events)}


def main() -> None:
    """Prints a line for each number of requests and appends it to ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--requests", default="1,8,32,64", help=f"numbers of requests at once, up to {MAX_NUM_SEQS}")
    parser.add_argument("--tokens", type=int, default=900, help="tokens of each request")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="unknown")
    args = parser.parse_args()
    counts = [int(count) for count in args.requests.split(",")]
    command = f"python tools/overlap_rate.py --device {args.device} --requests {args.requests} --tokens {args.tokens}"
    origin = provenance(args.device, args.commit, command, "wall clock, CUDA events, CUPTI")
    for record in measure(args.device, counts, args.tokens):
        print(json.dumps(record), flush=True)
        if args.out is not None:
            append_lines(args.out, [{"bench": "overlap_rate", **record, **origin}])


if __name__ == "__main__":
    main()
