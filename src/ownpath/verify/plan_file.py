"""Reads a plan written by ``ownpath plan --json``, to compare it with today's plan and with what ran."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ownpath.files import FileError, read_json_object

FACTS = ("device", "activations", "batch_invariant", "numerics", "caches")
"""Settings that a plan was made for."""
_OP_FIELDS = ("encoding", "runner", "kernel", "layout")
_COMPANION_FIELDS = ("runner", "kernel")


@dataclass(frozen=True)
class PlannedSlot:
    """One slot. Several products of a slot are joined by "+".

    encoding, layout: empty for a slot without a stored matrix. sizes: of each product, or those that a companion needs.
    """

    slot: str
    encoding: str
    runner: str
    kernel: str
    layout: str
    sizes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class PlanFile:
    """facts: name -> value, of ``FACTS``. slots: in the order of the file."""

    facts: dict[str, Any]
    slots: dict[str, PlannedSlot]

    @classmethod
    def of(cls, written: Mapping[str, Any]) -> "PlanFile":
        """Parses a written plan. Errors: ValueError naming the field that is missing or has no valid value."""
        facts = {name: _field(written, name, object, name) for name in FACTS}
        entries: dict[str, list[PlannedSlot]] = {}
        for kind, fields, sizes in (("ops", _OP_FIELDS, "shape"), ("companions", _COMPANION_FIELDS, "dims")):
            for idx, entry in enumerate(_field(written, kind, list, kind)):
                planned = _slot(entry, fields, sizes, f"{kind}[{idx}]")
                entries.setdefault(planned.slot, []).append(planned)
        return cls(facts, {slot: _join(found) for slot, found in entries.items()})


def read_plan_file(path: Path) -> dict[str, Any]:
    """Reads the output of ``ownpath plan --json``. Errors: ValueError naming the file."""
    try:
        written = read_json_object(path)
        PlanFile.of(written)
    except FileError:
        raise
    except ValueError as error:
        raise ValueError(f"{path}: not a plan: {error}") from None
    return written


def _slot(entry: Any, fields: tuple[str, ...], sizes: str, where: str) -> PlannedSlot:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is no object")
    found = {name: _field(entry, name, str, f"{where}.{name}") for name in ("slot", *fields)}
    dims = _field(entry, sizes, list, f"{where}.{sizes}")
    if not all(isinstance(size, int) for size in dims):
        raise ValueError(f"{where}.{sizes} are no sizes")
    blank = dict.fromkeys(_OP_FIELDS, "")
    return PlannedSlot(**(blank | found), sizes=(tuple(dims),))


def _field(entry: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    if name not in entry:
        raise ValueError(f"{where} is missing")
    if not isinstance(entry[name], kind):
        raise ValueError(f"{where} is {entry[name]!r:.60}")
    return entry[name]


def _join(found: list[PlannedSlot]) -> PlannedSlot:
    cells = {name: "+".join(dict.fromkeys(getattr(part, name) for part in found)) for name in _OP_FIELDS}
    return PlannedSlot(found[0].slot, sizes=tuple(size for part in found for size in part.sizes), **cells)
