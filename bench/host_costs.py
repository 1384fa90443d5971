"""Measures the host's cost of calls: ``python bench/host_costs.py``, on a Hopper GPU.

It times a refused call (until its ValueError), an accepted one (until it returns; the GPU still runs then), and loading
all kernels of V4-Flash's shapes onto the device from a warm cache on disk. The first rows are the host's own speed: one
machine has been 1.6 times slower for seconds, in the middle of a run, so that rows compare only beside these.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ownpath import Nvfp4Linear, Nvfp4MoE
from ownpath.bench.operands import random_activations, random_fp8, random_moe, random_nvfp4
from ownpath.bench.record import provenance
from ownpath.bench.routing import uniform_routing
from ownpath.bench.shapes import LINEAR_SHAPES, moe_shape
from ownpath.conformance.operations import CASES, make_inputs
from ownpath.kernels.contract import NormWeights, RouterWeights, RouteWeights
from ownpath.kernels.dsl.cache import is_cached, load
from ownpath.kernels.registry import KERNELS
from ownpath.runners import Fp8Linear

CALLS = 2000
ROUNDS = 5
"""Every row is measured in each round, so that a slow moment of the machine shows in one column."""


def host_us(call: Callable[[], object]) -> float:
    """Returns the median microseconds until a call returns or raises ValueError."""
    times = []
    for idx in range(CALLS):
        start = time.perf_counter()
        with suppress(ValueError):
            call()
        times.append(1e6 * (time.perf_counter() - start))
        if idx % 100 == 0:
            torch.cuda.synchronize()
    return statistics.median(times)


def make_runners(generator: torch.Generator) -> tuple[list[Nvfp4Linear], list[Fp8Linear], Nvfp4MoE]:
    """Makes the runners of V4-Flash's shapes on these kernels."""
    shapes = [shape for shape in LINEAR_SHAPES if shape.name != "tiny"]
    nvfp4 = [random_nvfp4(shape, generator) for shape in shapes]
    fp8 = [random_fp8(shape, generator) for shape in shapes]
    experts = random_moe(moe_shape("v4-flash"), generator)
    moe = Nvfp4MoE(
        experts.w13, experts.w13_scale, experts.w13_scale_2, experts.w2, experts.w2_scale, experts.w2_scale_2, 10.0
    )
    return (
        [Nvfp4Linear(one.weight, one.weight_scale, one.weight_scale_2) for one in nvfp4],
        [Fp8Linear(one.weight, one.scale) for one in fp8],
        moe,
    )


