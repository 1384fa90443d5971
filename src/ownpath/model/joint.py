"""Several products of one input, in one planned slot or in several."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ownpath.runners import Linear


@dataclass(frozen=True)
class JointProducts:
    """Products of one input, in a fixed order. linears: the slots. widths: of the products of each slot."""

    linears: tuple[Linear, ...]
    widths: tuple[tuple[int, ...], ...]

    @classmethod
    def of(
        cls, joined: str, widths: Mapping[str, int], planned: Mapping[str, object], runner: Callable[[str], Linear]
    ) -> "JointProducts":
        """Makes the products of the slot ``joined`` if it is planned, else of a slot each. widths: by slot."""
        if joined in planned:
            return cls((runner(joined),), (tuple(widths.values()),))
        return cls(tuple(map(runner, widths)), tuple((width,) for width in widths.values()))

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Multiplies x [T, K] -> each product [T, N]; those of one slot are slices of its wider rows."""
        pairs = zip(self.linears, self.widths, strict=True)
        return [part for linear, widths in pairs for part in linear(x).split(widths, dim=-1)]
