"""Times sums over ranks: ``torchrun --nproc-per-node 2 bench/exchange.py --out bench/results/exchange.jsonl``.

Each system's calls are captured in a graph, whose replays are timed with events; a row has the median of the slowest
rank per call, with the 10th and 90th percentile of that rank. "triton.reduce" is ours; "symmetric one-shot" and "nccl"
are torch's. For the boundary: ``added us`` is what pushing and adding costs beyond the same boundary of one rank.
Before anything is timed, every system's sum is compared with the twin's. Has not been run: it needs two GPUs.
"""

import argparse
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ownpath.conformance.operations import make_inputs
from ownpath.kernels.cases import KernelCase
from ownpath.kernels.exchange.collectives import GroupCollectives, SymmetricCollectives
from ownpath.kernels.exchange.gather import PUSHED_GATHER
from ownpath.kernels.exchange.launch import PUSHED_REDUCE
from ownpath.kernels.exchange.layout import WindowLayout
from ownpath.kernels.exchange.ref import all_reduce, reduce_scatter
from ownpath.kernels.exchange.scatter import PUSHED_SCATTER
from ownpath.kernels.exchange.symmetric import open_window
from ownpath.kernels.exchange.window import Window
from ownpath.kernels.hyper.launch import HYPER_BOUNDARY

CALLS, REPLAYS, WARM_UPS = 20, 50, 5
Call = Callable[[], object]


def replay_us(call: Call) -> list[float]:
    """Returns microseconds per call of each replay of a graph of ``CALLS`` calls; ranks start each replay together."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    times = []
    for _ in range(WARM_UPS + REPLAYS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        dist.barrier()
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / CALLS)
    return times[WARM_UPS:]


def slowest(times: list[float]) -> dict[str, float]:
    """Returns the quantiles of the rank whose median is the largest."""
    cuts = statistics.quantiles(times, n=10)
    mine = (statistics.median(times), cuts[0], cuts[-1])
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    return dict(zip(("us", "p10_us", "p90_us"), max(ranks), strict=True))


def sums(window: Window, num_tokens: int, width: int, group: dist.ProcessGroup) -> dict[str, Call]:
    """Returns each system's sum of [T, D], all of them right."""
    size, rank, device = window.layout.size, window.rank, window.words.device
    parts = [torch.arange(num_tokens * width, device=device) % 61 + one for one in range(size)]
    parts = [one.to(torch.bfloat16).view(num_tokens, width) for one in parts]
    mine, operand = parts[rank], PUSHED_REDUCE.prepare(window)
    symmetric, nccl = SymmetricCollectives(group, num_tokens * width), GroupCollectives(group)
    for total in (PUSHED_REDUCE.run(mine, operand), symmetric.all_reduce(mine.clone()), nccl.all_reduce(mine.clone())):
        assert torch.equal(total, all_reduce(parts))
    first, second, out = mine.clone(), mine.clone(), torch.empty_like(mine)
    return {
        "triton.reduce": lambda: PUSHED_REDUCE.run(mine, operand, out=out),
        "symmetric one-shot": lambda: symmetric.all_reduce(first),
        "nccl": lambda: nccl.all_reduce(second),
    }


def boundaries(window: Window, num_tokens: int, width: int) -> tuple[Call, Call]:
    """Returns a boundary that adds all ranks' parts, and the same of one rank."""
    case = KernelCase("hyper_boundary", "flash", (width, 24, 1), (num_tokens,))
    x_TSD, y_TD, mix, weights = make_inputs(case, num_tokens, window.words.device)[:4]
    across, alone = HYPER_BOUNDARY.prepare(weights, window), HYPER_BOUNDARY.prepare(weights)
    return (
        lambda: HYPER_BOUNDARY.run(x_TSD, y_TD, mix, across),
        lambda: HYPER_BOUNDARY.run(x_TSD, y_TD, mix, alone),
    )


def gathers(window: Window, num_tokens: int, width: int, group: dist.ProcessGroup) -> dict[str, Call]:
    """Returns each system's gather of rows, both of them right."""
    size, device = window.layout.size, window.words.device
    parts = [torch.randn(num_tokens, width, device=device, generator=_seeded(device, rank)) for rank in range(size)]
    mine, operand = parts[window.rank].to(torch.bfloat16), PUSHED_GATHER.prepare(window)
    nccl, expected = GroupCollectives(group), torch.cat(parts).to(torch.bfloat16)
    for found in (PUSHED_GATHER.run(mine, operand, dim=0), nccl.all_gather(mine)):
        assert torch.equal(found, expected)
    out = torch.empty_like(expected)
    return {
        "triton.gather": lambda: PUSHED_GATHER.run(mine, operand, dim=0, out=out),
        "nccl": lambda: nccl.all_gather(mine),
    }


def scatters(window: Window, num_tokens: int, width: int, group: dist.ProcessGroup) -> dict[str, Call]:
    """Returns each system's sums of a rank's own rows, both of them right: of whole numbers, exact in any order."""
    size, rank, device = window.layout.size, window.rank, window.words.device
    whole = torch.arange(size * num_tokens * width, device=device).view(-1, width) % 61
    parts = [(whole + one).to(torch.bfloat16) for one in range(size)]
    operand, nccl, expected = PUSHED_SCATTER.prepare(window), GroupCollectives(group), reduce_scatter(parts, rank)
    for found in (PUSHED_SCATTER.run(parts[rank], operand), nccl.reduce_scatter(parts[rank])):
        assert torch.equal(found, expected)
    out = torch.empty_like(expected)
    return {
        "triton.scatter": lambda: PUSHED_SCATTER.run(parts[rank], operand, out=out),
        "nccl": lambda: nccl.reduce_scatter(parts[rank]),
    }


def _seeded(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def rows_of(window: Window, num_tokens: int, width: int, group: dist.ProcessGroup) -> list[dict[str, Any]]:
    """Returns the rows of one size."""
    size = {"ranks": window.layout.size, "tokens": num_tokens, "width": width}
    found = []
    for name, call in sums(window, num_tokens, width, group).items():
        found.append({**size, "what": "sum", "system": name, **slowest(replay_us(call))})
    for name, call in gathers(window, num_tokens, width, group).items():
        found.append({**size, "what": "gather", "system": name, **slowest(replay_us(call))})
    for name, call in scatters(window, num_tokens, width, group).items():
        found.append({**size, "what": "scatter", "system": name, **slowest(replay_us(call))})
    across, alone = (slowest(replay_us(call)) for call in boundaries(window, num_tokens, width))
    added = {"added_us": across["us"] - alone["us"], "alone_us": alone["us"]}
    return [*found, {**size, "what": "boundary", "system": "triton.reduce", **across, **added}]


def main() -> None:
    """Measures and writes JSON lines from rank 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--width", type=int, default=4096)
    args = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl")
    group = dist.group.WORLD
    assert group is not None
    layout = WindowLayout(group.size(), max(args.tokens) * args.width)
    window = open_window(layout, group, dist.new_group(backend="gloo"))
    for num_tokens in args.tokens:
        for row in rows_of(window, num_tokens, args.width, group):
            window.check("bench")
            if window.rank == 0:
                print(json.dumps(row), flush=True)
                with args.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
