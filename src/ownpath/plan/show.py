"""The plan as people and programs read it."""

import re
from dataclasses import dataclass
from typing import Any

from ownpath.plan.plan import Plan, PlannedOp

_LAYER = re.compile(r"layers\.(\d+)\.(.*)")
_HEADINGS = ("module", "stored as", "format", "runner", "kernel", "layout")


@dataclass(frozen=True)
class Row:
    """One line of the table: the same decision for the same module of one or more layers."""

    module: str
    layers: tuple[int, ...]
    cells: tuple[str, ...]
    why: str

    @property
    def title(self) -> str:
        return f"layers.{_ranges(self.layers)}.{self.module}" if self.layers else self.module


def plan_rows(plan: Plan) -> list[Row]:
    """Rows in forward order; layers that decide alike share a row."""
    rows: dict[tuple[str, tuple[str, ...]], Row] = {}
    for op in plan.ops:
        match = _LAYER.fullmatch(op.label)
        layers, module = ((int(match[1]),), match[2]) if match else ((), op.label)
        cells = _cells(op)
        known = rows.get((module, cells))
        all_layers = known.layers + layers if known else layers
        rows[module, cells] = Row(module, all_layers, cells, op.choice.why)
    return list(rows.values())


def plan_text(plan: Plan) -> str:
    """A table of every module's format, runner, kernel and layout, then the reasons, params and ignored keys."""
    rows = plan_rows(plan)
    lines = _align([_HEADINGS, *((row.title, *row.cells) for row in rows)])
    reasons = {(row.cells[3], row.cells[1]): row.why for row in rows}
    lines += ["", f"device: {plan.caps.name}", "why:"]
    lines += [f"  {kernel} on {stored}: {why}" for (kernel, stored), why in reasons.items()]
    lines.append(f"used as stored: {len(plan.params)} tensors (embedding, norms, hyper-connections, sinks, tables)")
    for reason in dict.fromkeys(plan.ignored.values()):
        num_keys = sum(value == reason for value in plan.ignored.values())
        lines.append(f"not read: {num_keys} tensors ({reason})")
    return "\n".join(lines)


def plan_dict(plan: Plan) -> dict[str, Any]:
    """The plan for programs: one entry per op, nothing folded."""
    ops = []
    for op in plan.ops:
        cells = dict(zip(("encoding", "format", "runner", "kernel", "layout"), _cells(op), strict=True))
        modules = [module.name for module in op.spec.modules]
        entry = {
            "slot": op.spec.slot,
            "kind": str(op.spec.kind),
            "shape": list(op.spec.shape),
            "modules": modules,
        }
        ops.append(entry | cells | {"why": op.choice.why})
    params = [{"key": param.key, "shape": list(param.shape)} for param in plan.params]
    return {"device": plan.caps.name, "ops": ops, "params": params, "ignored": dict(plan.ignored)}


def _cells(op: PlannedOp) -> tuple[str, ...]:
    kernel = op.choice.kernel
    return (op.encoding.name, str(op.encoding.format), kernel.runner, kernel.name, kernel.layout)


def _align(table: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]


def _ranges(values: tuple[int, ...]) -> str:
    """Compact layer list: (0, 1, 2, 5) -> "{0-2,5}"; a single layer stays bare."""
    if len(values) == 1:
        return str(values[0])
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return "{" + ",".join(f"{a}-{b}" if a != b else f"{a}" for a, b in runs) + "}"
