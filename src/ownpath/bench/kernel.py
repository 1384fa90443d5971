"""Measures kernels that read and write more than a product does: each bench says what a call is and who judges it.

A contender binds one call to each of several sets of inputs, which together exceed the L2 cache. The first call's
result is judged before anything is timed.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Generic, Protocol, TypeVar

import torch

from ownpath.bench import rotation
from ownpath.bench.contender import Contender, Missing, chosen
from ownpath.bench.floor import Work
from ownpath.bench.measure import Settings, describe, without_time
from ownpath.bench.ours import own_kernels
from ownpath.bench.request import BenchRequest
from ownpath.bench.row import Case, Row, Timing
from ownpath.bench.timing import TimedCall, Timer
from ownpath.kernels.registry import KERNELS, SPECS
from ownpath.kernels.spec import KernelSpec
from ownpath.loading import device_caps
from ownpath.ops import OpKind
from ownpath.plan.select import Choice, Demands, select

CallInputs = TypeVar("CallInputs")
_CallInputs_contra = TypeVar("_CallInputs_contra", contravariant=True)


BFLOAT16 = Demands("bfloat16")


class NotApplicable(ValueError):
    """Raised by a contender that cannot run a case; the message says why."""


@dataclass(frozen=True)
class Bound:
    """calls: one for each set of inputs. judge: judges what the first call wrote. Errors: AssertionError."""

    calls: Sequence[TimedCall]
    judge: Callable[[], None]


class KernelContender(Contender, Protocol[_CallInputs_contra]):
    """A contender of a bench of kernels."""

    def bind(self, sets: Sequence[_CallInputs_contra]) -> Bound:
        """Prepares a call for each set and compiles. Not timed. Errors: NotApplicable."""


@dataclass(frozen=True)
class KernelProblem(Generic[CallInputs]):
    """A case and its sets of inputs."""

    case: Case
    sets: Sequence[CallInputs]


class OwnKernel(Generic[CallInputs]):
    """A kernel of ours. bind_to: binds calls of a registered kernel to sets of inputs."""

    is_peer, max_rel_l2 = False, 0.0

    def __init__(self, name: str, spec: KernelSpec, bind_to: "BindTo[CallInputs]") -> None:
        self.name, self._spec, self._bind_to = name, spec, bind_to

    def missing(self, device: str) -> Missing | None:
        """A kernel that asks the device during a call is in no graph."""
        if torch.device(device).type == "cuda" and self._spec.reads_host:
            return Missing("not applicable", "waits for values on the host: no graph can hold it")
        return None

    def bind(self, sets: Sequence[CallInputs]) -> Bound:
        return self._bind_to(KERNELS[self._spec.name], self._spec, sets)


BindTo = Callable[[Any, KernelSpec, Sequence[CallInputs]], Bound]
"""(a registered kernel, its spec, sets of inputs) -> its calls."""


def contenders_of(
    asked: BenchRequest,
    kind: OpKind,
    bind_to: BindTo[CallInputs],
    peers: Sequence[KernelContender[CallInputs]],
    demands: Demands = BFLOAT16,
) -> list[KernelContender[CallInputs]]:
    """Returns who takes part: the kernel that a plan would choose, and peers; any other kernel of ours by its name."""
    device = asked.settings.device
    default = select(kind, None, device_caps(device), SPECS, demands)
    assert isinstance(default, Choice)
    everyone: list[KernelContender[CallInputs]] = [OwnKernel("ownpath", default.kernel, bind_to), *peers]
    plain_first = {spec.name: spec for spec in reversed(own_kernels(kind, None, device))}
    named = [OwnKernel(spec.name, spec, bind_to) for spec in plain_first.values()]
    return chosen(everyone, named, asked.contenders)


def run_kernels(
    problems: Iterable[KernelProblem[CallInputs]],
    contenders: Sequence[KernelContender[CallInputs]],
    settings: Settings,
    timer: Timer,
) -> Iterator[Row]:
    """Yields a row for each problem and contender, problem by problem, so that only one's inputs are in memory."""
    for problem in problems:
        for contender in contenders:
            yield _row(problem, contender, settings.device, timer)


def _row(problem: KernelProblem[CallInputs], contender: KernelContender[CallInputs], device: str, timer: Timer) -> Row:
    case, wrong = problem.case, ""
    if missing := contender.missing(device):
        return without_time(case, contender, missing.status, missing.reason)
    try:
        bound = contender.bind(problem.sets)
        bound.calls[0]()
        try:
            bound.judge()
        except AssertionError as error:
            wrong = " ".join(str(error).split())[:400] or "its result is not what the operation defines"
        timing = timer.time(bound.calls)
    except NotApplicable as reason:
        return without_time(case, contender, "not applicable", str(reason))
    except Exception as failure:  # a contender's failure is a result, shown in the table
        return without_time(case, contender, "failed", describe(failure))
    return Row(case, contender.name, contender.is_peer, "wrong" if wrong else "ok", wrong, timing)


def case_of(
    settings: Settings,
    bench: str,
    shape: str,
    num_rows: int,
    work: Work,
    dims: Mapping[str, int] = MappingProxyType({}),
) -> Case:
    """Returns the case of a call, with its floor where the device's ceilings are known."""
    floor_us = None if settings.ceilings is None else work.floor_us(settings.ceilings)
    return Case(bench, shape, dims, num_rows, work.num_bytes, work.num_flop, floor_us)


def cold_timer(settings: Settings) -> tuple[Timer, Mapping[str, int]]:
    """Returns the timer of calls that read too little to evict each other, and what a case says of it."""
    if torch.device(settings.device).type != "cuda":
        return settings.timer, {}
    return FilledTimer(settings.timer, settings.device), {"l2_fill_bytes": rotation.COLD_BYTES}


@dataclass(frozen=True)
class FilledTimer:
    """Times calls that read too little to evict each other: a fill of the L2 cache before each, minus the fills."""

    timer: Timer
    device: str

    @property
    def name(self) -> str:
        return f"{self.timer.name}, minus fills of the L2 cache"

    def time(self, calls: Sequence[TimedCall]) -> Timing:
        fill = torch.empty(rotation.COLD_BYTES, dtype=torch.uint8, device=self.device).zero_
        pairs = self.timer.time([one for call in calls for one in (fill, call)])
        fills = self.timer.time([fill] * len(calls))
        us, us_p10, us_p90 = (2 * of_pair - fills.us for of_pair in (pairs.us, pairs.us_p10, pairs.us_p90))
        return Timing(us, us_p10, us_p90, len(calls), pairs.num_replays)
