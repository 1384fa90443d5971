"""Compile-time configurations of the grouped product with FP8 weights, and their choice. Importable without the DSL."""

from dataclasses import dataclass
from functools import lru_cache

from ownpath.kernels.fp8.config import CTA_SMEM, MAX_K_BLOCKS, W8A16Config, w8a16_stages

ROWS = 64
"""Rows of a block of weights."""
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
GroupKey = tuple[int, int, int, bool]
"""The properties of a weight that decide its kernels: groups, row blocks of a group, K blocks, folded."""


@dataclass(frozen=True)
class GroupedFp8Config(W8A16Config):
    """The shape of one compiled kernel: as ``W8A16Config``, for groups of rows with inputs of their own."""

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


@dataclass(frozen=True)
class GroupedShape:
    """The shape of a kernel before the number of stages: see ``W8A16Config``."""

    num_m64: int
    num_n: int
    cluster_k: int
    per_sm: int
    consumers: int
    wgmma: bool = False

    def config(self, folded: bool) -> GroupedFp8Config:
        """Returns the kernel with as many stages as fit."""
        stages = w8a16_stages(self.num_m64, self.num_n, CTA_SMEM[self.per_sm])
        return GroupedFp8Config(
            self.num_m64, self.num_n, stages, self.cluster_k, folded, False, self.per_sm, self.consumers, self.wgmma
        )


FEW = tuple(GroupedShape(1, num_n, 4, 4, 1) for num_n in (8, 16))
MANY = (GroupedShape(1, 32, 4, 3, 1, True), GroupedShape(1, 64, 4, 3, 1, True), GroupedShape(2, 128, 2, 1, 2, True))
INVARIANT = tuple(GroupedShape(1, num_n, 4, 4, 1) for num_n in (8, 16))
"""Shapes by tokens of a tile, ascending. The invariant kernel's have the same order of sums: only their width differs."""


@lru_cache(maxsize=4096)
def choose(num_tokens: int, key: GroupKey, is_batch_invariant: bool = False) -> GroupedFp8Config:
    """Chooses the kernel for a token count. Tuned on an H200 with V4-Flash's eight groups of 1024 x 4096."""
    shapes = INVARIANT if is_batch_invariant else (*FEW, *MANY)
    shape = next((shape for shape in shapes if num_tokens <= shape.num_n), shapes[-1])
    return fit(shape, key)


def fit(shape: GroupedShape, key: GroupKey) -> GroupedFp8Config:
    """Returns the kernel of a shape, with a cluster that shares the weight's K blocks."""
    _, _, num_k_blocks, folded = key
    cluster_k = min(shape.cluster_k, num_k_blocks)
    while -(-num_k_blocks // cluster_k) > MAX_K_BLOCKS:
        cluster_k *= 2
    fitted = GroupedShape(shape.num_m64, shape.num_n, cluster_k, shape.per_sm, shape.consumers, shape.wgmma)
    return fitted.config(folded)


def choices(key: GroupKey, is_batch_invariant: bool) -> list[GroupedFp8Config]:
    """Returns every result of ``choose`` for any number of tokens."""
    shapes = INVARIANT if is_batch_invariant else (*FEW, *MANY)
    return [fit(shape, key) for shape in shapes]
