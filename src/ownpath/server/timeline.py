"""The times of one answer, for metrics and traces. All are ``time.monotonic``."""

from dataclasses import dataclass


@dataclass
class Timeline:
    """Points in time of an answer; ``None``: not reached.

    arrived: its prompt was ready for the engine. begun: the engine ran its first step. first_token, last_token: told by
    the engine. ended: nothing more is told to the client. reason: of the end, as in the metrics.
    """

    arrived: float
    begun: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    ended: float | None = None
    num_tokens: int = 0
    reason: str | None = None

    def phases(self) -> dict[str, tuple[float, float]]:
        """Returns what the answer went through: queue, prefill, decode, each with its beginning and its end.

        A phase that an end cut off ends there; one that was not reached is left out.
        """
        ended = self.arrived if self.ended is None else self.ended
        points = {"queue": self.arrived, "prefill": self.begun, "decode": self.first_token}
        reached = [(name, begin) for name, begin in points.items() if begin is not None]
        last = ended if self.last_token is None else self.last_token
        ends = [*(begin for _, begin in reached[1:]), last if self.first_token is not None else ended]
        return {name: (begin, max(begin, end)) for (name, begin), end in zip(reached, ends, strict=True)}
