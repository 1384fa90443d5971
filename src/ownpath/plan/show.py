"""Prints a plan: as text for people, as JSON values for programs."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from ownpath.checkpoint.drafts import Draft, DraftKind
from ownpath.official import ALWAYS_OFFICIAL, MEANING, Step, numerics_name
from ownpath.plan.plan import Plan, PlannedCompanion, PlannedOp

_LAYER = re.compile(r"(layers|mtp)\.(\d+)\.(.*)")
_HEADINGS = ("module", "stored as", "format", "runner", "kernel", "layout")
_COMPANION_HEADINGS = ("between them", "runner", "kernel")


@dataclass(frozen=True)
class PlanRow:
    """A line of the table: the same decision for the same module of one or more layers.

    stack: "layers" (the backbone) or "mtp".
    """

    module: str
    layers: tuple[int, ...]
    cells: tuple[str, ...]
    why: str
    stack: str = ""

    @property
    def title(self) -> str:
        return f"{self.stack}.{ranges(self.layers)}.{self.module}" if self.layers else self.module


def plan_rows(plan: Plan) -> list[PlanRow]:
    """Returns the products' rows in forward order; layers with the same decision share a row."""
    return _fold((op.label, _cells(op), op.choice.why) for op in plan.ops)


def companion_rows(plan: Plan) -> list[PlanRow]:
    """Returns the companions' rows, folded like the products'."""
    return _fold((op.spec.slot, _companion_cells(op), op.choice.why) for op in plan.companions)


def _fold(decisions: Iterable[tuple[str, tuple[str, ...], str]]) -> list[PlanRow]:
    rows: dict[tuple[str, str, tuple[str, ...]], PlanRow] = {}
    for label, cells, why in decisions:
        match = _LAYER.fullmatch(label)
        stack, layers, module = (match[1], (int(match[2]),), match[3]) if match else ("", (), label)
        known = rows.get((stack, module, cells))
        all_layers = known.layers + layers if known else layers
        rows[stack, module, cells] = PlanRow(module, all_layers, cells, why, stack)
    return list(rows.values())


def plan_text(plan: Plan) -> str:
    """Returns a table of each module's format, runner, kernel and layout, then the reasons, params and ignored keys."""
    rows, companions = plan_rows(plan), companion_rows(plan)
    lines = align([_HEADINGS, *((row.title, *row.cells) for row in rows)])
    lines += ["", *align([_COMPANION_HEADINGS, *((row.title, *row.cells) for row in companions)])]
    demands = f"activations: {plan.demands.activations}"
    demands += ", every row's bits independent of the others (batch-invariant)" * plan.demands.is_batch_invariant
    lines += ["", f"device: {plan.caps.name}", demands, f"numerics: {numerics_name(plan.demands.official)}"]
    lines += [f"  {step}: {'official' if is_official(plan, step) else 'plain'} ({MEANING[step]})" for step in Step]
    lines += ["why:"]
    reasons = {f"{row.cells[3]} on {row.cells[1]}": row.why for row in rows}
    reasons |= {row.cells[1]: row.why for row in companions}
    lines += [f"  {kernel}: {why}" for kernel, why in reasons.items()]
    passed_over = dict.fromkeys(lack for op in plan.decided for lack in op.choice.passed_over)
    lines += ["passed over:", *(f"  {lack}" for lack in passed_over)] if passed_over else []
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in Counter(plan.stored_dtypes.values()).items())
    what = "embedding, norms, hyper-connections, sinks, tables"
    lines.append(f"used as stored: {len(plan.params)} tensors ({what}): {dtypes}")
    lines.append(f"draft: {_draft_line(plan.draft)}")
    for reason in dict.fromkeys(plan.ignored.values()):
        num_keys = sum(value == reason for value in plan.ignored.values())
        lines.append(f"not read: {num_keys} tensors ({reason})")
    if plan.unread_inputs:
        lines.append(f"not read: {len(plan.unread_inputs)} scales of inputs (no planned kernel quantises those inputs)")
    lines += [f"note: {line}" for line in plan.notes]
    lines += [f"warning: {line}; the tensors are believed" for line in plan.contradictions]
    return "\n".join(lines)


def _draft_line(draft: Draft) -> str:
    if draft.num_modules:
        return f"{draft.kind}, planned: mtp.{ranges(tuple(range(draft.num_modules)))}"
    return "none in the checkpoint" if draft.kind is DraftKind.NONE else f"{draft.kind}, not planned"


def plan_dict(plan: Plan) -> dict[str, object]:
    """Returns the plan as JSON values: one entry per op, nothing folded."""
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
        ops.append(entry | cells | {"why": op.choice.why, "passed_over": list(op.choice.passed_over)})
    params = [
        {"key": param.key, "shape": list(param.shape), "stored": plan.stored_dtypes[param.key]} for param in plan.params
    ]
    plan_level = {
        "device": plan.caps.name,
        "activations": plan.demands.activations,
        "batch_invariant": plan.demands.is_batch_invariant,
        "numerics": {step: "official" if is_official(plan, step) else "plain" for step in Step},
    }
    return plan_level | {
        "ops": ops,
        "companions": [_companion_entry(op) for op in plan.companions],
        "params": params,
        "ignored": dict(plan.ignored),
        "num_unread_input_scales": len(plan.unread_inputs),
        "contradictions": list(plan.contradictions),
        "notes": list(plan.notes),
        "draft": {"kind": str(plan.draft.kind), "num_modules": plan.draft.num_modules},
    }


def is_official(plan: Plan, step: Step) -> bool:
    """Returns True if the plan computes a step as the published code does."""
    return step in plan.demands.official | ALWAYS_OFFICIAL


def _companion_entry(op: PlannedCompanion) -> dict[str, object]:
    runner, kernel = _companion_cells(op)
    entry: dict[str, object] = {"slot": op.spec.slot, "kind": str(op.spec.kind), "dims": list(op.spec.dims)}
    entry |= {"runner": runner, "kernel": kernel, "why": op.choice.why}
    return entry | {"passed_over": list(op.choice.passed_over)}


def _cells(op: PlannedOp) -> tuple[str, ...]:
    kernel = op.choice.kernel
    return (op.encoding.name, str(op.encoding.format), kernel.runner, kernel.name, kernel.layout)


def _companion_cells(op: PlannedCompanion) -> tuple[str, str]:
    return op.choice.kernel.runner, op.choice.kernel.name


def align(table: list[tuple[str, ...]]) -> list[str]:
    """Returns a table's lines, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]


def ranges(values: tuple[int, ...]) -> str:
    """Formats layers compactly: (0, 1, 2, 5) -> "{0-2,5}"; a single layer as its number."""
    if len(values) == 1:
        return str(values[0])
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return "{" + ",".join(f"{a}-{b}" if a != b else f"{a}" for a, b in runs) + "}"
