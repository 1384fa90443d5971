"""Measures the distance of an engine's value from the reference's, in numbers that a report can plot."""

from dataclasses import dataclass

import torch

ROW_FACTOR = 8.0
"""A row may be so many times further away than the rows together: the budget is of the root mean square over all rows,
of which the largest among some thousand is 4 to 5 times as far if each row's error is Gaussian, and errors of rows
grow with the rows. Without it, one wrong row among a thousand would drown."""
Pair = tuple[torch.Tensor, torch.Tensor]
"""A value [T, ...] of the engine and of the reference."""


@dataclass(frozen=True)
class Measurement:
    """One value of one layer.

    slot: its name; budget: the limit of ``rel_l2``. kernel: the one that computed it, empty for values between slots.
    rel_l2: |e - r| / |r| over all rows. worst_row: the largest over rows, of |r| the row's or the rows' root mean
    square, whichever is larger. nonfinite_share, zero_share: of the engine's entries that are not finite, or zero.
    amax, reference_amax: largest magnitudes. dtypes: of the slot's input and output. run: the step that it is of, where
    there are several. module: of drafts, whose layer it is of; empty for the backbone's.
    """

    layer_idx: int
    slot: str
    rel_l2: float
    worst_row: float
    cosine: float
    max_abs: float
    amax: float
    reference_amax: float
    nonfinite_share: float
    zero_share: float
    budget: float
    kernel: str = ""
    dtype_in: str = ""
    dtype_out: str = ""
    run: str = ""
    module: str = ""

    @classmethod
    def of(
        cls, layer_idx: int, slot: str, pair: Pair, budget: float, kernel: str = "", dtypes: tuple[str, str] = ("", "")
    ) -> "Measurement":
        """Measures the engine's value against the reference's. dtypes: of the slot's input and output."""
        numbers = vars(distance(*pair))
        return cls(layer_idx, slot, **numbers, budget=budget, kernel=kernel, dtype_in=dtypes[0], dtype_out=dtypes[1])

    @property
    def is_within(self) -> bool:
        """True if it is finite and within its budget, together and row by row."""
        rows = self.worst_row <= ROW_FACTOR * self.budget
        return self.nonfinite_share == 0 and self.rel_l2 <= self.budget and rows

    @property
    def excess(self) -> float:
        """The distance in units of its budget, together or in its worst row, whichever is more."""
        if self.nonfinite_share:
            return float("inf")
        return max(self.rel_l2, self.worst_row / ROW_FACTOR) / max(self.budget, torch.finfo(torch.float64).tiny)

    @property
    def grown(self) -> float:
        """The relative difference of its largest magnitude from the reference's; 0 where that is 0."""
        return abs(self.amax / self.reference_amax - 1) if self.reference_amax else 0.0

    @property
    def is_as_large(self) -> bool:
        """True if the largest magnitude is right: an element that large is off by some 8 times its share of the noise
        at most."""
        return self.grown <= ROW_FACTOR * self.budget


@dataclass(frozen=True)
class Distance:
    """The numbers of a ``Measurement`` that come from the two values alone."""

    rel_l2: float
    worst_row: float
    cosine: float
    max_abs: float
    amax: float
    reference_amax: float
    nonfinite_share: float
    zero_share: float


def distance(engine: torch.Tensor, reference: torch.Tensor) -> Distance:
    """Computes the distance of a value [T, ...] to the reference's, in float64; entries that are not finite count as
    zeros.

    Errors: ValueError for shapes that differ.
    """
    if engine.shape != reference.shape:
        raise ValueError(f"the engine's is {list(engine.shape)}, the reference's {list(reference.shape)}")
    if not engine.numel():
        return Distance(0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    # Divided on the host: a GPU multiplies by the reciprocal, and n * (1 / n) is not always 1.
    counts = (~engine.isfinite()).sum(), (engine == 0).sum()
    nonfinite_share, zero_share = (int(count) / engine.numel() for count in counts)
    found, wanted = engine.double().flatten(1).nan_to_num(0.0, 0.0, 0.0), reference.double().flatten(1)
    gap = found - wanted
    gap_T, found_T, wanted_T = (torch.linalg.vecdot(x, x) for x in (gap, found, wanted))
    dot = torch.linalg.vecdot(found, wanted).sum()
    numbers = torch.stack(
        (
            _ratio(gap_T.sum(), wanted_T.sum()),
            _ratio(gap_T, torch.maximum(wanted_T, wanted_T.mean())).max(),
            torch.where(gap_T.sum() == 0, 1.0, dot / (found_T.sum() * wanted_T.sum()).sqrt().clamp(min=1e-300)),
            *(x.abs().max() for x in (gap, found, wanted)),
        )
    )
    rel_l2, worst_row, cosine, max_abs, amax, reference_amax = numbers.tolist()
    return Distance(rel_l2, worst_row, cosine, max_abs, amax, reference_amax, nonfinite_share, zero_share)


def row_distances(engine: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Computes each row's distance, as ``Measurement.worst_row`` defines it: float64 [T]."""
    found, wanted = engine.double().flatten(1), reference.double().flatten(1)
    gap_T, wanted_T = (found - wanted).square().sum(1), wanted.square().sum(1)
    return torch.nan_to_num(_ratio(gap_T, torch.maximum(wanted_T, wanted_T.mean())), nan=torch.inf)


def _ratio(gap: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """Returns the root of the quotient; 0 / 0 is 0, anything else over 0 is infinite."""
    return torch.where(gap == 0, 0.0, gap / size).sqrt()


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16``, not ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")
