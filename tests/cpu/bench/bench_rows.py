"""Rows made by hand."""

from ownpath.bench.row import Case, Row, Status, Timing


def case(num_tokens: int, floor_us: float | None = 10.0) -> Case:
    dims = {"experts": 8, "hidden": 256, "inter": 128, "top_k": 2}
    return Case("moe", "tiny", dims, num_tokens, 2_000_000, 4_000_000, floor_us, 5.5)


def row(of: Case, contender: str, us: float | None, status: Status = "ok", reason: str = "") -> Row:
    timing = None if us is None else Timing(us, us - 1, us + 1, 4, 11)
    return Row(of, contender, contender != "ownpath", status, reason, timing, None if us is None else 2e-3)
