"""Turns compared values of a run into findings: each module that is off, with the steps in which it is off."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from fractions import Fraction

from ownpath.finding import Finding, Verdict
from ownpath.integrations.vllm.proof.compare import Compared
from ownpath.integrations.vllm.proof.device import PlannedStep
from ownpath.integrations.vllm.proof.seen import EngineRun, StepRun
from ownpath.terminal.text import counted, listed
from ownpath.verify.layers.measure import ROW_FACTOR, Measurement

_WITHIN = f"an error of 1 budget over all rows and of {ROW_FACTOR:g} budgets in a single one, and finite values"
_HYPER = "the hyper-connection: the same streams through another implementation of it (docs/vllm-proof.md)"
_PRODUCT = "this module's method, or its weights: fused halves, scales and shards as this method takes them"
_PLACES = {
    "hc_attn.h": _HYPER,
    "hc_ffn.x": _HYPER,
    "hc_ffn.h": _HYPER,
    "out": _HYPER,
    "hc_head": _HYPER,
    "attn.q": "the norm of query heads, and their rotation: theta of this kind of layer, YaRN",
    "attn.core": "the attention: what its cache holds, window, sink, compressed entries, slots of other sequences",
    "attn.wo_a": "the rotation back, or the product in groups: BF16, or FP8 with its scales",
    "attn.wo_b.sum": "the sum over ranks: what each adds is right, or named above",
    "ffn.sum": "the sum of routed and shared experts, over ranks where there are several",
    "ffn.experts": "the experts: scales, order of gate and up, the clamp at swiglu_limit, which experts this rank has",
    "ffn.router.weights": "weights from scores without the bias, their sum, routed_scaling_factor",
    "ffn.shared_experts.swiglu": "the clamp at swiglu_limit, the order of gate and up",
}
"""Places to look at, by value."""
_DEVICE = "a fallback inside a kernel, or a graph that was captured before our methods were there"


def judge_values(where: str, compared: Sequence[Compared], num_ranks: int = 1) -> Iterator[Finding]:
    """VE01: yields a failure for every value of a layer (or of the ends) that is off in some step, with the ranks to
    blame, or one pass."""
    by_slot: dict[str, list[Compared]] = {}
    for one in compared:
        by_slot.setdefault(one.measured.slot, []).append(one)
    bad = {slot: found for slot, found in by_slot.items() if not all(one.measured.is_within for one in found)}
    for slot, found in bad.items():
        yield _off(slot if where == "ends" else f"{where}.{slot}", found, num_ranks)
    if compared and not bad:
        worst = max(compared, key=lambda one: one.measured.excess)
        steps = counted(len({one.step.name for one in compared}), "step")
        nearest = f"nearest to its budget {worst.measured.slot} in a {worst.step.name}: {numbers(worst.measured)}"
        everywhere = f" on each of {num_ranks} ranks" * (num_ranks > 1)
        message = f"{counted(len(by_slot), 'value')} in {steps}{everywhere}; {nearest}"
        yield Finding(
            "VE01", where, Verdict.PASS, message, worst.measured.excess, _WITHIN, kernel=worst.measured.kernel
        )


def _off(where: str, found: Sequence[Compared], num_ranks: int) -> Finding:
    off = [one for one in found if not one.measured.is_within]
    ranks = {one.step.rank for one in off}
    right = [one.step for one in found if one.measured.is_within and one.step.rank in ranks]
    worst = max(off, key=lambda one: one.measured.excess)
    only = f"right in {steps_text(right)}" if right else "right in no step"
    places = f"{on_ranks(ranks, num_ranks)}off in {steps_text([one.step for one in off])}"
    message = f"{places}; {only}; worst: {numbers(worst.measured)}"
    remedy = _PLACES.get(worst.measured.slot, _PRODUCT)
    excess, kernel = worst.measured.excess, worst.measured.kernel
    return Finding("VE01", where, Verdict.FAIL, message, excess, _WITHIN, remedy, kernel)


def on_ranks(ranks: Collection[int], num_ranks: int) -> str:
    """Formats the ranks to blame: ``on rank 1 of 2: ``; nothing where there is one rank."""
    if num_ranks == 1:
        return ""
    told = listed(list(map(str, sorted(ranks))))
    return f"on rank{'s' * (len(ranks) > 1)} {told} of {num_ranks}: "


def numbers(measured: Measurement) -> str:
    """Formats the numbers that people look at first."""
    bad = f", {measured.nonfinite_share:.1%} not finite" if measured.nonfinite_share else ""
    empty = ", all zero" if measured.zero_share == 1 else ""
    rows = f"relative error {measured.rel_l2:.1e}, worst row {measured.worst_row:.1e}, budget {measured.budget:.1e}"
    return f"{rows}, largest {measured.amax:.3g} where {measured.reference_amax:.3g} is right{bad}{empty}"


def steps_text(steps: Sequence[StepRun]) -> str:
    """Formats steps by kind: ``prefill of 1, 2 and 5 rows, decode of 1 row (eager)``."""
    told = []
    for how in dict.fromkeys(step.how for step in steps):
        kinds: dict[str, list[int]] = {}
        for step in steps:
            rows = kinds.setdefault(step.planned.kind, []) if step.how == how else []
            if step.num_rows not in rows:  # as another rank's
                rows.append(step.num_rows)
        parts = (f"{kind} of {listed(list(map(str, rows)))} row{'s' * (rows != [1])}" for kind, rows in kinds.items())
        told.append(f"{', '.join(parts)} ({how})")
    return "; ".join(told)


def judge_choices(
    where: str, counts: Sequence[tuple[StepRun, Mapping[str, int]]], num_ranks: int = 1
) -> Iterator[Finding]:
    """VE02: yields a finding for each kind of choice that a layer makes."""
    for what in dict.fromkeys(what for _, found in counts for what in found):
        wrong = [(step, found[what]) for step, found in counts if found.get(what)]
        places = {"experts": f"{where}.ffn.router", "compressed entries": f"{where}.attn.indexer"}
        message = f"every row has the {what} that its scores say"
        if wrong:
            rows = sum(count for _, count in wrong)
            ranks = on_ranks({step.rank for step, _ in wrong}, num_ranks)
            message = f"{ranks}{counted(rows, 'row')} with other {what}: {steps_text([step for step, _ in wrong])}"
        number = float(sum(count for _, count in wrong))
        remedy = "the choice itself: bias, ties to the lower id, the table of a hash layer, which entries are complete"
        yield Finding.judged("VE02", places[what], not wrong, message, number, "no row, near ties aside", remedy)


def judge_walk(run: EngineRun) -> Iterator[Finding]:
    """VE03: yields what multiplies in every worker, and every module that does not run as it was planned."""
    for rank in run.ranks:
        where, planned = f"rank {rank['rank']}", 0
        for path, found in rank["modules"].items():
            if "slot" not in found:
                continue
            planned += 1
            is_planned = found["planned"] is not None and found["planned"][1] == found["kernel"]
            if not is_planned or found.get("parameters"):
                message = f"{where}: {path} runs {found['kernel']}, the plan says {found['planned']}"
                if found.get("parameters"):
                    message = f"{where}: {path} has weights that another kernel could multiply: {found['parameters']}"
                yield Finding("VE03", found["slot"], Verdict.FAIL, message, kernel=found["kernel"])
        methods: dict[str, int] = {}
        for found in rank["modules"].values():
            if "parameters" in found:
                methods[found["method"]] = methods.get(found["method"], 0) + 1
        told = ", ".join(f"{count} x {method}" for method, count in methods.items())
        message = f"{planned} modules run our kernels as planned; all that hold or multiply weights: {told}"
        yield Finding("VE03", where, Verdict.PASS, message, float(planned))
    yield from _judge_experts(run)


def _judge_experts(run: EngineRun) -> Iterator[Finding]:
    """VE03: yields every layer of which some expert is on no rank, or on more than one, its width counted."""
    parts: dict[str, dict[int, list[int]]] = {}
    for rank in run.ranks:
        for path, found in rank["modules"].items():
            for expert in found.get("experts", ()):
                parts.setdefault(path, {}).setdefault(expert, []).append(found["width"][1])
    num_experts = max((1 + max(of_path) for of_path in parts.values()), default=0)
    for path, of_path in parts.items():
        wrong = [e for e in range(num_experts) if sum(Fraction(1, size) for size in of_path.get(e, ())) != 1]
        if wrong:
            message = f"{path}: experts {listed(list(map(str, wrong)))} are not on the ranks once each"
            yield Finding("VE03", path, Verdict.FAIL, message, float(len(wrong)))


def judge_device(run: EngineRun) -> Iterator[Finding]:
    """VE05: yields how the device's own record of each step differs from the plan; nothing where none was taken."""
    steps = [step for steps in run.by_rank for step in steps if step.is_judged and step.kernels is not None]
    if not steps or not run.ranks:
        return
    seen = [step for step in steps if step.kernels]
    if not seen:
        yield Finding("VE05", "device", Verdict.SKIPPED, "the profiler saw no kernel; CUPTI may be missing or in use")
        return
    planned, faults = [PlannedStep.of(rank) for rank in run.ranks], dict[str, list[StepRun]]()
    for step in seen:
        for fault in planned[step.rank].faults(step.kernels or {}):
            faults.setdefault(f"{on_ranks({step.rank}, len(planned))}{fault}", []).append(step)
    for fault, found in faults.items():
        yield Finding("VE05", "device", Verdict.FAIL, f"{fault}: {steps_text(found)}", remedy=_DEVICE)
    replayed = [step for step in seen if not step.from_python]
    told = f"{counted(len(seen), 'step')} recorded, of which graphs replayed {steps_text(replayed) or 'none'}"
    if not replayed:
        yield Finding("VE05", "device", Verdict.SKIPPED, f"{told}: nothing is known of a replay")
    elif not faults:
        calls = sum(planned[0].kernels.values())
        message = f"{told}; {calls} calls of our kernels in each, and none of vLLM's in their place"
        yield Finding("VE05", "device", Verdict.PASS, message, 0, "the planned kernels, and no other in their place")


