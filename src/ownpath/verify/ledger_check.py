"""Compares the plan with what ran, slot by slot: an earlier ``ownpath plan --json``, and the calls of a prompt."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ownpath.finding import Finding, Verdict
from ownpath.ops import OpKind
from ownpath.plan.opspec import OpSpec
from ownpath.plan.show import plan_dict
from ownpath.trace import Record
from ownpath.trace.uses import Use
from ownpath.verify.fold import fold_layers
from ownpath.verify.launch_check import check_launches
from ownpath.verify.ledger_run import PartRun, run_parts
from ownpath.verify.plan_file import FACTS, PlanFile, PlannedSlot
from ownpath.verify.subject import Subject

Kinds = dict[str, tuple[OpKind, bool]]
"""Slot -> (its operation, whether its result is wide)."""
Faults = list[tuple[str, str]]
"""Pairs of (slot, what is wrong)."""
REMEDIES = {
    "LG01": "make the plan again (ownpath plan MODEL --json), with the device and the demands that are verified",
    "LG02": "a slot that never runs is a product or a step that the model leaves out: the model's code is at fault",
    "LG03": "something replaced the planned runner or kernel after the plan was made",
    "LG04": "the weights lie in another layout than the plan says",
    "LG05": "the engine's dtype is not the plan's: the same --device and --numerics for both",
}
_SIGNS = {
    OpKind.LINEAR: ("A", "A"),
    OpKind.GROUPED: ("A", "A"),
    OpKind.MOE: ("AIW", "A"),
    OpKind.HYPER: ("AAWWA", "AAWW"),
    OpKind.NORM: ("A", "A"),
    OpKind.ROUTER: ("AI", "IW"),
    OpKind.ROUTE: ("AI", "IW"),
    OpKind.SWIGLU: ("A", "A"),
    OpKind.ATTENTION: ("AA", "A"),
    OpKind.KEY_QUANTIZER: ("A", "A"),
    OpKind.INDEX_QUANTIZER: ("A", "A"),
    OpKind.STEP_ANGLES: ("I", ""),
    OpKind.ENTRIES: ("A", ""),
    OpKind.CHUNK_ENTRIES: ("A", "A"),
    OpKind.CHUNK_RINGS: ("A", ""),
    OpKind.INDEX_SCORES: ("A", "W"),
    OpKind.SELECT: ("W", "II"),
    OpKind.ATTEND: ("AWW", "A"),
    OpKind.ATTEND_CHUNK: ("AWW", "A"),
}
"""The dtypes of a call's first arguments and results, a letter each. A: the activations'; W: that, but at least
float32; I: ids."""


@dataclass(frozen=True)
class RanSlot:
    """A slot that the prompt called. kernel: read off the object that ran; several are joined by "+"."""

    slot: str
    kernel: str


def kinds_of(subject: Subject) -> Kinds:
    """Returns the slots that a run calls: those of the chosen layers and those of no layer."""
    chosen = tuple(f"layers.{layer_idx}." for layer_idx in subject.layer_ids)
    return {
        planned.spec.slot: (planned.spec.kind, isinstance(planned.spec, OpSpec) and planned.spec.is_wide)
        for planned in subject.plan.decided
        if planned.spec.slot.startswith(chosen) or not planned.spec.slot.startswith(("layers.", "mtp."))
        if planned.spec.slot not in subject.plan.idle_slots
    }


def check_ledger(
    subject: Subject,
    plan_json: Mapping[str, object],
    progress: Callable[[int, int, str], None] | None = None,
) -> Iterator[Finding | RanSlot]:
    """Compares a written plan with today's plan of the checkpoint, then with what a prompt runs; yields what ran last.

    plan_json: the output of ``ownpath plan --json``. Layers run one at a time, so that two are never in memory.
    Errors: ValueError naming the field where ``plan_json`` is no plan.
    """
    written = PlanFile.of(plan_json)
    today = PlanFile.of(plan_dict(subject.plan))
    yield from _judge("LG01", plan_faults(written, today), len(today.slots), "slots are planned as in the file")
    yield from compare(kinds_of(subject), written, list(run_parts(subject, progress)))
    num_drafts = subject.plan.draft.num_modules
    if num_drafts:
        reason = "a prompt does not run the draft's layer"
        yield Finding("LG02", f"mtp (modules: {num_drafts})", Verdict.SKIPPED, reason)


def compare(kinds: Kinds, written: PlanFile, parts: Sequence[PartRun]) -> Iterator[Finding | RanSlot]:
    """Yields every finding about what ran, then what ran. kinds: the slots that had to run."""
    for part in parts:
        if part.failure:
            remedy = "ownpath inspect MODEL says whether the checkpoint is at fault"
            yield Finding("LG02", part.where, Verdict.FAIL, f"did not run: {part.failure}", remedy=remedy)
    records = [record for part in parts for record in part.records]
    ran = {record.slot for record in records}
    missed = [] if any(part.failure for part in parts) else call_faults(kinds, written, ran)
    yield from _judge("LG02", missed, len(ran), "slots were called")
    yield from _judge("LG03", use_faults(written, records), len(ran), "slots ran the planned runner and kernel")
    with_layout = {record.slot for record in records if _layout_of(written, record)}
    yield from _judge("LG04", layout_faults(written, records), len(with_layout), "slots have the planned layout")
    faults = dtype_faults(kinds, str(written.facts["activations"]), records)
    yield from _judge("LG05", faults, len(records), "distinct calls have the demanded dtypes")
    yield from check_launches(written, parts)
    yield from dict.fromkeys(RanSlot(record.slot, record.use.kernel) for record in records)


def plan_faults(written: PlanFile, today: PlanFile) -> Faults:
    """Lists the differences between two plans."""
    faults = [
        (name, f"{written.facts[name]!r} in the file, {today.facts[name]!r} here")
        for name in FACTS
        if written.facts[name] != today.facts[name]
    ]
    faults += [(slot, "planned here, not in the file") for slot in today.slots if slot not in written.slots]
    for slot, planned in written.slots.items():
        if slot not in today.slots:
            faults.append((slot, "in the file, not planned here"))
        else:
            faults += [(slot, words) for words in _differences(planned, today.slots[slot])]
    return faults


def _differences(written: PlannedSlot, today: PlannedSlot) -> list[str]:
    return [
        f"{name} {was or 'none'} in the file, {now or 'none'} here"
        for name, was in vars(written).items()
        if was != (now := getattr(today, name))
    ]


def call_faults(kinds: Iterable[str], written: PlanFile, ran: set[str]) -> Faults:
    """Lists slots that had to run and did not."""
    planned = ((slot, written.slots.get(slot)) for slot in kinds if slot not in ran)
    return [(slot, f"never called{f'; planned {_describe(entry)}' if entry else ''}") for slot, entry in planned]


def use_faults(written: PlanFile, records: Iterable[Record]) -> Faults:
    """Lists calls of slots that are not planned, or on another runner or kernel."""
    faults = []
    for record in records:
        planned, ran = written.slots.get(record.slot), _describe(record.use)
        if planned is None:
            faults.append((record.slot, f"not in the plan, ran {ran}"))
        elif _describe(planned) != ran:
            faults.append((record.slot, f"planned {_describe(planned)}, ran {ran}"))
    return list(dict.fromkeys(faults))


def layout_faults(written: PlanFile, records: Iterable[Record]) -> Faults:
    """Lists calls on weights in another layout than planned."""
    faults = []
    for record in records:
        planned = _layout_of(written, record)
        possible = record.use.layout.replace("+", " or ").split(" or ")
        if not set(planned.split("+") if planned else ()) <= set(possible):
            faults.append((record.slot, f"planned {planned}, the kernel that ran reads {record.use.layout}"))
    return list(dict.fromkeys(faults))


def dtype_faults(kinds: Kinds, activations: str, records: Iterable[Record]) -> Faults:
    """Lists calls with other dtypes than a plan for these activations demands.

    Where a single slot makes results of another dtype, it is told of that slot, not of those that then read them.
    """
    faults: dict[str, list[tuple[str, str, str]]] = {"argument": [], "result": []}
    for record in records:
        if record.slot not in kinds:
            continue
        kind, is_wide = kinds[record.slot]
        arguments, results = _SIGNS[kind]
        for what, signs, tensors in (
            ("argument", arguments, record.arguments),
            ("result", "W" if is_wide else results, record.results),
        ):
            for idx, (sign, tensor) in enumerate(zip(signs, tensors, strict=False)):
                wanted, found = _dtypes(sign, activations), tensor.partition("[")[0]
                if found not in wanted:
                    faults[what].append((record.slot, found, f"{what} {idx} must be {' or '.join(wanted)}, is {found}"))
    is_single = len({slot for slot, _, _ in faults["result"]}) == 1
    made = {found for _, found, _ in faults["result"]} if is_single else set()
    told = faults["result"] + [fault for fault in faults["argument"] if fault[1] not in made]
    return list(dict.fromkeys((slot, words) for slot, _, words in told))


def _dtypes(sign: str, activations: str) -> tuple[str, ...]:
    if sign == "I":
        return ("int64", "int32")
    if sign == "A":
        return (activations,)
    wide = torch.promote_types(getattr(torch, activations), torch.float32)
    return (str(wide).removeprefix("torch."),)


def _layout_of(written: PlanFile, record: Record) -> str:
    planned = written.slots.get(record.slot)
    return planned.layout if planned is not None else ""


def _describe(planned: PlannedSlot | Use) -> str:
    """Names a runner and its kernel as findings do."""
    return f"{planned.runner} ({planned.kernel})"


def _judge(check: str, faults: Faults, num_seen: int, passes: str) -> Iterator[Finding]:
    """Yields a finding for every fault, or one that says how many slots were checked."""
    for where, message in fold_layers(faults):
        yield Finding(check, where, Verdict.FAIL, message, allowed="no difference", remedy=REMEDIES[check])
    if not faults:
        what = f"{num_seen} {passes}"
        yield Finding(check, "plan" if check == "LG01" else "ledger", Verdict.PASS, what, 0, "no difference")
