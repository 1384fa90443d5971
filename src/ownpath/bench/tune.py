"""Runs candidate configurations of a kernel family and writes the table that its kernels choose from.

    ownpath bench --tune FAMILY

A family is a module ``ownpath.bench.tuners.FAMILY`` with a function ``family(device) -> Family``. Tuning happens
here and never while serving: kernels read ``src/ownpath/kernels/FAMILY/tuned/*.json``, and that is all.
"""

import importlib
import importlib.util
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

Candidate = Mapping[str, int | str | bool]
"""A candidate configuration: the family's knobs by name, as JSON values."""

RunCandidate = Callable[[str, Candidate], float]
"""(case, candidate) -> median microseconds. It checks the result first.

Errors: CandidateFailed for a candidate that does not compile, does not fit or computes a wrong result.
"""

WriteLine = Callable[[str], None]

_TUNERS = "ownpath.bench.tuners"


class CandidateFailed(ValueError):
    """Raised for a candidate that cannot be chosen for a case; the message says why."""


class Family(Protocol):
    """A kernel family that ``--tune`` can tune."""

    candidates: Mapping[str, Sequence[Candidate]]
    """Case (a key of the table, such as "m=64,n=4096,k=4096") -> candidates, the present choice first."""

    table: Path
    """Path of the table that the kernels read."""

    def run(self, case: str, config: Candidate) -> float:
        """See ``RunCandidate``."""


@dataclass(frozen=True)
class Tried:
    """One candidate's result in one case. us: NaN if it failed."""

    config: Candidate
    us: float
    reason: str = ""


def tune(
    family: str,
    candidates: Mapping[str, Sequence[Candidate]],
    run: RunCandidate,
    out: Path,
    provenance: Mapping[str, object],
    report: WriteLine = print,
) -> dict[str, Tried]:
    """Runs every candidate and writes the fastest for each case to ``out``; other cases of an earlier table are kept.

    An entry has the commit and date that it was measured at, the table those of the last run.
    A tie goes to the earlier candidate. Errors: CandidateFailed when no candidate of a case runs; nothing is written.
    """
    best = {}
    for case, configs in candidates.items():
        tried = [_try(case, config, run) for config in configs]
        for one in tried:
            report(f"{family} {case} {json.dumps(dict(one.config))}: " + (one.reason or f"{one.us:.2f} us"))
        best[case] = _fastest(family, case, tried)
    origin = {key: provenance[key] for key in ("commit", "date") if key in provenance}
    found = {case: {"config": dict(one.config), "us": round(one.us, 3), **origin} for case, one in best.items()}
    entries = _entries(out) | found
    table = {"family": family, "measured": dict(provenance), "entries": dict(sorted(entries.items()))}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return best


def chosen_cases(
    candidates: Mapping[str, Sequence[Candidate]], shapes: Sequence[str], tokens: Sequence[int] | None
) -> dict[str, Sequence[Candidate]]:
    """Returns the cases whose key has one of the shapes in it, as "rows=4096,cols=8192", and one of the token counts.

    None given: all. Errors: ValueError if none is left.
    """
    found = {
        case: configs
        for case, configs in candidates.items()
        if (not shapes or any(shape in case for shape in shapes))
        and (tokens is None or any(case.startswith(f"tokens={count},") for count in tokens))
    }
    if not found:
        first = next(iter(candidates))
        raise ValueError(f"--tune: no case has {' or '.join(shapes) or 'any shape'}, tokens {tokens}; one is {first}")
    return found


def load_family(name: str, device: str) -> Family:
    """Loads a family's tuner. Errors: ValueError for a family without one."""
    if not name.isidentifier() or not _has_tuner(name):
        raise ValueError(f"--tune: no kernel family {name!r} with candidates in {_TUNERS}")
    family: Family = importlib.import_module(f"{_TUNERS}.{name}").family(device)
    return family


def _has_tuner(name: str) -> bool:
    return importlib.util.find_spec(_TUNERS) is not None and importlib.util.find_spec(f"{_TUNERS}.{name}") is not None


def _try(case: str, config: Candidate, run: RunCandidate) -> Tried:
    try:
        return Tried(config, run(case, config))
    except CandidateFailed as failure:
        return Tried(config, math.nan, str(failure) or "failed")


def _fastest(family: str, case: str, tried: Sequence[Tried]) -> Tried:
    ran = [one for one in tried if not math.isnan(one.us)]
    if not ran:
        reasons = "; ".join(one.reason for one in tried)
        raise CandidateFailed(f"--tune {family}: no candidate for {case} runs: {reasons}")
    return min(ran, key=lambda one: one.us)


def _entries(path: Path) -> dict[str, object]:
    if not path.exists():
        return {}
    entries: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))["entries"]
    return entries
