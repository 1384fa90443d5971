"""Measures one contender in one case: a warm-up call that must be right, then the time. A failure becomes a row too."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ownpath.bench.check import poison, rel_l2
from ownpath.bench.contender import Contender
from ownpath.bench.floor import H200, Ceilings
from ownpath.bench.row import Case, Row, Status
from ownpath.bench.timing import Timer, choose_timer


@dataclass(frozen=True)
class Settings:
    """The device and method of measurement. ceilings: None where they were not measured; no floor is shown then."""

    device: str
    seed: int
    timer: Timer
    ceilings: Ceilings | None

    @staticmethod
    def of(device: str, seed: int = 0, budget_s: float = 0.5) -> "Settings":
        """Makes the settings for a device. Errors: ValueError when the device is not there."""
        timer = choose_timer(device, budget_s)
        on_h200 = torch.device(device).type == "cuda" and "H200" in torch.cuda.get_device_name(device)
        return Settings(device, seed, timer, H200 if on_h200 else None)

    def generator(self, offset: int = 0) -> torch.Generator:
        """Returns a random generator on the device, the same for the same seed and offset."""
        return torch.Generator(self.device).manual_seed(self.seed + offset)


@dataclass(frozen=True)
class Round:
    """Calls that are timed together, each on its own weights or routing, and the first one's expected result.

    Shapes: reference float64 [sampled rows, N].
    """

    calls: Sequence[Callable[[], torch.Tensor]]
    reference: torch.Tensor


def measure(case: Case, contender: Contender, make_round: Callable[[], Round], timer: Timer) -> Row:
    """Checks the first call's answer, then times the round."""
    try:
        around = make_round()
        first = around.calls[0]
        poison(tuple(first().shape), around.reference.device)
        error = rel_l2(first(), around.reference)
        timing = timer.time(around.calls)
    except Exception as failure:  # a contender's failure is a result, shown in the table
        return without_time(case, contender, "failed", describe(failure))
    if not error <= contender.max_rel_l2:  # NaN too
        why = f"relative L2 {error:.1e} from float64, more than {contender.max_rel_l2}"
        return Row(case, contender.name, contender.is_peer, "wrong", why, timing, error)
    return Row(case, contender.name, contender.is_peer, "ok", "", timing, error)


def without_time(case: Case, contender: Contender, status: Status, reason: str) -> Row:
    """Returns the row of a contender without a time."""
    return Row(case, contender.name, contender.is_peer, status, reason)


def describe(failure: Exception) -> str:
    """Returns an exception as one line, class and message, and logs the traceback.

    The first of a chain: ending a capture that a failed call has spoilt raises an error of its own.
    """
    logging.getLogger(__name__).warning("a contender failed", exc_info=failure)
    first: BaseException = failure
    while first.__context__ is not None:
        first = first.__context__
    return " ".join(f"{type(first).__name__}: {first}".split())[:400]
