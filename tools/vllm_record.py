"""The device's part of tools/vllm_rate.py: a record's steps, and what experts and hyper-connections add to one.

A kernel counts by the time by which it extends the time that the device is busy: one that was launched early waits for
the one before. Plain sums of durations stand beside it.
"""

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ownpath.integrations.vllm.proof.device import STOCK_EXPERTS, STOCK_HYPER
from ownpath.kernels.registry import SPECS
from ownpath.ops import OpKind
from ownpath.trace.launches import DeviceLaunch, MarkedTime, busy_times

_OF_DEVICE = ("span_us", "busy_us", "experts_us", "hyper_us", "sum_us", "experts_sum_us", "hyper_sum_us")
_NAME_LENGTH, _SHOWN = 120, 40
ACTIVATION, SUM = re.compile("silu_and_mul_with_clamp|clamp.*silu|act_and_mul"), re.compile("reduce_kernel")
MARLIN = re.compile("marlin_moe")


@dataclass(frozen=True)
class Timed:
    """Medians of one case, in microseconds. wall: of a step, on the host. Of the device: the span of a step, the time
    that it was busy, and the part that experts and hyper-connections add to it; plain sums of durations. kernels: of
    one step; the names' number."""

    wall_us: float
    span_us: float = 0.0
    busy_us: float = 0.0
    experts_us: float = 0.0
    hyper_us: float = 0.0
    sum_us: float = 0.0
    experts_sum_us: float = 0.0
    hyper_sum_us: float = 0.0
    num_kernels: int = 0


def split_steps(launches: Iterable[DeviceLaunch], marks: Sequence[MarkedTime]) -> tuple[list[list[DeviceLaunch]], int]:
    """Splits a record by the step in which the host launched each kernel; returns how many belong to no step too.

    A kernel whose launch was not seen belongs to the step during which it began: a step waits for the device.
    """
    steps: dict[str, list[DeviceLaunch]] = {mark.slot: [] for mark in marks}
    num_others = 0
    for launch in sorted(launches, key=lambda launch: launch.start_us):
        around = (mark.slot for mark in marks if mark.start_us <= launch.start_us <= mark.end_us)
        slot = launch.slot if launch.slot in steps else next(around, None)
        if slot is None:
            num_others += 1
        else:
            steps[slot].append(launch)
    return [step for step in steps.values() if step], num_others


def summed(steps: Sequence[Sequence[DeviceLaunch]], wall_us: float) -> Timed:
    """Returns medians over steps."""
    hyper = re.compile("|".join((STOCK_HYPER, *_patterns(OpKind.HYPER))))
    rows = []
    for step in steps:
        busy = busy_times(step)
        experts = {id(one) for one in experts_of(step)}
        parts = [(one, added) for one, added in busy if id(one) in experts]
        mixing = [(one, added) for one, added in busy if hyper.search(one.kernel)]
        span = max(one.start_us + one.duration_us for one in step) - step[0].start_us
        added = [sum(added for _, added in chosen) for chosen in (busy, parts, mixing)]
        plain = [sum(one.duration_us for one, _ in chosen) for chosen in (busy, parts, mixing)]
        rows.append([span, *added, *plain])
    medians = [round(statistics.median(column), 1) for column in zip(*rows, strict=True)]
    timed = dict(zip(_OF_DEVICE, medians, strict=True))
    return Timed(round(wall_us, 1), **timed, num_kernels=int(statistics.median(len(step) for step in steps)))


def experts_record(step: Sequence[DeviceLaunch]) -> Iterator[dict[str, object]]:
    """Yields the experts' kernels of a step, and those right before and behind: start and end from the step's start,
    and the time that each adds, in microseconds."""
    busy, experts = busy_times(step), {id(one) for one in experts_of(step)}
    chosen = [id(one) in experts for one, _ in busy]
    for idx, (one, added) in enumerate(busy):
        if any(chosen[max(0, idx - 1) : idx + 2]):
            start = one.start_us - step[0].start_us
            times = {"start": start, "end": start + one.duration_us, "added": added}
            rounded = {key: round(value, 1) for key, value in times.items()}
            yield {"kernel": one.kernel[:_NAME_LENGTH], "is_expert": chosen[idx]} | rounded


def kernels_record(step: Sequence[DeviceLaunch]) -> list[dict[str, object]]:
    """Returns the kernels that add the most time to a step, by name: launches, and the microseconds that they add."""
    times, counts = defaultdict[str, float](float), Counter[str]()
    for one, added in busy_times(step):
        times[one.kernel[:_NAME_LENGTH]] += added
        counts[one.kernel[:_NAME_LENGTH]] += 1
    most = sorted(times, key=lambda name: -times[name])[:_SHOWN]
    return [{"kernel": name, "launches": counts[name], "added": round(times[name], 1)} for name in most]


def experts_of(step: Sequence[DeviceLaunch]) -> Iterator[DeviceLaunch]:
    """Yields the kernels of routed experts: those that bear their names, and of vLLM's also the activation and the sum.

    Shared and routed experts have one activation kernel: that over more rows is the routed ones'. The sum over a
    token's experts is torch's, the first reduction behind a product.
    """
    named = re.compile("|".join((STOCK_EXPERTS, *_patterns(OpKind.MOE))))
    is_stock = any(MARLIN.search(one.kernel) for one in step)
    most = max((one.num_ctas for one in step if ACTIVATION.search(one.kernel)), default=0)
    is_behind_product = False
    for one in step:
        if named.search(one.kernel):
            is_behind_product |= bool(MARLIN.search(one.kernel))
            yield one
        elif is_stock and ACTIVATION.search(one.kernel) and one.num_ctas == most:
            yield one
        elif is_behind_product and SUM.search(one.kernel):
            is_behind_product = False
            yield one


def _patterns(kind: OpKind) -> list[str]:
    return [pattern for spec in SPECS if spec.kind is kind for pattern in spec.launches]
