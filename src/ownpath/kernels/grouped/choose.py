"""Chooses the kernel of the grouped product with FP8 weights, by token count."""

from dataclasses import dataclass
from functools import lru_cache

from ownpath.kernels.fp8.config import MAX_K_BLOCKS, w8a16_stages_of
from ownpath.kernels.grouped.config import GroupedFp8Config

WeightSizes = tuple[int, int, bool]
"""The properties of a weight that decide its kernels: row blocks, K blocks, folded."""
SMS = 132


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
        stages = w8a16_stages_of(self.num_m64, self.num_n, self.cluster_k, self.per_sm, self.consumers)
        return GroupedFp8Config(
            self.num_m64, self.num_n, stages, self.cluster_k, folded, False, self.per_sm, self.consumers, self.wgmma
        )


FEW = tuple(GroupedShape(1, num_n, 2, 2, 1) for num_n in (8, 16))
SHORT = tuple(GroupedShape(1, num_n, 4, 3, 1, num_n >= 32) for num_n in (8, 16, 32, 64))
"""For few rows of weights: CTAs of 64, four to a cluster, that run in one wave, three to an SM."""
SOME = (GroupedShape(2, 32, 2, 1, 2, True), GroupedShape(2, 64, 2, 1, 2, True))
MANY = (GroupedShape(2, 128, 2, 1, 2, True), GroupedShape(2, 128, 1, 1, 2, True), GroupedShape(4, 128, 1, 1, 2, True))
"""For more tokens than a tile has: the one whose waves of CTAs cost least."""
BLOCK_COST, WAVE_COST = {2: 9, 4: 20}, 110
"""Of a block of K by row blocks of a CTA, and of a wave: tenths of a microsecond, measured on an H200."""
INVARIANT = tuple(GroupedShape(1, num_n, 2, 2, 1) for num_n in (8, 16))
"""Shapes by tokens of a tile, ascending. The invariant kernel's have one order of sums: only their width differs."""


@lru_cache(maxsize=4096)
def choose(num_tokens: int, sizes: WeightSizes, is_batch_invariant: bool = False) -> GroupedFp8Config:
    """Chooses the kernel for a token count. Tuned on an H200 with V4-Flash's eight groups of 1024 x 4096, and four."""
    shapes = _few(sizes, is_batch_invariant)
    shape = next((shape for shape in shapes if num_tokens <= shape.num_n), shapes[-1])
    if is_batch_invariant or num_tokens <= shape.num_n:
        return fit(shape, sizes)
    return min(_many(sizes), key=lambda config: _cost(config, num_tokens, sizes))


def _few(sizes: WeightSizes, is_batch_invariant: bool) -> tuple[GroupedShape, ...]:
    """Returns the shapes for one tile of tokens."""
    if is_batch_invariant:
        return INVARIANT
    runs_at_once = sizes[0] * SHORT[0].cluster_k <= SHORT[0].per_sm * SMS
    return SHORT if runs_at_once else (*FEW, *SOME)


def _many(sizes: WeightSizes) -> list[GroupedFp8Config]:
    """Returns the kernels for more tokens. Four row blocks leave registers for one set of sums: scales must fold."""
    shapes = MANY if sizes[2] else MANY[:2]
    return [fit(shape, sizes) for shape in shapes]


def _cost(config: GroupedFp8Config, num_tokens: int, sizes: WeightSizes) -> int:
    num_row_blocks, num_k_blocks, _ = sizes
    waves = -(-config.grid(num_tokens, num_row_blocks) // (SMS - SMS % config.cluster_k))
    return waves * (BLOCK_COST[config.num_m64] * -(-num_k_blocks // config.cluster_k) + WAVE_COST)


def fit(shape: GroupedShape, sizes: WeightSizes) -> GroupedFp8Config:
    """Returns the kernel of a shape, with a cluster that shares the weight's K blocks."""
    _, num_k_blocks, folded = sizes
    cluster_k = min(shape.cluster_k, num_k_blocks)
    while -(-num_k_blocks // cluster_k) > MAX_K_BLOCKS:
        cluster_k *= 2
    fitted = GroupedShape(shape.num_m64, shape.num_n, cluster_k, shape.per_sm, shape.consumers, shape.wgmma)
    return fitted.config(folded)


def choices(sizes: WeightSizes, is_batch_invariant: bool) -> list[GroupedFp8Config]:
    """Returns every result of ``choose`` for any number of tokens, and in some cases more."""
    few = [fit(shape, sizes) for shape in _few(sizes, is_batch_invariant)]
    return few if is_batch_invariant else few + _many(sizes)
