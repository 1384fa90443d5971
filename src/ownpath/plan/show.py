"""Shows a plan: as a page for people, as JSON values for programs."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from rich.console import RenderableType

from ownpath.checkpoint.drafts import Draft, DraftKind
from ownpath.official import ALWAYS_OFFICIAL, MEANING, Step, numerics_name
from ownpath.ops import OpKind
from ownpath.plan.caches import PlannedCache
from ownpath.plan.ops import PlannedCompanion, PlannedOp
from ownpath.plan.plan import Plan
from ownpath.terminal.page import Listing, fact, line
from ownpath.terminal.text import counted

_LAYER = re.compile(r"(layers|mtp)\.(\d+)\.(.*)")
_HEADINGS = ("module", "stored as", "format", "runner", "kernel", "layout")
_COMPANION_HEADINGS = ("between them", "runner", "kernel")
_CACHE_HEADINGS = ("in the caches", "format", "stored as", "bytes a key", "why")


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


def _fused_rows(plan: Plan) -> list[PlanRow]:
    """Returns a row for each product of several modules; its cell names them, within their layer."""
    fused = [op for op in plan.ops if len(op.spec.modules) > 1 and op.spec.kind is OpKind.LINEAR]
    return _fold((op.label, (", ".join(_in_layer(module.name) for module in op.spec.modules),), "") for op in fused)


def _in_layer(name: str) -> str:
    match = _LAYER.fullmatch(name)
    return match[3] if match else name


def _fold(decisions: Iterable[tuple[str, tuple[str, ...], str]]) -> list[PlanRow]:
    rows: dict[tuple[str, str, tuple[str, ...]], PlanRow] = {}
    for label, cells, why in decisions:
        match = _LAYER.fullmatch(label)
        stack, layers, module = (match[1], (int(match[2]),), match[3]) if match else ("", (), label)
        known = rows.get((stack, module, cells))
        all_layers = known.layers + layers if known else layers
        rows[stack, module, cells] = PlanRow(module, all_layers, cells, why, stack)
    return list(rows.values())


def plan_page(plan: Plan, lossless_casts: Iterable[str] | None = None) -> list[RenderableType]:
    """Returns a table of each module's format, runner, kernel and layout, then the reasons, params and ignored keys.

    lossless_casts: slots that were cast from MXFP4 without loss; None where nobody asked.
    """
    rows, companions = plan_rows(plan), companion_rows(plan)
    parts: list[RenderableType] = [
        Listing(_HEADINGS, [(row.title, *row.cells) for row in rows]),
        line(""),
        line("one product of several modules:", style="bold"),
        *(fact(row.title, row.cells[0], indent=2) for row in _fused_rows(plan)),
        line(""),
        Listing(_COMPANION_HEADINGS, [(row.title, *row.cells) for row in companions]),
        line(""),
        Listing(_CACHE_HEADINGS, [_cache_cells(cache) for cache in plan.caches]),
        line(""),
        *_setting_parts(plan),
        line("why:", style="bold"),
    ]
    reasons = {f"{row.cells[3]} on {row.cells[1]}": row.why for row in rows}
    reasons |= {row.cells[1]: row.why for row in companions}
    parts += [fact(kernel, why, indent=2) for kernel, why in reasons.items()]
    parts += _passed_over_parts(plan)
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in Counter(plan.stored_dtypes.values()).items())
    what = "embedding, norms, hyper-connections, sinks, tables"
    parts.append(fact("used as stored", f"{counted(len(plan.params), 'tensor')} ({what}): {dtypes}"))
    parts.append(fact("draft", _draft_line(plan.draft)))
    for reason, count in Counter(plan.ignored.values()).items():
        parts.append(fact("not read", f"{counted(count, 'tensor')} ({reason})"))
    if plan.unread_inputs:
        scales = counted(len(plan.unread_inputs), "scale of inputs", "scales of inputs")
        parts.append(fact("not read", f"{scales} (no planned kernel quantises those inputs)"))
    parts += [fact("note", told) for told in plan.notes]
    if lossless_casts is not None:
        parts.append(fact("cast from MXFP4 without loss", ", ".join(lossless_casts) or "none"))
    return [*parts, *(line("warning", f": {told}; the tensors are believed") for told in plan.contradictions)]


def _setting_parts(plan: Plan) -> list[RenderableType]:
    demands = plan.demands.activations
    demands += ", every row's bits independent of the others (batch-invariant)" * plan.demands.is_batch_invariant
    parts = [fact("device", plan.caps.name), fact("activations", demands)]
    parts.append(fact("decode steps", _decode_line(plan)))
    parts.append(fact("prompts", _prompt_line(plan)))
    parts.append(fact("numerics", numerics_name(plan.demands.official)))
    chosen = {step: "official" if is_official(plan, step) else "plain" for step in Step}
    return [*parts, *(fact(step, f"{name} ({MEANING[step]})", indent=2) for step, name in chosen.items())]


def _passed_over_parts(plan: Plan) -> list[RenderableType]:
    """Lists better kernels that cannot run here, those with the same reason together."""
    kernels: dict[str, list[str]] = {}
    for lack in dict.fromkeys(lack for op in plan.decided for lack in op.choice.passed_over):
        kernel, _, reason = lack.partition(" ")
        kernels.setdefault(reason, []).append(kernel)
    told = [fact(reason, ", ".join(names), indent=2) for reason, names in kernels.items()]
    return [line("passed over:", style="bold"), *told] if told else []


def _decode_line(plan: Plan) -> str:
    return f"on attn.core, as prompts: {plan.no_decode}" if plan.no_decode else "on kernels of their own, attn.decode"


def _prompt_line(plan: Plan) -> str:
    return f"on attn.core: {plan.no_chunks}" if plan.no_chunks else "on kernels of their own, attn.chunk"


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
            "local_shape": list(op.local_shape),
            "modules": modules,
        }
        ops.append(entry | cells | {"why": op.choice.why, "passed_over": list(op.choice.passed_over)})
    params = [
        {"key": param.key, "shape": list(param.shape), "stored": plan.stored_dtypes[param.key]} for param in plan.params
    ]
    plan_level = {
        "device": plan.caps.name,
        "parallel": asdict(plan.parallel),
        "activations": plan.demands.activations,
        "batch_invariant": plan.demands.is_batch_invariant,
        "numerics": {step: "official" if is_official(plan, step) else "plain" for step in Step},
        "caches": [asdict(cache) for cache in plan.caches],
        "decode_steps": _decode_line(plan),
        "prompts": _prompt_line(plan),
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


def _cache_cells(cache: PlannedCache) -> tuple[str, ...]:
    return cache.keys, str(cache.format), cache.stored, str(cache.key_bytes), cache.why


def _companion_cells(op: PlannedCompanion) -> tuple[str, str]:
    return op.choice.kernel.runner, op.choice.kernel.name


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
