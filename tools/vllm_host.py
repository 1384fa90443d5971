"""The host's part of tools/vllm_rate.py: turns of processes on one device, and what a step of vLLM calls on the host.

One engine's process is timed at a time, case by case in turn, so that neither side has the machine as the other left
it: in one process, whichever engine came second had a profiler attached before it was timed.
"""

import cProfile
import gc
import pstats
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_POLL_S = 0.002
_SHOWN = 40


@dataclass(frozen=True)
class HostTime:
    """Times of steps on the host, in microseconds. gc_us: of all of them, in the garbage collector."""

    walls_us: tuple[float, ...]
    gc_us: float

    def __add__(self, other: "HostTime") -> "HostTime":
        return HostTime(self.walls_us + other.walls_us, self.gc_us + other.gc_us)

    @property
    def wall_us(self) -> float:
        """The median."""
        return statistics.median(self.walls_us)

    @property
    def numbers(self) -> dict[str, float]:
        """A step's median, tenth and ninetieth percentile, and its time in the collector, mean."""
        tenths = statistics.quantiles(self.walls_us, n=10)
        found = {"wall_us": self.wall_us, "wall_p10_us": tenths[0], "wall_p90_us": tenths[-1]}
        found["gc_us"] = self.gc_us / len(self.walls_us)
        return {key: round(value, 1) for key, value in found.items()}

    def __str__(self) -> str:
        return ", ".join(f"{key} {value:,.0f}" for key, value in self.numbers.items())


@dataclass(frozen=True)
class Turns:
    """Turns of several processes: the one whose place the number of finished turns has goes on.

    A process that ends leaves a file of its own, and its turns are skipped.
    """

    folder: Path
    place: int
    size: int

    @contextmanager
    def turn(self, number: int) -> Iterator[None]:
        """Waits until each process before this one has had this turn, and each behind it the turn before."""
        while not all(self._is_over(place, number - (place > self.place)) for place in range(self.size)):
            time.sleep(_POLL_S)
        yield
        (self.folder / f"turn.{self.place}.{number}").touch()

    def leave(self) -> None:
        """Lets the others go on without this process."""
        (self.folder / f"left.{self.place}").touch()

    def _is_over(self, place: int, number: int) -> bool:
        if place == self.place or number < 0 or (self.folder / f"left.{place}").exists():
            return True
        return (self.folder / f"turn.{place}.{number}").exists()


@contextmanager
def collected() -> Iterator[list[float]]:
    """Yields a list, to which each run of the garbage collector adds its seconds."""
    starts, seconds = list[float](), list[float]()

    def note(phase: str, _: Any) -> None:
        if phase == "start":
            starts.append(time.perf_counter())
        elif starts:
            seconds.append(time.perf_counter() - starts.pop())

    gc.callbacks.append(note)
    try:
        yield seconds
    finally:
        gc.callbacks.remove(note)


def host_calls(step: Callable[[], object], num_steps: int) -> list[dict[str, object]]:
    """Runs steps under cProfile; returns the functions with the most time of their own and with the most in total:
    calls, and microseconds a step."""
    profile = cProfile.Profile()
    with profile:
        for _ in range(num_steps):
            step()
    found = []
    for (file, line, name), (_, calls, own, total, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        where = name if file == "~" else f"{'/'.join(Path(file).parts[-3:])}:{line} {name}"
        times = {"own_us": round(1e6 * own / num_steps, 1), "total_us": round(1e6 * total / num_steps, 1)}
        found.append({"function": where, "calls": calls / num_steps} | times)
    chosen = {
        id(row): row
        for key in ("own_us", "total_us")
        for row in sorted(found, key=lambda row: -float(row[key]))[:_SHOWN]
    }
    return list(chosen.values())