def calls(
    linear: Nvfp4Linear, fp8: Fp8Linear, moe: Nvfp4MoE, generator: torch.Generator
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yields (name, call) for every kind of refused input, and for an accepted one."""
    width = linear.in_features
    x = random_activations(4, width + 8, generator)
    good = x[:, :width].contiguous()
    bad = {
        "dtype": good.half(),
        "shape": good[:, :-16],
        "device": good.cpu(),
        "stride": good.T.contiguous().T,
        "alignment": x.flatten()[1 : 4 * width + 1].view(4, width),
        "nothing (accepted)": good,
    }
    for name, runner in (("Nvfp4Linear", linear), ("Fp8Linear", fp8)):
        for what, given in bad.items():
            yield f"{name}, {what}", partial(runner, given)
    routing = uniform_routing(moe_shape("v4-flash"), 4, 0, "cuda")
    ids, weights = routing.topk_ids, routing.topk_weights
    for what, given in bad.items():
        yield f"Nvfp4MoE, {what}", partial(moe, given, ids, weights)
    ops = torch.ops.ownpath
    yield "Nvfp4Linear, through the operation", partial(ops.linear, good, linear.handle)
    yield "Fp8Linear, through the operation", partial(ops.linear, good, fp8.handle)
    yield "Nvfp4MoE, through the operation", partial(ops.experts, good, ids, weights, None, 0, moe.handle)
    out, workspace = torch.empty_like(good), moe.workspace(4, ids.shape[1])
    yield "Nvfp4MoE, out and workspace given", partial(moe.run, good, ids, weights, out=out, workspace=workspace)
    moved = [random_activations(4, width, generator) for _ in range(2)]
    yield "Nvfp4Linear, inputs that move", _turns(linear, moved)
    yield "Fp8Linear, inputs that move", _turns(fp8, moved)
    yield "Nvfp4MoE, ids' dtype", partial(moe, good, ids.float(), weights)
    yield "Nvfp4MoE, weights' shape", partial(moe, good, ids, weights[:, :-1])


def _turns(call: Callable[[torch.Tensor], object], inputs: list[torch.Tensor]) -> Callable[[], object]:
    """Returns a call that takes the inputs in turn, so that addresses change from call to call."""
    turn = itertools.cycle(inputs)
    return lambda: call(next(turn))


def companion_calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yields (name, call) of the small operations at V4-Flash's sizes and four tokens, as the model calls them."""
    wanted = ("flash", "hidden", "flash shared")
    seen = set()
    for case in CASES:
        if case.kernel in seen or case.label not in wanted:
            continue
        seen.add(case.kernel)
        name = case.kernel.partition(".")[2]
        kernel, inputs = KERNELS[case.kernel], make_inputs(case, 4, torch.device("cuda"))
        yield f"{name}, accepted", bound(kernel, case.op, inputs)
        if case.op in ("hyper_boundary", "router", "route", "grouped_linear"):
            yield f"{name}, outputs given", with_outputs(kernel, case.op, inputs)


def bound(kernel: Any, op: str, inputs: tuple[Any, ...]) -> partial[object]:
    """Returns a call of a small operation on a prepared operand."""
    if op == "router":
        logits, num_chosen, factor, bias, token_ids, table = inputs
        operand = kernel.prepare(RouterWeights(num_chosen, factor, bias, table))
        return partial(kernel.run, logits, token_ids, operand)
    if op == "route":
        return partial(kernel.run, inputs[0], inputs[3], kernel.prepare(RouteWeights(*inputs[1:3])))
    if op == "rms_norm":
        return partial(kernel.run, inputs[0], kernel.prepare(NormWeights(*inputs[1:])))
    *given, weights = inputs
    return partial(kernel.run, *given, kernel.prepare(weights))


def with_outputs(kernel: Any, op: str, inputs: tuple[Any, ...]) -> Callable[[], object]:
    """Returns a call as ``bound`` does, with outputs and workspace, so that it allocates nothing."""
    call = bound(kernel, op, inputs)
    out = call()
    if op == "hyper_boundary":
        *given, weights = inputs
        operand = kernel.prepare(weights)
        return partial(kernel.run, *given, operand, out=out, workspace=kernel.workspace(operand, len(inputs[0])))
    return partial(call, out=out)


def host_calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yields (name, call) of what depends on the host alone: Python arithmetic, and an allocation by torch."""
    x = torch.empty(4, 4096, dtype=torch.bfloat16, device="cuda")
    yield "a sum of 100 numbers in Python", lambda: sum(range(100))
    yield "torch.Tensor.new_empty", lambda: x.new_empty(4, 4096)


def main() -> None:
    """Prints the table; ``--out`` adds a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="")
    args = parser.parse_args()
    generator = torch.Generator("cuda").manual_seed(0)
    linears, fp8, moe = make_runners(generator)
    runners: list[Nvfp4Linear | Fp8Linear | Nvfp4MoE] = [*linears, *fp8, moe]
    configs = {config.name: config for runner in runners for config in runner.compile_configs()}
    missing = [name for name, config in configs.items() if not is_cached(config)]
    if missing:
        raise SystemExit(f"the cache is not warm: {len(missing)} kernels are missing, {missing[0]} is one")
    torch.cuda.synchronize()
    start = time.perf_counter()
    for config in configs.values():
        load(config, 0)
    ready_s = time.perf_counter() - start
    print(f"{len(configs)} kernels from a warm cache onto the device: {ready_s:.3f} s")
    by_shape = {(one.out_features, one.in_features): one for one in linears}
    square = next(one for one in fp8 if one.in_features == moe.hidden_size)
    timed = [*host_calls(), *calls(by_shape[4096, 4096], square, moe, generator), *companion_calls()]
    rounds = [{what: host_us(call) for what, call in timed} for _ in range(ROUNDS)]
    costs = {what: [one[what] for one in rounds] for what, _ in timed}
    for what, us in costs.items():
        print(f"{what:44s} {'  '.join(f'{one:6.1f}' for one in us)} us")
    if args.out:
        origin = provenance("cuda", args.commit, "python bench/host_costs.py", "host clock")
        line = {"bench": "host_costs", "kernels": len(configs), "ready_s": ready_s, "host_us_rounds": costs, **origin}
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
