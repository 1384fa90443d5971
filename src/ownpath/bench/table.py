"""The table of results as text: a line for each case, with a reason in place of a missing time."""

from collections.abc import Mapping, Sequence

from rich.console import RenderableType

from ownpath.bench.row import Comparison, Row, compare, geometric_mean
from ownpath.terminal.page import Listing, line
from ownpath.terminal.text import counted


def table_page(rows: Sequence[Row], title: str) -> list[RenderableType]:
    """Returns all rows, then those that do not count and why, then the geometric mean and the number of lost cases."""
    comparisons = compare(rows)
    contenders = list(dict.fromkeys(row.contender for row in rows))
    headings = ("shape", "tokens", "experts", "floor us", *contenders, "best peer", "peer/ours", "floor/ours")
    cells = [_cells(comparison, contenders) for comparison in comparisons]
    return [
        line(title, style="bold"),
        line("times in microseconds (us), relative L2 error in brackets"),
        Listing(headings, cells, num_lead=4, to_right=frozenset(range(len(headings)))),
        *map(line, [*_facts(rows), *_reasons(rows), *_verdict(comparisons)]),
    ]


def _cells(comparison: Comparison, contenders: Sequence[str]) -> tuple[str, ...]:
    case, ours, best = comparison.case, comparison.ours, comparison.best_peer
    of_floor = None if ours is None or ours.timing is None or case.floor_us is None else case.floor_us / ours.timing.us
    return (
        case.shape,
        str(case.num_tokens),
        "-" if case.distinct_experts is None else f"{case.distinct_experts:.0f}",
        "-" if case.floor_us is None else f"{case.floor_us:.1f}",
        *(_result(comparison.rows.get(name)) for name in contenders),
        "-" if best is None else best.contender,
        _ratio(comparison.ratio),
        "-" if of_floor is None else f"{of_floor:.0%}",
    )


def _result(row: Row | None) -> str:
    if row is None:
        return "not run"
    if row.timing is None:
        return row.status
    error = "" if row.rel_l2 is None else f" ({row.rel_l2:.1e})"
    return f"{row.timing.us:.1f}{error}" + ("" if row.status == "ok" else f" {row.status.upper()}")


def _ratio(ratio: float | None) -> str:
    if ratio is None:
        return "-"
    return f"{ratio:.2f}" + (" LOST" if ratio < 1 else "")


def _facts(rows: Sequence[Row]) -> list[str]:
    """Returns a line for each row with facts; of a list the least and the greatest."""

    def told(value: object) -> str:
        if isinstance(value, Mapping):
            return ", ".join(f"{key} {one}" for key, one in value.items())
        return f"{min(value)} to {max(value)}" if isinstance(value, list) else str(value)

    return [
        f"{row.contender}, {row.case.shape}, {row.case.num_tokens}: "
        + "; ".join(f"{key} {told(value)}" for key, value in row.facts.items())
        for row in rows
        if row.facts
    ]


def _reasons(rows: Sequence[Row]) -> list[str]:
    reasons = dict.fromkeys((row.contender, row.status, row.reason) for row in rows if row.status != "ok")
    return [f"{contender}: {status}: {reason}" for contender, status, reason in reasons]


def _verdict(comparisons: Sequence[Comparison]) -> list[str]:
    ratios = [comparison.ratio for comparison in comparisons if comparison.ratio is not None]
    mean = geometric_mean(ratios)
    if mean is None:
        return ["no case has both a time of ours and a peer's: nothing is compared"]
    lost = sum(ratio < 1 for ratio in ratios)
    return [
        f"best peer over ours: {mean:.2f}x in the geometric mean of {counted(len(ratios), 'case')}, "
        f"{min(ratios):.2f}x at least; lost: {lost}; without a comparison: {len(comparisons) - len(ratios)}"
    ]
