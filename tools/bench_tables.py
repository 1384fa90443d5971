"""Prints the measured tables of the docs as Markdown, from the JSON lines that ``ownpath bench --out`` writes.

    python tools/bench_tables.py bench/results/moe_v4_flash_h200.jsonl [...] [--plot FILE.png]

One table for each benchmark and run; ours against every contender, the floor, and the ratio to the best peer. Lines of
other tools are counted, not shown. ``--plot``: the newest row of each case and contender, a panel for each shape.
"""

import argparse
import json
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from ownpath.bench.plot import plot_rows
from ownpath.bench.row import Case, Row, Timing, geometric_mean

OURS = "ownpath"
"""The kernel that a plan chooses; others of ours stand in its table by their names."""
Line = dict[str, Any]
NEEDED = {"bench", "shape", "tokens", "contender", "is_peer", "status", "us", "floor_us", "versions", "command"}
"""Keys of every line that ``ownpath bench`` writes."""


def read(paths: Iterable[Path]) -> tuple[list[Line], int]:
    """Returns every row of the files, in order, and the number of other tools' lines.

    Errors: ValueError naming a file without rows.
    """
    rows: list[Line] = []
    others = 0
    for path in paths:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        found = [line for line in lines if line.keys() >= NEEDED]
        if not found:
            raise ValueError(f"{path} holds no rows of `ownpath bench`")
        rows += found
        others += len(lines) - len(found)
    return rows, others


def table(rows: list[Line]) -> str:
    """Returns one run's table, with its provenance above and the ratios' geometric mean below."""
    first = rows[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    lines = [f"{first['device']}, {versions}, commit {first['commit']}, {first['date']}: `{first['command']}`", ""]
    lines.append("| shape | tokens | floor | " + " | ".join(contenders) + " | best peer / ours | of the floor |")
    lines.append("|---|--:|--:|" + "--:|" * (len(contenders) + 2))
    ratios = []
    for (shape, tokens), group in groupby(rows_by_case(rows), key=lambda row: (row["shape"], row["tokens"])):
        found = {row["contender"]: row for row in group}
        ours = best([found[OURS]] if OURS in found else found.values(), is_peer=False)
        peer = best(found.values(), is_peer=True)
        ratio = None if ours is None or peer is None else peer / ours
        ratios += [] if ratio is None else [ratio]
        floor = next(iter(found.values()))["floor_us"]
        cells = [shape, f"{tokens}", "-" if floor is None else f"{floor:.1f}"]
        cells += [time(found.get(name)) for name in contenders]
        cells += ["-" if ratio is None else f"{ratio:.2f}" + (" lost" if ratio < 1 else "")]
        cells += ["-" if floor is None or ours is None else f"{floor / ours:.0%}"]
        lines.append("| " + " | ".join(cells) + " |")
    mean = geometric_mean(ratios)
    if mean is not None:
        lines += ["", f"Geometric mean {mean:.2f}, smallest {min(ratios):.2f}, {sum(r < 1 for r in ratios)} lost."]
    return "\n".join(lines)


def best(rows: Iterable[Line], *, is_peer: bool) -> float | None:
    """Returns the shortest time of a right answer, of ours or of peers."""
    times = [row["us"] for row in rows if row["is_peer"] is is_peer and row["status"] == "ok" and row["us"] is not None]
    return min(times, default=None)


def rows_by_case(rows: list[Line]) -> list[Line]:
    """Groups rows by case, cases in order of first appearance."""
    order = {key: idx for idx, key in enumerate(dict.fromkeys((row["shape"], row["tokens"]) for row in rows))}
    return sorted(rows, key=lambda row: order[row["shape"], row["tokens"]])


def time(row: Line | None) -> str:
    """Returns a time, or the reason why there is none."""
    if row is None:
        return "-"
    return row["status"] if row["us"] is None else f"{row['us']:.1f}" + ("" if row["status"] == "ok" else " (wrong)")


def newest(rows: list[Line]) -> list[Row]:
    """Returns the last row of each case and contender that has a time, by rising numbers of tokens.

    Where some shapes have several contenders, those with one are left out: they compare nothing.
    """
    found = {(row["shape"], row["contender"], row["tokens"]): row for row in rows if row["us"] is not None}
    names: dict[str, set[str]] = {}
    for shape, contender, _ in found:
        names.setdefault(shape, set()).add(contender)
    most = max(map(len, names.values()), default=1)
    kept = [row for row in found.values() if most == 1 or len(names[row["shape"]]) > 1]
    return [measured(row) for row in sorted(kept, key=lambda row: row["tokens"])]


def measured(line: Line) -> Row:
    """Returns the row of which a line was written, as far as a plot needs it."""
    case = Case(line["bench"], line["shape"], {}, line["tokens"], 0, 0, line["floor_us"])
    us = line["us"]
    return Row(case, line["contender"], line["is_peer"], line["status"], timing=Timing(us, us, us, 1, 1))


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a PNG")
    args = parser.parse_args()
    rows, others = read(args.files)
    for _, group in groupby(rows, key=lambda row: (row["bench"], row["command"], row["commit"])):
        print(table(list(group)), end="\n\n")
    if others:
        print(f"{others} lines of other tools are not shown.")
    if args.plot is not None:
        names = ", ".join(dict.fromkeys(f"bench {row['bench']} on {row['device']}" for row in rows))
        plot_rows(newest(rows), names, args.plot)


if __name__ == "__main__":
    main()
