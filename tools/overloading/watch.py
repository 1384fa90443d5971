"""A watch on the server's process: memory, descriptors, threads, and what it says of itself."""

import asyncio
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from overloading.client import Unanswered, ask, request_bytes

PERIOD_S = 0.5
LIMITS = ("kv_cache_blocks", "kv_cache_slots")
"""Series that say how much there is: without them, that nothing is held says nothing."""
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_blocks_used", "kv_cache_slots_used")
"""Series of ``/metrics`` that must be 0 where nothing runs."""


@dataclass(frozen=True)
class Sample:
    """The process at a point in time. health_s: how long /health took; None if it was not 200."""

    at_s: float
    rss_mb: float
    descriptors: int
    threads: int
    health_s: float | None


class Watch:
    """Looks at the server every half second. problems: what it said other than that it is healthy."""

    def __init__(self, pid: int, port: int) -> None:
        self._pid, self._port, self._begun = pid, port, time.monotonic()
        self.samples: list[Sample] = []
        self.problems: list[str] = []

    async def run(self) -> None:
        """Looks until it is cancelled."""
        while True:
            self.samples.append(await self.look())
            await asyncio.sleep(PERIOD_S)

    async def look(self) -> Sample:
        """Takes one sample."""
        begun = time.monotonic()
        health_s = await self._health(begun)
        status = Path(f"/proc/{self._pid}/status").read_text(encoding="utf-8")
        rss, threads = (re.search(rf"^{name}:\s+(\d+)", status, re.M) for name in ("VmRSS", "Threads"))
        assert rss is not None
        assert threads is not None
        num_files = sum(1 for _ in Path(f"/proc/{self._pid}/fd").iterdir())
        return Sample(begun - self._begun, int(rss[1]) / 1024, num_files, int(threads[1]), health_s)

    async def _health(self, begun: float) -> float | None:
        try:
            head, body = await ask(self._port, request_bytes("GET", "/health"))
        except (Unanswered, OSError) as error:
            self.problems.append(f"/health: {error}")
            return None
        if head.status != 200:
            self.problems.append(f"/health: {head.status} {body[:80]!r}")
            return None
        return time.monotonic() - begun

    async def gauges(self) -> dict[str, float]:
        """Reads what the engine holds."""
        _, body = await ask(self._port, request_bytes("GET", "/metrics"))
        found = re.findall(r"^ownpath_(\w+) ([-+.e\d]+)$", body.decode(), re.M)
        values = {name: float(value) for name, value in found}
        assert all(values[name] > 0 for name in LIMITS), "the server does not say how many blocks and slots it has"
        return {name: values[name] for name in GAUGES}


@dataclass(frozen=True)
class Trend:
    """A quantity's medians over the first and the last third of a run."""

    first: float
    last: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Trend":
        third = max(len(values) // 3, 1)
        return cls(statistics.median(values[:third]), statistics.median(values[-third:]))
