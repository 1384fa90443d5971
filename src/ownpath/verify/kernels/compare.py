"""A kernel's result beside the exact one: the worst element, in units of what the arithmetic allows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ownpath.verify.kernels.limits import rounding


@dataclass(frozen=True)
class Exact:
    """What a result should be, float64, and how far it may be off before it is rounded to its own dtype."""

    value: Tensor
    bound: Tensor

    def rows(self, ids: Tensor | slice) -> "Exact":
        """Some of the rows."""
        return Exact(self.value[ids], self.bound[ids])


@dataclass(frozen=True)
class Deviation:
    """The worst element of a result. ratio: its error over what is allowed; infinite for NaN and infinities.

    place: its index. columns: which columns have an element beyond what is allowed.
    """

    ratio: float
    place: tuple[int, ...] = ()
    found: float = 0.0
    exact: float = 0.0
    columns: tuple[int, ...] = ()

    @property
    def is_allowed(self) -> bool:
        return self.ratio <= 1.0

    def __str__(self) -> str:
        return f"{self.found:.6g} at {list(self.place)} where {self.exact:.6g} is exact"


NO_DEVIATION = Deviation(0.0)


def deviation(found: Tensor, exact: Exact) -> Deviation:
    """The worst element of ``found``. Shapes: all three the same."""
    if found.shape != exact.value.shape:
        return Deviation(math.inf, tuple(found.shape))
    if not found.numel():
        return NO_DEVIATION
    ratio = ratios(found, exact)
    worst = int(ratio.argmax())
    value = float(ratio.flatten()[worst])
    place = tuple(int(part) for part in torch.unravel_index(torch.tensor(worst), found.shape))
    columns: Sequence[int] = ()
    if not value <= 1.0:
        columns = (ratio > 1.0).flatten(0, -2).any(0).nonzero().flatten().tolist()
    return Deviation(value, place, float(found[place]), float(exact.value[place]), tuple(columns))


def ratios(found: Tensor, exact: Exact) -> Tensor:
    """Each element's error over what is allowed, float64; infinite where the result is not finite."""
    error = (found.double() - exact.value).abs()
    # The smallest normal number: below it a result may be flushed to zero.
    allowed = exact.bound + rounding(found.dtype) * exact.value.abs() + torch.finfo(found.dtype).tiny
    return torch.where(found.isfinite(), error / allowed, torch.inf)


def repeated_deviation(found: Tensor, exact: Exact) -> Deviation:
    """As ``deviation``, of rows that repeat ``exact``'s as often as there is room."""
    worst, period = NO_DEVIATION, len(exact.value)
    for start in range(0, len(found), period):
        rows = found[start : start + period]
        here = deviation(rows, exact.rows(slice(len(rows))))
        worst = worse(worst, replace(here, place=(start + here.place[0], *here.place[1:])) if here.place else here)
    return worst


def worse(a: Deviation, b: Deviation) -> Deviation:
    """The one that is further off."""
    return b if b.ratio > a.ratio else a
