"""Steps that are launched and not read, and the time that steps take."""

from collections.abc import Sequence
from dataclasses import dataclass

from ownpath.cache.pools import SequenceCache
from ownpath.engine.decoder import StepBegun
from ownpath.engine.request import Request
from ownpath.engine.scheduler import ScheduledChunk


@dataclass(frozen=True)
class Flight:
    """A launched decode step. caches: those of its rows when it was launched. asks: rows whose reports need more than
    the sampler's results."""

    chunks: Sequence[ScheduledChunk]
    caches: Sequence[SequenceCache]
    asks: Sequence[bool]
    begun: StepBegun
    begun_at: float

    def rows(self) -> dict[Request, int]:
        """Returns the rows of the requests that are still where this step leaves them."""
        pairs = zip(self.chunks, self.caches, strict=True)
        return {chunk.request: row for row, (chunk, cache) in enumerate(pairs) if chunk.request.cache is cache}

    def release_left(self, others: "Sequence[Flight]") -> None:
        """Gives back the caches that requests have left since, except those in others' rows."""
        for chunk, cache in zip(self.chunks, self.caches, strict=True):
            if chunk.request.cache is not cache and not any(cache in other.caches for other in others):
                cache.release()


@dataclass
class StepTimes:
    """Seconds since the start, on the host's clock. num_steps: steps read. busy_s: a step was launched and not read.
    gap_s: none was, between two steps, although there was work."""

    num_steps: int = 0
    busy_s: float = 0.0
    gap_s: float = 0.0
    _read_at: float | None = None

    def add(self, begun_at: float, read_at: float) -> None:
        """Counts a step, launched and read at these times of the clock."""
        self.num_steps += 1
        since = begun_at if self._read_at is None else self._read_at
        self.gap_s += max(begun_at - since, 0.0)
        self.busy_s += read_at - max(begun_at, since)
        self._read_at = read_at

    def pause(self) -> None:
        """Notes that there is no work: what follows is no gap."""
        self._read_at = None
