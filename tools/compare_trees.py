"""Compares the served rates of two source trees on this machine, in short rounds that take turns.

    git worktree add --detach ../before COMMIT
    python tools/compare_trees.py ../before . --requests 1,8,16 --rounds 12 --out compare.jsonl

Both trees serve the embedded model at the same time; one of them is asked at a time. Each round asks both, one after
the other, and each goes first as often as the other. Compared are seconds and the server's CPU seconds a token: the
medians over the rounds of this tree's divided by the other's, so that what else the machine does falls on both. A ratio
above 1 means slower. The middle half of the rounds' ratios shows how sure that is.
"""

import argparse
import asyncio
import itertools
import json
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from serve_rate import Server, exchange

from ownpath.bench.record import append_lines, provenance

PATH = "/v1/completions"
LONG_PROMPT, BLOCK_PROMPT = 200, 300
_FRESH = itertools.count()


class Cost(NamedTuple):
    """Seconds and CPU seconds of the server for each token."""

    wall: float
    cpu: float


def short_body(idx: int, num_tokens: int) -> dict[str, object]:
    """Returns a request for an answer of about ``num_tokens`` tokens."""
    return {"prompt": [3 + idx, 5, 7, 9], "max_tokens": num_tokens, "temperature": 0}


def streamed_body(idx: int, num_tokens: int) -> dict[str, object]:
    """Returns the same request, streamed."""
    return short_body(idx, num_tokens) | {"stream": True, "stream_options": {"include_usage": True}}


def long_body(idx: int, num_tokens: int) -> dict[str, object]:
    """Returns a request that mostly reads its prompt."""
    return {"prompt": [3 + idx, *range(5, LONG_PROMPT + 4)], "max_tokens": 1, "temperature": 0}


def block_body(idx: int, num_tokens: int) -> dict[str, object]:
    """Returns a request that mostly reads a prompt of more than a block of the caches, which none before began like."""
    number = next(_FRESH)
    return {
        "prompt": [3 + number % 1000, 3 + number // 1000, *range(5, BLOCK_PROMPT + 3)],
        "max_tokens": 1,
        "temperature": 0,
    }


WORKLOADS: dict[str, tuple[str, Callable[[int, int], dict[str, object]]]] = {
    "whole": ("completion_tokens", short_body),
    "stream": ("completion_tokens", streamed_body),
    "prompt": ("prompt_tokens", long_body),
    "block": ("prompt_tokens", block_body),
}
"""Name -> what is counted, and the requests."""


def cpu_seconds(pid: int) -> float:
    """Returns the CPU time that a process has used, of all its threads, to the nanosecond.

    Source: Linux numbers the CPU clock of a process so (``clock_getcpuclockid``).
    """
    return time.clock_gettime(~pid << 3 | 2)


async def cost_of(server: Server, workload: str, count: int, num_tokens: int) -> Cost:
    """Asks ``count`` times at once; returns what a token cost, by the answers' own usage."""
    counted, body_of = WORKLOADS[workload]
    cpu, start = cpu_seconds(server.pid), time.perf_counter()
    asked = [exchange(server.port, "POST", PATH, body_of(idx, num_tokens)) for idx in range(count)]
    answers = await asyncio.gather(*asked)
    wall = time.perf_counter() - start
    found = [re.findall(rf'"{counted}":\s*(\d+)'.encode(), answer) for answer in answers]
    assert all(found), answers
    total = sum(int(numbers[-1]) for numbers in found)
    return Cost(wall / total, (cpu_seconds(server.pid) - cpu) / total)


def compare(before: Server, after: Server, args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Yields a record for each workload and number of requests."""
    for workload in args.workloads.split(","):
        for count in map(int, args.requests.split(",")):
            rounds: list[tuple[Cost, Cost]] = []
            for number in range(-1, args.rounds):
                order = (before, after) if number % 2 == 0 else (after, before)
                costs = {one.port: asyncio.run(cost_of(one, workload, count, args.tokens)) for one in order}
                if number >= 0:  # the first round warms up
                    rounds.append((costs[before.port], costs[after.port]))
            yield {"workload": workload, "requests": count, "rounds": args.rounds, **figures(rounds)}


def figures(rounds: list[tuple[Cost, Cost]]) -> dict[str, float]:
    """Returns medians in microseconds a token, and of the ratios the median and the middle half's ends."""
    found: dict[str, float] = {}
    for name in Cost._fields:
        old, new = ([getattr(pair[side], name) for pair in rounds] for side in (0, 1))
        ratios = [later / max(earlier, 1e-9) for earlier, later in zip(old, new, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        found |= {f"{name}_us_before": 1e6 * statistics.median(old), f"{name}_us_after": 1e6 * statistics.median(new)}
        found |= {f"{name}_ratio": middle, f"{name}_ratio_p25": low, f"{name}_ratio_p75": high}
    return found


def main() -> None:
    """Prints a line for each comparison and appends it to ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a source tree")
    parser.add_argument("after", type=Path, help="another, whose costs are divided by the first one's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--requests", default="1,8,16", help="numbers of requests at once")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of each answer at most")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="unknown")
    args = parser.parse_args()
    command = f"python tools/compare_trees.py BEFORE AFTER --requests {args.requests} --rounds {args.rounds}"
    origin = provenance(args.device, args.commit, command, "wall clock, CPU clock") | {"cpus": os.cpu_count()}
    servers = Server(args.device, tree=args.before), Server(args.device, tree=args.after)
    try:
        for record in compare(*servers, args):
            print(json.dumps(record), flush=True)
            if args.out is not None:
                append_lines(args.out, [{"bench": "compare_trees", **record, **origin}])
    finally:
        for server in servers:
            server.stop()


if __name__ == "__main__":
    main()
