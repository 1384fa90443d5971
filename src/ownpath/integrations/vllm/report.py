"""The lines about us in vLLM's log at start: each slot's kernel with its reason, and what stays vLLM's, with why."""

from collections.abc import Iterator

from ownpath.formats import BF16, FP32
from ownpath.integrations.vllm.intake import Intake
from ownpath.integrations.vllm.names import VARIABLE
from ownpath.plan.show import plan_rows


def report_lines(intake: Intake, is_first: bool) -> Iterator[str]:
    """Yields the lines for one rank. is_first: the plan too, which all ranks share."""
    taken = intake.taken
    counts = taken.counts
    yield (
        f"ownpath runs {len(taken.runners)} products of {intake.folder} on {taken.plan.caps.name}: took "
        f"{counts['taken']} tensors, left {counts['left']} to vLLM, read none of {counts['unread']} others "
        "(scales of inputs that no kernel here quantises, drafts, other ranks' experts)"
    )
    if not is_first:
        return
    for row in plan_rows(taken.plan):
        encoding, _, _, kernel, layout = row.cells
        yield f"ownpath: {row.title}: {encoding}, {kernel} ({layout}): {row.why}"
    for lack in dict.fromkeys(lack for op in taken.plan.ops for lack in op.choice.passed_over):
        yield f"ownpath: passed over: {lack}"
    yield from (f"vLLM: {told}" for told in _left(intake))
    yield from (f"ownpath: warning: {told}; the tensors are believed" for told in taken.plan.contradictions)


def _left(intake: Intake) -> Iterator[str]:
    """Yields what vLLM's own kernels compute, with the reason."""
    slots: dict[str, list[str]] = {}
    for slot, encodings in intake.stored.items():
        if slot not in intake.entered:
            plain = all(encoding.format in (BF16, FP32) for encoding in encodings)
            asked = slot.rpartition(".")[2] in ("gate", "wkv_wgate", "weights_proj", "head")
            reason = "vLLM multiplies it without asking a quantisation config" if asked else f"{VARIABLE} leaves it"
            name = slot.partition(".")[2].partition(".")[2] or slot
            slots.setdefault(f"{name} ({'unquantised' if plain else encodings[0].name}): {reason}", []).append(slot)
    for told, which in slots.items():
        yield f"{told} ({len(which)} of them)"
    yield "embedding, norms, router, attention, caches, SwiGLU of the shared expert: no weight of ours takes part"
    if intake.whole.draft.num_modules:
        yield "drafts: left to vLLM's own methods"
