"""Stage ``load``: loads every chosen layer as the engine does, reads it back, and compares it with the file.

Buffers start as sentinels on every device. Of the routed experts, the chosen ones are read back; loading itself always
covers all of them.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ownpath.assembly import LoadedPart
from ownpath.checkpoint.errors import CheckpointError
from ownpath.finding import Finding, Verdict
from ownpath.kernels.dsl.cache import CompileError
from ownpath.kernels.nvfp4_sm100.prove import ProofError
from ownpath.verify.causes import likely_cause
from ownpath.verify.file_tensors import FileTensors
from ownpath.verify.layer import ENDS, add_runners, in_layer, in_no_layer, parts_of, read_weights, restrict_plan
from ownpath.verify.progress import StageProgress
from ownpath.verify.readback import TensorPair, alpha_pair, ops_with_runners, read_modules, weight_pairs
from ownpath.verify.resume import FinishedParts
from ownpath.verify.subject import Subject
from ownpath.weights.load import LoadedWeights
from ownpath.weights.operands import Destination, sentinel

ALPHA_EPS = 3 * 2.0**-24
"""Relative error allowed in the factor that a kernel receives: at most two float32 reciprocals and one product, half
an ulp each."""
_QUOTED = re.compile(r"'([^']+)'")
_LOAD_REMEDY = "run `ownpath inspect` on the folder; if it finds nothing, the loader is wrong: report this finding"
_KERNEL_REMEDY = (
    "the file is right and what the kernel reads is not: report this finding; do not serve with this kernel"
)


def load_stage(subject: Subject, progress: StageProgress, work: Path | None = None) -> Iterator[Finding]:
    """Runs L01 to L04 on each chosen layer, and on the slots outside all layers if every layer is chosen.

    work: a folder where findings are saved layer by layer, so that an interrupted run continues from there.
    """
    finished, parts = FinishedParts.of(work, "load", subject), parts_of(subject)
    for done, name in enumerate(parts):
        progress(done, len(parts), name)
        yield from finished.part(name, partial(_part_findings, subject, name))


def _part_findings(subject: Subject, name: str) -> Iterator[Finding]:
    """Loads one part and checks it; it is freed when this returns."""
    plan = restrict_plan(subject.plan, in_no_layer(subject.config) if name == ENDS else in_layer(name))
    try:
        weights = read_weights(subject, plan, sentinel)
    except CheckpointError as error:
        yield _load_failure(name, error)
        return
    unwritten = list(unwritten_slots(subject, weights))
    yield from unwritten
    if not unwritten:
        num_slots = sum(len(operand.destinations) for operand in weights.operands) + len(weights.params)
        yield Finding("L01", name, Verdict.PASS, f"{num_slots} tensors, each byte once", 0, "no sentinel left")
    try:
        part = add_runners(subject, plan, weights)
    except (ValueError, ProofError, CompileError) as error:
        message = f"not put into its kernel's layout: {error}"
        yield Finding("L02", _tensor_of(error) or name, Verdict.FAIL, message, remedy=_KERNEL_REMEDY)
        return
    yield from read_back(subject, part, name)


def _load_failure(name: str, error: Exception) -> Finding:
    return Finding("L01", _tensor_of(error) or name, Verdict.FAIL, f"not loaded: {error}", remedy=_LOAD_REMEDY)


def _tensor_of(error: Exception) -> str | None:
    """Returns the tensor that an error names: it comes first, in quotes."""
    match = _QUOTED.search(str(error))
    return match[1] if match else None


def unwritten_slots(subject: Subject, weights: LoadedWeights) -> Iterator[Finding]:
    """L01: looks for slots that still hold their sentinel, before any kernel repacks them.

    Floats start as NaN, bytes and integers as all ones. A code may be all ones too, so that a matrix of codes counts as
    unwritten when all of it is; single codes are compared with the file (L02).
    """
    slots = [slot for operand in weights.operands for slot in operand.destinations]
    slots += [Destination(key, param) for key, param in weights.params.items()]
    signs = torch.stack([_is_sentinel(slot) for slot in slots])
    for idx in torch.where(signs)[0].tolist():
        key = slots[idx].key
        message = f"tensor {subject.index[key]} left its slot unwritten, or wrote NaN"
        yield Finding("L01", key, Verdict.FAIL, message, 1, "no sentinel left", _LOAD_REMEDY)


def _is_sentinel(slot: Destination) -> torch.Tensor:
    target = slot.target
    if target.dtype in (torch.float32, torch.bfloat16):
        return target.amax().isnan()
    if target.dtype == torch.int64:
        return target.amin() < 0
    data = target.view(torch.uint8)
    return (data.amin() if target.dtype == torch.uint8 else data.amax()) == 0xFF


def read_back(subject: Subject, part: LoadedPart, name: str) -> Iterator[Finding]:
    """L02, L03, L04: compares what the kernels of a loaded part hold with the file."""
    expert_ids = () if name == ENDS else subject.expert_ids(int(name.partition(".")[2]))
    with FileTensors(subject.index, subject.device) as raw:
        compared = [(it.id, it.number()) for it in comparisons(part, expert_ids, raw)]
        # Fetched at once: each answer would stall a GPU.
        numbers = torch.stack([number for _, number in compared]).tolist()
        limits = [_LIMITS[id_] for id_, _ in compared]
        bad = {idx for idx, (number, limit) in enumerate(zip(numbers, limits, strict=True)) if not number <= limit}
        if bad:
            for idx, it in enumerate(comparisons(part, expert_ids, raw)):
                if idx in bad:
                    yield _difference(it, numbers[idx], raw)
    for id_, what in (("L02", "tensors equal the file's"), ("L03", "factors equal the file's")):
        own = [idx for idx, (other, _) in enumerate(compared) if other == id_]
        if not own:
            yield Finding(id_, name, Verdict.SKIPPED, "no operand here has a global scale")
        elif not bad & set(own):
            worst = max(numbers[idx] for idx in own)
            yield Finding(id_, name, Verdict.PASS, f"{len(own)} {what}", worst, _ALLOWED[id_])
    yield from _padding(part, name)


@dataclass(frozen=True)
class WeightComparison:
    """One pair, the check it belongs to, and the kernel that holds one side of it."""

    id: str
    kernel: str
    pair: TensorPair

    def number(self) -> torch.Tensor:
        """The difference of the two, float64 []: elements that differ, or (L03) the largest relative error."""
        pair = self.pair
        if self.id == "L02":
            return (pair.file != pair.kernel).count_nonzero().double()
        return (pair.kernel / pair.file - 1).abs().nan_to_num(nan=torch.inf).amax()


def comparisons(part: LoadedPart, expert_ids: tuple[int, ...], raw: FileTensors) -> Iterator[WeightComparison]:
    """Yields everything of a part that can be compared, one pair at a time; of routed experts, those in
    ``expert_ids``."""
    for key, tensor in part.weights.params.items():
        yield WeightComparison("L02", "", TensorPair(key, "values", key, raw(key), tensor))
    for slot, runner in part.runners.items():
        for op, own in ops_with_runners(part.plan.ops_of(slot), runner):
            kernel = op.choice.kernel.name
            for held in read_modules(op, own, expert_ids):
                yield from (WeightComparison("L02", kernel, pair) for pair in weight_pairs(op, held, raw))
                alpha = alpha_pair(op, held, raw)
                if alpha is not None:
                    yield WeightComparison("L03", kernel, alpha)


def _difference(it: WeightComparison, number: float, raw: FileTensors) -> Finding:
    pair = it.pair
    guess = likely_cause(pair, raw)
    is_bad = (pair.kernel / pair.file - 1).abs() > ALPHA_EPS if it.id == "L03" else pair.file != pair.kernel
    is_bad |= pair.kernel != pair.kernel
    place = is_bad.nonzero()[0].tolist()
    file, kernel = (side[tuple(place)].item() for side in (pair.file, pair.kernel))
    found = f"{pair.role} differ from {pair.key!r} in {int(is_bad.sum())} of {is_bad.numel()} elements"
    message = f"{found}, first at {place}: {kernel:.6g} instead of {file:.6g}" + (f"; {guess}" if guess else "")
    return Finding(it.id, pair.module, Verdict.FAIL, message, number, _ALLOWED[it.id], _KERNEL_REMEDY, it.kernel)


def _padding(part: LoadedPart, name: str) -> Iterator[Finding]:
    """L04: checks the bytes that a kernel may read beyond a matrix."""
    num_bytes = num_bad = 0
    for slot, runner in part.runners.items():
        for op, own in ops_with_runners(part.plan.ops_of(slot), runner):
            padding = own.padding()
            if padding is None or not padding.numel():
                continue
            num_bytes += padding.numel()
            dirty = int(padding.count_nonzero())
            num_bad += dirty
            if dirty:
                message = f"{dirty} of {padding.numel()} bytes of padding are not zero"
                kernel = op.choice.kernel.name
                yield Finding("L04", op.label, Verdict.FAIL, message, dirty, _ALLOWED["L04"], _KERNEL_REMEDY, kernel)
    if not num_bytes:
        yield Finding("L04", name, Verdict.SKIPPED, "no kernel of this plan pads its operands")
    elif not num_bad:
        yield Finding("L04", name, Verdict.PASS, f"{num_bytes} bytes of padding", 0, _ALLOWED["L04"])


_LIMITS = {"L02": 0.0, "L03": ALPHA_EPS}
_ALLOWED = {"L02": "0 elements", "L03": "relative error <= 3 x 2^-24", "L04": "0 bytes"}
