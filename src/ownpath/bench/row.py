"""The result of a measurement. Every contender has a row in every case, also if it loses, fails or is not installed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Status = Literal["ok", "not installed", "not applicable", "failed", "wrong"]


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: median and spread over replays of a round of ``num_calls`` calls."""

    us: float
    us_p10: float
    us_p90: float
    num_calls: int
    num_replays: int


@dataclass(frozen=True)
class Case:
    """The computation that is measured. floor_us: None where no ceilings are known for the device.

    distinct_experts: mean over the round's routings; None for a dense product.
    """

    bench: str
    shape: str
    dims: Mapping[str, int]
    num_tokens: int
    num_bytes: int
    num_flop: int
    floor_us: float | None
    distinct_experts: float | None = None


@dataclass(frozen=True)
class Row:
    """One contender in one case. ``reason``: why there is no time, or why it does not count. facts: more that was
    measured; units are in the keys."""

    case: Case
    contender: str
    is_peer: bool
    status: Status
    reason: str = ""
    timing: Timing | None = None
    rel_l2: float | None = None
    facts: Mapping[str, object] = field(default_factory=dict)

    @property
    def counts(self) -> bool:
        """True if the time may be compared with others, which requires a right result."""
        return self.status == "ok" and self.timing is not None

    @property
    def tb_per_s(self) -> float | None:
        """The case's bytes over the time: the rate of a kernel that moves no byte twice."""
        return None if self.timing is None else self.case.num_bytes / self.timing.us / 1e6

    @property
    def tflop_per_s(self) -> float | None:
        return None if self.timing is None else self.case.num_flop / self.timing.us / 1e6


@dataclass(frozen=True)
class Comparison:
    """One case's rows, and our time beside the best peer's. ratio > 1: ours is faster."""

    case: Case
    rows: Mapping[str, Row]
    ours: Row | None
    best_peer: Row | None

    @property
    def ratio(self) -> float | None:
        if self.ours is None or self.best_peer is None:
            return None
        assert self.ours.timing is not None
        assert self.best_peer.timing is not None
        return self.best_peer.timing.us / self.ours.timing.us


def compare(rows: Sequence[Row]) -> list[Comparison]:
    """Returns a comparison for each case, in the order of the rows."""
    cases: list[Case] = []
    for row in rows:
        if row.case not in cases:
            cases.append(row.case)
    return [_comparison(case, [row for row in rows if row.case == case]) for case in cases]


def geometric_mean(values: Sequence[float]) -> float | None:
    """Returns the geometric mean, or None without values."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def _comparison(case: Case, rows: Sequence[Row]) -> Comparison:
    def fastest(is_peer: bool) -> Row | None:
        counted = [row for row in rows if row.is_peer is is_peer and row.counts]
        return min(counted, key=lambda row: row.timing.us if row.timing else math.inf, default=None)

    return Comparison(case, {row.contender: row for row in rows}, fastest(False), fastest(True))
