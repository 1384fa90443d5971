"""Loads ``ownpath serve`` beyond what it can do, with clients that leave, are killed, or send what nobody should.

    PYTHONPATH=src python tools/overload.py --seconds 600 --times 10

First a few clients at a time show how many good requests a second the server answers; then requests come at ``--times``
that rate, whether or not earlier ones are answered. Exit code 1 and a line for each fault: a request that ended neither
in an answer nor in a named error, a health check that failed, memory, descriptors or threads that grew, blocks or slots
that stayed taken, an answer that the load changed. The last line is the result as JSON.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from overloading.client import Unanswered, ask, json_request
from overloading.mix import GOOD, KINDS, Kind
from overloading.watch import GAUGES, Trend, Watch

START_LIMIT_S, SETTLE_LIMIT_S, END_LIMIT_S = 180.0, 60.0, 30.0
MAX_OPEN = 600
"""Requests on their way at once: fewer than the connections that the server keeps for one address."""
GROWTH_MB, GROWTH_FILES, GROWTH_THREADS = 48.0, 16.0, 4.0
"""Between the first and the last third. Memory: some answers at their limits, which come at any time."""
_KILLED_EVERY_S, _KILLED_STREAMS = 1.0, 8
_VICTIM = """
import json, socket, sys, time
body = json.dumps({"prompt": [5, 7, 9], "max_tokens": 500, "ignore_eos": True, "stream": True}).encode()
head = "POST /v1/completions HTTP/1.1\\r\\nHost: 127.0.0.1\\r\\nContent-Type: application/json\\r\\n"
kept = []
for _ in range(int(sys.argv[2])):
    one = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
    one.sendall((head + f"Content-Length: {len(body)}\\r\\n\\r\\n").encode() + body)
    kept.append(one)
while True:
    time.sleep(1)
