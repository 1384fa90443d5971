"""The engine's load, and what it has counted since it started: the numbers of ``/metrics`` that are the engine's.

The engine's thread writes; any other may read a number at any time, and sees the newest or the one before it.
"""

from bisect import bisect_left
from dataclasses import dataclass, field

STEP_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 50, 300)
"""Upper bounds of a step's buckets, from the fastest decode step to the default limit of the watchdog."""
GAP_SECONDS = (5e-6, 1e-5, 2e-5, 3e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 5e-2, 0.25, 1)
"""Upper bounds of a gap's buckets; a gap between two graphs should stay below 30 us."""


class Durations:
    """Counts durations by upper bound, in seconds. counts: of each bucket alone; the last has no bound."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total_s = 0.0

    def observe(self, seconds: float) -> None:
        """Counts one duration."""
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.total_s += seconds


@dataclass
class StepTimes:
    """Times of steps on the host's clock, in seconds.

    busy: of each step, from its launch, or from the end of the step before it, until it was read. gaps: between two
    steps in a row while there was work, in which none was launched; 0 where the next was launched before.
    """

    busy: Durations = field(default_factory=lambda: Durations(STEP_SECONDS))
    gaps: Durations = field(default_factory=lambda: Durations(GAP_SECONDS))
    num_steps: int = 0
    _read_at: float | None = None

    @property
    def busy_s(self) -> float:
        """Seconds in which a step was launched and not read."""
        return self.busy.total_s

    @property
    def gap_s(self) -> float:
        """Seconds in which none was, although there was work."""
        return self.gaps.total_s

    def add(self, begun_at: float, read_at: float) -> float:
        """Counts a step, launched and read at these times of the clock. Returns what it took, its gap among it."""
        self.num_steps += 1
        since = before = begun_at
        if self._read_at is not None:
            before = self._read_at
            since = max(begun_at, before)
            self.gaps.observe(since - before)
        self.busy.observe(read_at - since)
        self._read_at = read_at
        return read_at - before

    def pause(self) -> None:
        """Notes that there is no work: what follows is no gap."""
        self._read_at = None


@dataclass(frozen=True)
class Usage:
    """Something limited: how many are taken, and how many there are."""

    used: int = 0
    total: int = 0


@dataclass(eq=False)
class EngineCounts:
    """Since the engine started.

    num_preempted: times that a running request was sent back to wait. num_prefix_queried: prompt tokens looked up in
    the prefix cache; num_prefix_hit: of those, found there, so not computed again. num_prefix_hits: requests that found
    any. num_snapshots_taken, num_snapshots_evicted: of sequences, for later ones; num_blocks_evicted: whose keys were
    kept for later ones until somebody needed their memory. num_step_retries: steps that failed and were run again,
    request by request.
    """

    num_preempted: int = 0
    num_prefix_queried: int = 0
    num_prefix_hit: int = 0
    num_prefix_hits: int = 0
    num_snapshots_taken: int = 0
    num_snapshots_evicted: int = 0
    num_blocks_evicted: int = 0
    num_step_retries: int = 0


@dataclass(eq=False)
class DraftCounts:
    """Of steps with drafts since the engine started. num_guesses: the module's; num_right: of those, tokens that were
    drawn, each of which spares a step."""

    num_steps: int = 0
    num_guesses: int = 0
    num_right: int = 0

    def add(self, num_guesses: int, num_right: int) -> None:
        """Counts a step."""
        self.num_steps += 1
        self.num_guesses += num_guesses
        self.num_right += num_right


@dataclass(frozen=True)
class EngineLoad:
    """num_running, num_waiting: requests. cache_use: share of the caches' tokens that running requests fill.

    Since the engine started: num_compiled, kernels that steps had to compile, or to take from Triton's cache;
    num_captured, graphs that they had to capture. Both should stay 0. num_replays: steps that a graph ran. ``counts``
    and ``times`` have the rest, and go on counting, as ``drafts`` has those of steps with drafts.
    blocks, slots: of the caches; a block that only the prefix cache holds counts as free, for whoever needs it gets it.
    """

    num_running: int = 0
    num_waiting: int = 0
    cache_use: float = 0.0
    num_compiled: int = 0
    num_captured: int = 0
    num_replays: int = 0
    blocks: Usage = Usage()
    slots: Usage = Usage()
    counts: EngineCounts = field(default_factory=EngineCounts)
    times: StepTimes = field(default_factory=StepTimes)
    drafts: DraftCounts = field(default_factory=DraftCounts)
