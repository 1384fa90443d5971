"""Times the captured decode step of a whole V4-shaped model with random weights, made in device memory.

    python tools/decode_step.py --shape flash --rows 1 8 32 128 --context 1024 [--out results.jsonl]

All layers are planned, built and captured as a served model's are. A GPU that cannot hold every layer's experts gets
``--expert-sets`` of them, shared between layers far apart ("aliased"): each layer still reads its bytes from memory,
because the layers between two uses of a set replace it in the L2 cache. Every row is a request of its own with
``--context`` tokens of random cache; token ids are drawn anew before every timed replay, so that experts vary.

The floor is the bytes that a step must read, over the memory's measured rate; docs/benchmarks.md explains the figures.
"""

import argparse
import shlex
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from layer.synthetic import SHAPES, Values, headers

from ownpath.bench.record import append_lines, provenance
from ownpath.cache.pools import CachePool, SequenceCache
from ownpath.config import EngineConfig, ModelConfig
from ownpath.engine.decoder import Decoder, DecodeRow
from ownpath.loading import device_caps
from ownpath.model.build import Builder
from ownpath.model.model import Model
from ownpath.ops import OpKind
from ownpath.plan.plan import PlannedOp, make_plan
from ownpath.plan.select import Demands
from ownpath.runners.make import make_runners
from ownpath.startup import compile_kernels
from ownpath.trace import Ledger
from ownpath.trace.launches import record_launches, slot_times

NUM_REPLAYS = 30
WARM_UP_S = 0.5


@dataclass(frozen=True)
class Sizes:
    """rows: of each step; context: tokens that each row's caches hold."""

    rows: tuple[int, ...]
    context: int


def main() -> int:
    """Prints a line for each number of rows."""
    args = _arguments()
    config = ModelConfig.from_dict(SHAPES[args.shape] | {"num_nextn_predict_layers": 0} | _layers(args))
    room = args.context + WARM_UP_TOKENS
    engine = EngineConfig("cuda", torch.bfloat16, room, max(args.rows))
    start = time.perf_counter()
    model = make_model(config, engine, args.export, args.expert_sets)
    setup_s = time.perf_counter() - start
    fixed = {name: getattr(args, name) for name in ("shape", "export", "context", "expert_sets")}
    fixed |= {"bench": "decode_step", "layers": config.num_hidden_layers, "setup_s": round(setup_s, 1)}
    fixed |= provenance("cuda", args.commit, shlex.join(sys.argv), "cuda events around a graph's replay")
    for row in measure(model, Sizes(tuple(args.rows), args.context), args.slots):
        print(_line(row), flush=True)
        if args.out:
            append_lines(args.out, [fixed | row])
    return 0


WARM_UP_TOKENS = 512
"""Positions that replays may add to the context."""


def _layers(args: argparse.Namespace) -> dict[str, Any]:
    if args.layers is None:
        return {}
    ratios = SHAPES[args.shape]["compress_ratios"][: args.layers]
    return {"num_hidden_layers": args.layers, "compress_ratios": ratios}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="flash")
    parser.add_argument("--export", choices=("nvidia", "full"), default="nvidia", help="dense weights: FP8 or NVFP4")
    parser.add_argument("--layers", type=int, help="the first layers only (default: all)")
    parser.add_argument("--expert-sets", type=int, default=24, help="sets of experts that the layers share")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--slots", action="store_true", help="also the time of each kind of slot, by the profiler")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="unknown", metavar="ID", help="recorded with every row")
    return parser.parse_args()


def make_model(config: ModelConfig, engine: EngineConfig, export: str, num_sets: int) -> Model:
    """Makes a model of random weights. Layer i uses the experts of layer i % num_sets."""
    index, device = headers(config, export), torch.device(engine.device)
    plan = make_plan(config, index, device_caps(engine.device), Demands(str(engine.dtype).removeprefix("torch.")))
    own = replace(plan, ops=tuple(op for op in plan.ops if not _is_alias(op, num_sets)))
    values = Values.of_seed(device, 1)
    runners = make_runners(own, tuple(values.operands(own, index)))
    compile_kernels(runners.values())
    for op in plan.ops:
        if _is_alias(op, num_sets):
            runners[op.spec.slot] = runners[f"layers.{_layer_of(op) % num_sets}.ffn.experts"]
    specs = {companion.spec.slot: companion.choice.kernel for companion in plan.companions}
    params = Values.of_seed(device, 0).params(config)
    return Builder(config, engine, runners, specs, params, Ledger(plan.slots)).model()