"""
"""A client process that is to be killed amid its streams, none of which it reads."""


class Server:
    """``ownpath serve`` of the embedded model on a free port, with time limits that a run can reach."""

    def __init__(self, options: Sequence[str]) -> None:
        command = [sys.executable, "-m", "ownpath", "serve", "--port", "0", "--log-requests", "off", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        self.lines: list[str] = []
        self.port = self._read_port()

    def _read_port(self) -> int:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"ownpath serves \S+ at http://127\.0\.0\.1:(\d+)", line):
                return int(found[1])
        raise SystemExit("the server did not start:\n" + "".join(self.lines))

    async def read_log(self) -> None:
        """Keeps what the server writes, until it ends."""
        assert self.process.stderr is not None
        while line := await asyncio.to_thread(self.process.stderr.readline):
            self.lines.append(line)

    def end(self) -> None:
        """Asks the server to end."""
        self.process.send_signal(signal.SIGTERM)


@dataclass
class Tally:
    """The ends of all requests. faults: those that no request may have."""

    ends: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    faults: list[str] = field(default_factory=list)
    num_held_back: int = 0
    num_killed: int = 0

    async def run(self, kind: Kind, port: int, rng: random.Random) -> str:
        """Sends one request of a kind and notes its end."""
        try:
            end = await kind.run(port, rng)
        except (Unanswered, OSError, ValueError, KeyError) as error:
            end = f"{type(error).__name__}: {error}"
        if end not in kind.ends:
            self.faults.append(f"{kind.name}: {end[:200]}")
            end = "FAULT"
        self.ends[kind.name][end] += 1
        return end


async def measure_rate(port: int, seconds: float, rng: random.Random) -> float:
    """Returns good requests answered per second, by 16 clients that each wait for their answer."""
    tally, end = Tally(), time.monotonic() + seconds
    count = 0

    async def client() -> None:
        nonlocal count
        while time.monotonic() < end:
            kind = rng.choices(GOOD, [it.share for it in GOOD])[0]
            is_answered = await tally.run(kind, port, rng) == "answer"
            count += is_answered

    begun = time.monotonic()
    await asyncio.gather(*(client() for _ in range(16)))
    assert not tally.faults, tally.faults
    return count / (time.monotonic() - begun)


async def send_all(port: int, rate: float, seconds: float, tally: Tally, rng: random.Random) -> int:
    """Sends ``rate`` requests a second for so long, and waits for their ends. Returns how many it sent."""
    begun, sent = time.monotonic(), 0
    tasks: set[asyncio.Task[str]] = set()
    while (now := time.monotonic() - begun) < seconds:
        due = int(now * rate) + 1 - sent - tally.num_held_back
        for _ in range(due):
            if len(tasks) >= MAX_OPEN:
                tally.num_held_back += 1
                continue
            kind = rng.choices(KINDS, [it.share for it in KINDS])[0]
            task = asyncio.create_task(tally.run(kind, port, rng))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            sent += 1
        await asyncio.sleep(0.01)
    await asyncio.gather(*tasks)
    return sent


async def kill_clients(port: int, tally: Tally, rng: random.Random) -> None:
    """Starts client processes with open streams and kills each, until it is cancelled."""
    while True:
        command = [sys.executable, "-S", "-c", _VICTIM, str(port), str(_KILLED_STREAMS)]
        victim = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            await asyncio.sleep(_KILLED_EVERY_S * (0.5 + rng.random()))
        finally:
            victim.kill()
            victim.wait()
        tally.num_killed += 1


async def probe(port: int) -> object:
    """Returns a greedy answer, which no load may change."""
    fields: dict[str, object] = {"messages": [{"role": "user", "content": "What is 17 plus 25?"}], "temperature": 0}
    head, body = await ask(port, json_request("/v1/chat/completions", fields | {"max_tokens": 40}))
    return json.loads(body)["choices"] if head.status == 200 else head.status


async def settle(watch: Watch) -> dict[str, float]:
    """Waits until the engine holds nothing any more; returns what it still holds."""
    end = time.monotonic() + SETTLE_LIMIT_S
    while any(held := await watch.gauges()) and any(held.values()) and time.monotonic() < end:
        await asyncio.sleep(0.2)
    return held


@dataclass(frozen=True)
class Outcome:
    """The findings of a run. idle_before, idle_after: descriptors and threads while nothing runs."""

    rate: float
    num_sent: int
    held: dict[str, float]
    memory_mb: Trend
    descriptors: Trend
    threads: Trend
    idle_before: tuple[int, int]
    idle_after: tuple[int, int]
    health_s: tuple[float, float]
    """Median and longest."""
    num_health: int


async def overload(port: int, watch: Watch, seconds: float, times: float, tally: Tally, seed: int) -> Outcome:
    """Runs the load against the server at a port, and notes the faults of requests and answers."""
    rng = random.Random(seed)
    before = await probe(port)
    rate = await measure_rate(port, min(max(seconds / 20, 0.5), 10.0), rng)
    await settle(watch)
    idle = await watch.look()
    watching = asyncio.create_task(watch.run())
    killing = asyncio.create_task(kill_clients(port, tally, rng))
    sent = await send_all(port, rate * times, seconds, tally, rng)
    for task in (watching, killing):
        task.cancel()
    await asyncio.gather(watching, killing, return_exceptions=True)
    held = await settle(watch)
    await asyncio.sleep(0.5)
    after = await watch.look()
    if await probe(port) != before:
        tally.faults.append("an answer is another one than before the load")
    samples = watch.samples
    health = sorted(sample.health_s for sample in samples if sample.health_s is not None) or [0.0]
    return Outcome(
        rate,
        sent,
        held,
        Trend.of([sample.rss_mb for sample in samples]),
        Trend.of([float(sample.descriptors) for sample in samples]),
        Trend.of([float(sample.threads) for sample in samples]),
        (idle.descriptors, idle.threads),
        (after.descriptors, after.threads),
        (health[len(health) // 2], health[-1]),
        len(samples),
    )


def faults_of(outcome: Outcome, watch: Watch) -> list[str]:
    """Lists what grew, what stayed taken, and what the health checks said."""
    faults = [*watch.problems]
    faults += [f"{name} is {outcome.held.get(name)} with nothing to do" for name in GAUGES if outcome.held.get(name)]
    for name, trend, growth in (
        ("memory in MB", outcome.memory_mb, GROWTH_MB),
        ("descriptors", outcome.descriptors, GROWTH_FILES + 0.2 * outcome.descriptors.first),
        ("threads", outcome.threads, GROWTH_THREADS),
    ):
        if trend.last - trend.first > growth:
            faults.append(f"{name} grew from {trend.first:g} to {trend.last:g} (medians of the first and last third)")
    if outcome.idle_after[0] > outcome.idle_before[0] + 2:
        faults.append(
            f"descriptors while idle: {outcome.idle_before[0]} before the load, {outcome.idle_after[0]} after"
        )
    return faults


async def run(args: argparse.Namespace, server: Server, tally: Tally) -> Outcome:
    """Loads the server and ends it."""
    logging = asyncio.create_task(server.read_log())
    watch = Watch(server.process.pid, server.port)
    outcome = await overload(server.port, watch, args.seconds, args.times, tally, args.seed)
    tally.faults += faults_of(outcome, watch)
    server.end()
    try:
        await asyncio.wait_for(logging, END_LIMIT_S)
    except TimeoutError:
        tally.faults.append(f"the server did not end within {END_LIMIT_S:g} s")
        server.process.kill()
    code = server.process.wait()
    if code:
        tally.faults.append(f"the server ended with {code}")
    told = [line.strip() for line in server.lines if re.search("Traceback|unexpected|Error", line)]
    tally.faults += [f"the log says: {line[:200]}" for line in told]
    return outcome


def tell(outcome: Outcome, tally: Tally, seconds: float) -> None:
    """Prints how requests ended, and how the process did."""
    for name, ends in tally.ends.items():
        print(f"{name:24}", *(f"{end} {count}" for end, count in sorted(ends.items())), sep="  ")
    print(
        f"{outcome.rate:.1f} good requests a second at 16 clients; then {outcome.num_sent / seconds:.0f} requests a",
        end=" ",
    )
    print(f"second ({tally.num_held_back} held back at {MAX_OPEN} open), {tally.num_killed} client processes killed")
    for unit, trend in (("MB", outcome.memory_mb), ("descriptors", outcome.descriptors), ("threads", outcome.threads)):
        print(f"first third {trend.first:g} {unit}, last {trend.last:g}")
    (files, threads), (files_after, threads_after) = outcome.idle_before, outcome.idle_after
    print(f"idle: {files} descriptors, {threads} threads before; {files_after}, {threads_after} after")
    median, longest = outcome.health_s
    print(f"/health: {outcome.num_health} times, median {median * 1e3:.0f} ms, longest {longest * 1e3:.0f} ms")


def main() -> int:
    """Runs the load; returns 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--times", type=float, default=10.0, help="of the requests a second that the server answers")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--serve", default="--request-timeout 20", help="more options of ownpath serve")
    args = parser.parse_args()
    tally, begun = Tally(), time.monotonic()
    server = Server(args.serve.split())
    try:
        outcome = asyncio.run(run(args, server, tally))
    finally:
        server.process.kill()
    tell(outcome, tally, args.seconds)
    for fault, count in Counter(tally.faults).most_common(20):
        print(f"FAULT {count} times: {fault}")
    result = asdict(outcome) | {"ends": {name: dict(ends) for name, ends in tally.ends.items()}}
    result |= {"seconds": args.seconds, "times": args.times, "faults": len(tally.faults), "killed": tally.num_killed}
    print(json.dumps(result | {"cpus": os.cpu_count(), "whole_s": round(time.monotonic() - begun, 1)}))
    return 1 if tally.faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