def judge_taps(run: EngineRun) -> Iterator[Finding]:
    """VE04: yields what could not be looked at, with why."""
    for refused in run.refused:
        yield Finding("VE04", "steps", Verdict.SKIPPED, refused)
    every = [step for steps in run.by_rank for step in steps]
    missed = {key: why for step in every for key, why in step.missed.items()}
    for key, why in missed.items():
        yield Finding("VE04", key, Verdict.WARN, f"this tap could not be captured: {why}")
    unwritten = sorted({key for step in every if step.is_judged for key in step.unwritten} - missed.keys())
    if unwritten:
        told = f"{counted(len(unwritten), 'tap')} filled nothing in some step: {listed(unwritten[:4])}"
        yield Finding("VE04", "taps", Verdict.SKIPPED, told)
    for rank in run.ranks[:1]:
        absent = [point for point in rank["absent"] if not point.endswith((".hc_post", ".forward_monolithic"))]
        if absent:
            yield Finding("VE04", "taps", Verdict.SKIPPED, f"this vLLM has no {listed(absent)}")
    steps = [step for step in run.steps if step.is_judged]
    if steps and not missed:
        yield Finding("VE04", "taps", Verdict.PASS, f"looked at {counted(len(steps), 'step')}: {steps_text(steps)}")