def _layer_of(op: PlannedOp) -> int:
    return int(op.spec.slot.split(".")[1])


def _is_alias(op: PlannedOp, num_sets: int) -> bool:
    return op.spec.kind is OpKind.MOE and _layer_of(op) >= num_sets


def measure(model: Model, sizes: Sizes, has_slots: bool) -> list[dict[str, Any]]:
    """Captures a decoder for the largest number of rows, then times each number."""
    _fill(model.caches)
    caches = [model.new_cache() for _ in range(max(sizes.rows))]
    decoder = Decoder(model, max(sizes.rows), model.config.vocab_size)
    decoder.buckets = tuple(sorted(sizes.rows))
    start = time.perf_counter()
    with torch.inference_mode():
        decoder.capture(lambda *_: None)
        capture_s = time.perf_counter() - start
        return [_time(model, decoder, caches[:count], sizes.context, capture_s, has_slots) for count in sizes.rows]


def _fill(pool: CachePool) -> None:
    generator = torch.Generator(pool.spec.device).manual_seed(3)
    for tensor in pool.tensors.values():
        tensor.normal_(generator=generator)


def _time(
    model: Model, decoder: Decoder, caches: list[SequenceCache], context: int, capture_s: float, has_slots: bool
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(4)

    def rows() -> list[DecodeRow]:
        ids = torch.randint(0, model.config.vocab_size, (len(caches),), generator=generator).tolist()
        return [DecodeRow(cache, token_id) for cache, token_id in zip(caches, ids, strict=True)]

    def reset() -> None:
        for cache in caches:
            cache.num_tokens = context

    captured = decoder._graphs[len(caches)]
    reset()
    until = time.perf_counter() + WARM_UP_S
    while time.perf_counter() < until:
        reset()
        decoder.step(rows())
    times, hosts = [], []
    for _ in range(NUM_REPLAYS):
        reset()
        decoder._rows.upload(rows())
        torch.cuda.synchronize()
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        events[0].record()
        captured.graph.replay()
        events[1].record()
        torch.cuda.synchronize()
        times.append(events[0].elapsed_time(events[1]))
        reset()
        wanted = rows()
        before = time.perf_counter()
        decoder._rows.upload(wanted)
        captured.graph.replay()
        hosts.append(1e6 * (time.perf_counter() - before))
        torch.cuda.synchronize()
    row = {
        "rows": len(caches),
        "ms": round(statistics.median(times), 3),
        "ms_min": round(min(times), 3),
        "ms_max": round(max(times), 3),
        "host_us": round(statistics.median(hosts), 1),
        "capture_s": round(capture_s, 1),
    }
    reset()
    decoder._rows.upload(rows())
    launches = record_launches(model.ledger, lambda: decoder._run(len(caches)))
    row["nodes"] = len(launches)
    if has_slots:
        kinds: dict[str, float] = defaultdict(float)
        for slot, us in slot_times(launches).items():
            kinds[_kind(slot)] += us
        row["slot_us"] = {kind: round(us, 1) for kind, us in sorted(kinds.items(), key=lambda pair: -pair[1])}
    return row


def _kind(slot: str | None) -> str:
    """Returns a slot's name without its layer."""
    if slot is None:
        return "(glue)"
    return slot.split(".", 2)[-1] if slot.startswith("layers.") else slot


def _line(row: dict[str, Any]) -> str:
    line = f"rows {row['rows']}: {row['ms']} ms ({row['ms_min']} to {row['ms_max']}), host {row['host_us']} us, "
    line += f"{row['nodes']} kernels"
    return line + ("; us by slot: " + ", ".join(f"{k} {v:.0f}" for k, v in row.get("slot_us", {}).items()))


if __name__ == "__main__":
    sys.exit(main())
