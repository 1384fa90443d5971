"""Times a whole decoder layer of a published shape on the planned kernels, and compares it with the reference layer.

    python tools/full_layer.py --shape flash --layer csa --export nvidia --tokens 1 64 1024 [--out results.jsonl]

The layer's weights are made in device memory; the same values go to a layer whose plan allows the torch references
alone. A layer is everything between two residuals: both boundaries, attention and experts. Tokens are one
chunk of one sequence behind a context; both layers see the same streams and caches. The planned layer is captured in
a CUDA graph, and the L2 cache is overwritten before every timed replay; medians.

Cosines are of the whole output streams, and of what the experts added, so that the residual cannot hide an error.
With --routing score two experts that nearly tie may change places between two roundings; hash routing has no ties.
"""

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ownpath.assembly import load_part
from ownpath.attention.interface import DecodeStep
from ownpath.attention.rope import Rope
from ownpath.bench.published import SHAPES
from ownpath.bench.record import append_lines, provenance
from ownpath.bench.synthetic import RATIOS, Values, layer_config
from ownpath.bench.timing import capture_graph
from ownpath.cache.pools import CachePool, CacheSpec
from ownpath.config import EngineConfig, ModelConfig
from ownpath.kernels.hyper.ref import hyper_post, sinkhorn
from ownpath.loading import device_caps
from ownpath.model.batch import ForwardBatch
from ownpath.model.block import Block, Residual
from ownpath.plan.exports import drawn_checkpoint
from ownpath.plan.plan import Plan, make_plan
from ownpath.plan.select import Caps, Demands
from ownpath.runners import Mix
from ownpath.trace import Ledger
from ownpath.trace.launches import record_launches, slot_times

MIN_COSINE = 0.9999
NUM_REPLAYS = 20
L2_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Layer:
    """One decoder layer on the kernels of its plan."""

    plan: Plan
    block: Block
    rope: Rope
    ledger: Ledger


@dataclass(frozen=True)
class Input:
    """A layer's input: the residual before it, and a chunk of tokens behind a context."""

    residual: Residual
    batch: ForwardBatch


def main() -> int:
    """Prints a table of sizes; 1 if a cosine is too low."""
    args = _arguments()
    config = layer_config(args.shape, args.layer, args.routing)
    engine = EngineConfig(args.device, getattr(torch, args.dtype), args.context + max(args.tokens))
    caps = device_caps(args.device)
    start = time.perf_counter()
    ours = make_layer(config, engine, args.export, caps)
    setup_s = time.perf_counter() - start
    reference = make_layer(config, engine, args.export, Caps(caps.device_type, f"{caps.name}, references alone"))
    fixed = {name: getattr(args, name) for name in ("shape", "layer", "export", "routing", "context", "dtype")}
    fixed |= {"bench": "full_layer", "setup_s": round(setup_s, 2)}
    fixed |= provenance(args.device, args.commit, shlex.join(sys.argv), "cuda events")
    fixed["kernels"] = sorted({kernel for _, kernel in ours.plan.slots.values()})
    rows = [fixed | measure(ours, reference, engine, args.context, num_tokens) for num_tokens in args.tokens]
    for row in rows:
        print(_line(row), flush=True)
        if args.out:
            append_lines(args.out, [row])
    return int(any(row["cosine_streams"] < MIN_COSINE or row["cosine_experts"] < MIN_COSINE for row in rows))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="flash")
    parser.add_argument("--layer", choices=tuple(RATIOS), default="csa")
    parser.add_argument("--export", choices=("nvidia", "full"), default="nvidia", help="dense weights: FP8 or NVFP4")
    parser.add_argument("--routing", choices=("hash", "score"), default="hash")
    parser.add_argument("--context", type=int, default=1024, help="tokens before the chunk")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 256, 1024])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="unknown", metavar="ID", help="recorded with every row")
    return parser.parse_args()


def make_layer(config: ModelConfig, engine: EngineConfig, export: str, caps: Caps) -> Layer:
    """Makes the layer that is planned for ``caps``, with the same weights for any."""
    index = drawn_checkpoint(config, export)
    plan = make_plan(config, index, caps, Demands(str(engine.dtype).removeprefix("torch.")))
    builder = load_part(plan, index, engine).builder
    rope = Rope.for_layer(config, bool(config.compress_ratios[0]), torch.device(engine.device))
    return Layer(plan, builder.block(0, rope), rope, builder.ledger)


