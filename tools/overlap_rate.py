"""Measures how well the engine feeds the device: served tokens per second beside graphs replayed back to back.

    PYTHONPATH=src python tools/overlap_rate.py --device cuda --requests 1,8,32,64 --out overlap.jsonl

The embedded model, greedy, each request submitted by itself. Served: from the moment when all requests have begun to
the first end, so that neither prompts nor a last straggler count. Replayed: the same bucket, over the same range of
positions, with nothing between two replays. The gap is from the end of a graph to the start of the next, by the
device's clock, twice: by events in the stream, in a run of its own, as they cost some time; and by the profiler,
which slows all of it.
A CPU only tries the harness.
"""

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections import defaultdict
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
LEAST_KERNELS = 10
"""Kernels of one launch from which on it is taken for a step's graph."""


class StampedDecoder(Decoder):
    """A decoder that can put events around its graphs. stamps: a pair for each launch, while that is a list."""

    stamps: "list[tuple[torch.cuda.Event, torch.cuda.Event]] | None" = None

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

    def gaps_us(self) -> list[float]:
        """Returns the time from each launch's end to the next one's start."""
        torch.cuda.synchronize(self.pool.spec.device)
        stamps = self.stamps or []
        return [1e3 * after.elapsed_time(before) for (_, after), (before, _) in pairwise(stamps)]


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


def profiled_gaps(run: Callable[[], object]) -> list[float]:
    """Runs under the profiler and returns the gaps between graphs."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return graph_gaps(json.loads(path.read_text(encoding="utf-8"))["traceEvents"])


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
        engine.stop()
        yield {
            "requests": count,
            "served_tokens_per_s": round(rate, 1),
            "replay_tokens_per_s": round(1e6 * count / us, 1),
            "served_share": round(rate * us / (1e6 * count), 4),
            "step_us": round(1e6 * count / rate, 2),
            "replay_us": round(us, 2),
            **gaps,
            "host_gap_share": round(times.gap_s / (times.gap_s + times.busy_s), 4),
        }


def gaps_of(engine: Engine, decoder: StampedDecoder, count: int, num_tokens: int) -> dict[str, object]:
    """Measures the gaps between the graphs of requests that run together, both ways."""
    decoder.stamps = []
    Crowd(engine, count, num_tokens).rate()
    by_events, decoder.stamps = decoder.gaps_us(), None
    fewer = min(num_tokens, PROFILED_TOKENS + 2 * count)
    by_profiler = profiled_gaps(lambda: Crowd(engine, count, fewer).rate())
    return spread("gap_us", by_events) | spread("gap_us_profiler", by_profiler)


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
