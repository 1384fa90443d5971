"""Compile-time configurations of the grouped product with FP8 weights. Importable without the DSL."""

from dataclasses import dataclass
from typing import ClassVar

from ownpath.kernels.fp8.config import W8A16Config

MAX_ANGLES = 32
ROTATING_WARPS = 2
REGISTERS = {
    (1, 2): (40, 232),
    (2, 2): (32, 104),
    (1, 4): (32, 112),
    (2, 1): (40, 216),
    (3, 1): (40, 120),
    (4, 1): (40, 88),
}
"""Registers of loading and multiplying threads, by CTAs per SM and consumers: loading threads rotate, too."""


@dataclass(frozen=True)
class GroupedFp8Config(W8A16Config):
    """The shape of one compiled kernel: as ``W8A16Config``, for groups of rows with inputs of their own."""

    compiler: ClassVar[str] = "grouped.fp8_sm90:compile_grouped"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ragged:
            raise ValueError("ragged: rows of a group are a multiple of 128")
        if (self.per_sm, self.consumers) not in REGISTERS:
            raise ValueError(f"per_sm={self.per_sm} with consumers={self.consumers}: no split of the registers")

    @property
    def name(self) -> str:
        return super().name.replace("fp8_w8a16", "fp8_grouped")

    @property
    def sources(self) -> tuple[str, ...]:
        return ("grouped/fp8_sm90.py", "grouped/config.py", *super().sources)