def make_input(config: ModelConfig, engine: EngineConfig, context: int, num_tokens: int) -> Input:
    """Makes reproducible input: streams, a pending output with its mix, and caches full of random entries."""
    device = torch.device(engine.device)
    values = Values.of_seed(device, 2)
    pool = CachePool(replace(CacheSpec.of(config, engine), max_sequences=1))
    for tensor in pool.tensors.values():
        tensor.copy_(values.normal(*tensor.shape))
    cache = pool.new_sequence()
    cache.num_tokens = context
    streams, dim = config.hc_mult, config.hidden_size
    comb = sinkhorn(values.normal(num_tokens, streams, streams), config.hc_sinkhorn_iters, config.hc_eps)
    mix = Mix(2 * torch.sigmoid(values.normal(num_tokens, streams)), comb)
    x_TSD = values.normal(num_tokens, streams, dim).to(engine.dtype)
    y_TD = values.normal(num_tokens, dim).to(engine.dtype)
    token_ids = (values.integers(0, 255, torch.Size((num_tokens,))).int() * 16).tolist()
    batch = ForwardBatch.of([(token_ids, cache)], device)
    return Input(Residual(x_TSD, y_TD, mix), batch)


def run(layer: Layer, given: Input) -> Residual:
    """Runs the layer's step."""
    return runner(layer, given)()


def runner(layer: Layer, given: Input) -> Callable[[], Residual]:
    """Prepares the layer's step, as the model does once for all layers, and returns what runs it."""
    tables, ids_T = given.batch.tables, given.batch.token_ids_T
    rotation, step = layer.rope.at(given.batch.positions_T), layer.block.prepare(tables)
    if isinstance(step, DecodeStep):
        sliding, compress = step.rotations
        rotation, ids_T = compress if layer.plan.config.compress_ratios[0] else sliding, ids_T.int()
    return lambda: layer.block(given.residual, rotation, ids_T, step)


def compare(ours: Layer, reference: Layer, engine: EngineConfig, context: int, num_tokens: int) -> dict[str, float]:
    """Computes cosines of the layer's output streams and of its experts' output."""
    found, expected = (run(one, make_input(one.plan.config, engine, context, num_tokens)) for one in (ours, reference))
    return {
        "cosine_streams": cosine(_streams(found), _streams(expected)),
        "cosine_experts": cosine(_output(found), _output(expected)),
    }


@torch.inference_mode()
def measure(ours: Layer, reference: Layer, engine: EngineConfig, context: int, num_tokens: int) -> dict[str, Any]:
    """Measures cosines, then times, for one number of tokens."""
    config = ours.plan.config
    row: dict[str, Any] = {"tokens": num_tokens} | compare(ours, reference, engine, context, num_tokens)
    if torch.device(engine.device).type != "cuda":
        return row
    given = make_input(config, engine, context, num_tokens)
    # The torch reference of the experts asks the host which experts were chosen: no graph can hold that.
    is_captured = "ref.nvfp4_moe" not in {kernel for _, kernel in ours.plan.slots.values()}
    times = (_graph_us if is_captured else _events_us)(runner(ours, given))
    again = make_input(config, engine, context, num_tokens)
    launches = record_launches(ours.ledger, lambda: run(ours, again))
    slots = {(slot or "(glue)").removeprefix("layers.0."): us for slot, us in slot_times(launches).items()}
    row |= {"us": statistics.median(times), "us_min": min(times), "us_max": max(times), "graph": is_captured}
    row["reference_us"] = statistics.median(_events_us(runner(reference, given), num_runs=3))
    row["slot_us"] = {slot: round(total, 1) for slot, total in sorted(slots.items(), key=lambda item: -item[1])}
    return row


def cosine(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Computes the cosine of two tensors as vectors, in float64; 0 if either has no direction or is not finite."""
    a, b = found.double().flatten(), expected.double().flatten()
    return float(torch.nan_to_num(torch.dot(a, b) / (a.norm() * b.norm()), nan=0.0))


def _streams(residual: Residual) -> torch.Tensor:
    assert residual.mix is not None
    return hyper_post(residual.x_TSD, _output(residual), residual.mix)


def _output(residual: Residual) -> torch.Tensor:
    assert residual.y_TD is not None
    assert residual.other_TD is not None
    return residual.y_TD + residual.other_TD


def _graph_us(step: Callable[[], object]) -> list[float]:
    """Returns the microseconds of each replay of the captured step, with a cold L2 cache."""
    return _events_us(capture_graph([step], num_warm_ups=3).replay)


def _events_us(step: Callable[[], object], num_runs: int = NUM_REPLAYS) -> list[float]:
    flush = torch.empty(L2_BYTES, dtype=torch.uint8, device="cuda")
    times = []
    for idx in range(num_runs + 1):
        flush.fill_(idx % 251)
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        stop.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(stop))
    return times[1:]


def _line(row: dict[str, Any]) -> str:
    head = f"{row['shape']} {row['layer']} {row['export']} T={row['tokens']}"
    cosines = f"cosine {row['cosine_streams']:.7f} streams, {row['cosine_experts']:.7f} experts"
    if "us" not in row:
        return f"{head}: {cosines}"
    top = ", ".join(f"{slot} {total:.0f}" for slot, total in list(row["slot_us"].items())[:8])
    return f"{head}: {row['us']:.1f} us (reference {row['reference_us']:.0f} us), {cosines}; us by slot: {top}"


if __name__ == "__main__":
    sys.exit(main())
