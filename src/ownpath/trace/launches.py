"""Records the CUDA kernels that a run launches, each with the planned slot that launched it.

The profiler (CUPTI) sees every kernel on the device, whether torch, a library, Triton or the driver interface launched
it. Each call of a planned slot is marked, and a kernel belongs to the slot during whose call it was launched. A kernel
outside every slot is glue (copies, element-wise arithmetic) and must not be a product.
"""

import json
import math
import re
import tempfile
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ownpath.trace.ledger import Ledger
from ownpath.trace.observers import CallArguments, Observer, Watched

LIBRARY_PRODUCT = re.compile(
    r"nvjet|cublas|gemv|xmma|wgrad|\bcutlass::|cutlass_?\d\d_|ampere_|hopper_|volta_|turing_|splitK|dot_kernel|gemmk"
)
"""Matches kernel names of products from cuBLAS, cuBLASLt, cuDNN and torch itself."""
PRODUCT = re.compile(LIBRARY_PRODUCT.pattern + r"|gemm|matmul|linear|moe_|[^a-z]mm[^a-z]", re.IGNORECASE)
"""Matches any kernel name that looks like a product."""
_PREFIX = "slot "
TraceEvent = dict[str, Any]
"""An event of a Chrome trace, as parsed from JSON."""


class NoLaunchSeen(RuntimeError):
    """Raised when the profiler saw no kernel although some must have run."""


@dataclass(frozen=True)
class DeviceLaunch:
    """A kernel on the device: its slot (``None`` for glue), name, start, duration and grid; 0 CTAs: not recorded."""

    slot: str | None
    kernel: str
    start_us: float
    duration_us: float
    num_ctas: int = 0

    @property
    def is_library_product(self) -> bool:
        return LIBRARY_PRODUCT.search(self.kernel) is not None

    @property
    def is_product(self) -> bool:
        return PRODUCT.search(self.kernel) is not None


def record_launches(ledger: Ledger, run: Callable[[], object]) -> list[DeviceLaunch]:
    """Runs ``run`` under the profiler and returns every kernel with the planned slot that launched it.

    Errors: NoLaunchSeen when the profiler saw no kernel at all.
    """
    record = DeviceRecord()
    with ledger.observe(_SlotMarks()):
        record.start()
        run()
        launches = record.stop()
    if not launches:
        raise NoLaunchSeen("the profiler recorded no kernel; CUPTI may be missing or in use")
    return launches


@dataclass(frozen=True)
class MarkedTime:
    """A range of the host's time, in microseconds on the clock of ``DeviceLaunch``, and its slot."""

    slot: str
    start_us: float
    end_us: float


class DeviceRecord:
    """The kernels that the device runs between ``start`` and ``stop``, those of replayed graphs too.

    marks: what ``mark`` has marked, in order of start, once it has stopped.
    """

    def __init__(self) -> None:
        self.marks: list[MarkedTime] = []
        self._profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])

    def start(self) -> None:
        """Begins to record."""
        self._profiler.__enter__()

    def mark(self, slot: str) -> record_function:
        """Returns a context: what this thread launches in it has this slot in the record."""
        return record_function(_PREFIX + slot)

    def stop(self) -> list[DeviceLaunch]:
        """Waits for the device, ends the record, and returns it in order of start; nothing where no profiler is."""
        torch.cuda.synchronize()
        self._profiler.__exit__(None, None, None)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profiler.export_chrome_trace(str(path))
            events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        self.marks = marks_of(events)
        return launches_of(events)


class _SlotMarks(Observer):
    """Marks every call with a range of the slot's name in the profiler's trace."""

    def __init__(self) -> None:
        self._open: list[record_function] = []

    def before(self, call: Watched, args: CallArguments) -> None:
        mark = record_function(_PREFIX + call.slot)
        mark.__enter__()
        self._open.append(mark)

    def after(self, call: Watched, args: CallArguments, result: object) -> None:
        self._open.pop().__exit__(None, None, None)


def marks_of(events: Iterable[TraceEvent]) -> list[MarkedTime]:
    """Returns the marks of a Chrome trace, in order of start."""
    found = [event for event in events if _is_mark(event)]
    marks = [
        MarkedTime(
            str(event["name"]).removeprefix(_PREFIX), float(event["ts"]), float(event["ts"]) + float(event["dur"])
        )
        for event in found
    ]
    return sorted(marks, key=lambda mark: mark.start_us)


def _is_mark(event: TraceEvent) -> bool:
    return event.get("cat") == "user_annotation" and str(event["name"]).startswith(_PREFIX)


def launches_of(events: Iterable[TraceEvent]) -> list[DeviceLaunch]:
    """Returns the kernels of a Chrome trace in order of start, each with the innermost slot around its launch."""
    kernels, launch_of, marks = [], {}, defaultdict(list)
    for event in events:
        category = event.get("cat")
        if category == "kernel":
            kernels.append(event)
        elif category in ("cuda_runtime", "cuda_driver"):
            launch_of[event["args"].get("correlation")] = event
        elif _is_mark(event):
            marks[event["tid"]].append(event)
    by_thread = {thread: _Marks(found) for thread, found in marks.items()}
    found = []
    for kernel in sorted(kernels, key=lambda event: float(event["ts"])):
        launch = launch_of.get(kernel["args"].get("correlation"))
        around = by_thread.get(launch["tid"]) if launch else None
        slot = around.innermost(float(launch["ts"])) if launch and around else None
        grid = math.prod(kernel["args"].get("grid", (0,)))
        found.append(DeviceLaunch(slot, str(kernel["name"]), float(kernel["ts"]), float(kernel["dur"]), grid))
    return found


def busy_times(launches: Iterable[DeviceLaunch]) -> list[tuple[DeviceLaunch, float]]:
    """Returns launches in order of start, each with the microseconds by which it extends the time that the device ran.

    A kernel may start while its predecessor drains (programmatic dependent launch) and wait: its duration holds the
    wait, and durations add up to more than has passed. Here time counts once, for the kernel that began first.
    """
    found, counted_to = [], float("-inf")
    for launch in sorted(launches, key=lambda launch: launch.start_us):
        end = launch.start_us + launch.duration_us
        found.append((launch, max(0.0, end - max(launch.start_us, counted_to))))
        counted_to = max(counted_to, end)
    return found


def slot_times(launches: Iterable[DeviceLaunch]) -> dict[str | None, float]:
    """Returns microseconds per slot, each counted once (``busy_times``)."""
    times: dict[str | None, float] = defaultdict(float)
    for launch, added_us in busy_times(launches):
        times[launch.slot] += added_us
    return dict(times)


class _Marks:
    """The marked calls of one thread: nested or disjoint."""

    def __init__(self, events: list[TraceEvent]) -> None:
        self._events = sorted(events, key=lambda event: float(event["ts"]))
        self._starts = [float(event["ts"]) for event in self._events]

    def innermost(self, at_us: float) -> str | None:
        """Returns the slot of the latest call that began before ``at_us`` and had not ended."""
        for idx in range(bisect_right(self._starts, at_us) - 1, -1, -1):
            event = self._events[idx]
            if at_us <= self._starts[idx] + float(event["dur"]):
                return str(event["name"]).removeprefix(_PREFIX)
        return None
