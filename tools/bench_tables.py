"""Prints the measured tables of the docs as Markdown, from the JSON lines that ``ownpath bench --out`` writes.

    python tools/bench_tables.py bench/results/moe_h200.jsonl [...]

One table for each benchmark and run; ours against every contender, the floor, and the ratio to the best peer.
"""

import argparse
import json
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from ownpath.bench.row import geometric_mean

OURS = "ownpath"
Line = dict[str, Any]


def read(paths: Iterable[Path]) -> list[Line]:
    """Returns every row of the files, in order. Errors: ValueError naming a file without rows."""
    rows: list[Line] = []
    for path in paths:
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not found:
            raise ValueError(f"{path} holds no rows")
        rows += found
    return rows


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
        ours = found[OURS]["us"]
        peers = [row["us"] for row in found.values() if row["is_peer"] and row["status"] == "ok"]
        ratio = min(peers) / ours if peers else None
        ratios += [ratio] if ratio is not None else []
        floor = next(iter(found.values()))["floor_us"]
        cells = [shape, f"{tokens}", f"{floor:.1f}", *(time(found.get(name)) for name in contenders)]
        cells += ["-" if ratio is None else f"{ratio:.2f}", f"{floor / ours:.0%}"]
        lines.append("| " + " | ".join(cells) + " |")
    mean = geometric_mean(ratios)
    if mean is not None:
        lines += ["", f"Geometric mean {mean:.2f}, smallest {min(ratios):.2f}, {sum(r < 1 for r in ratios)} lost."]
    return "\n".join(lines)


def rows_by_case(rows: list[Line]) -> list[Line]:
    """Groups rows by case, cases in order of first appearance."""
    order = {key: idx for idx, key in enumerate(dict.fromkeys((row["shape"], row["tokens"]) for row in rows))}
    return sorted(rows, key=lambda row: order[row["shape"], row["tokens"]])


def time(row: Line | None) -> str:
    """Returns a time, or the reason why there is none."""
    if row is None:
        return "-"
    return row["status"] if row["us"] is None else f"{row['us']:.1f}" + ("" if row["status"] == "ok" else " (wrong)")


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("files", nargs="+", type=Path)
    rows = read(parser.parse_args().files)
    for _, group in groupby(rows, key=lambda row: (row["bench"], row["command"], row["commit"])):
        print(table(list(group)), end="\n\n")


if __name__ == "__main__":
    main()
