"""The table of results as text: a line for each case, with a reason in place of a missing time."""

from collections.abc import Sequence

from ownpath.bench.row import Comparison, Row, compare, geometric_mean


def table_text(rows: Sequence[Row], title: str) -> str:
    """Returns all rows, then those that do not count and why, then the geometric mean and the number of lost cases."""
    comparisons = compare(rows)
    contenders = list(dict.fromkeys(row.contender for row in rows))
    header = ["shape", "tokens", "experts", "floor us", *contenders, "best peer", "peer/ours", "floor/ours"]
    lines = [header, *(_cells(comparison, contenders) for comparison in comparisons)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = [title, "times in us, relative L2 error in brackets"]
    text += ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([*text, *_reasons(rows), *_verdict(comparisons)])


def _cells(comparison: Comparison, contenders: Sequence[str]) -> list[str]:
    case, ours, best = comparison.case, comparison.ours, comparison.best_peer
    of_floor = None if ours is None or ours.timing is None or case.floor_us is None else case.floor_us / ours.timing.us
    return [
        case.shape,
        str(case.num_tokens),
        "-" if case.distinct_experts is None else f"{case.distinct_experts:.0f}",
        "-" if case.floor_us is None else f"{case.floor_us:.1f}",
        *(_result(comparison.rows.get(name)) for name in contenders),
        "-" if best is None else best.contender,
        _ratio(comparison.ratio),
        "-" if of_floor is None else f"{of_floor:.0%}",
    ]


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
        f"best peer over ours: {mean:.2f}x in the geometric mean of {len(ratios)} cases, "
        f"{min(ratios):.2f}x at least; lost: {lost}; without a comparison: {len(comparisons) - len(ratios)}"
    ]
