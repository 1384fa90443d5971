"""Chooses the experts' FP8 kernels by (token, slot) pairs per expert. Measured with V4-Flash's experts on one H200."""

import math
from dataclasses import dataclass
from functools import lru_cache

from ownpath.kernels.fp8_experts.config import ExpertGemmConfig, fit
from ownpath.kernels.nvfp4.choose import BLOCK_ROWS, WIDE_PAIRS


@dataclass(frozen=True)
class Shape:
    """The shape of both products before their rows are known: see ``ExpertGemmConfig``. stages: at most."""

    num_m64: int
    warpgroups_m: int
    n_sizes: tuple[int, ...]
    stages: int
    parts: int = 1
    cluster_m: int = 1
    per_sm: int = 1
    box: int = 64


@dataclass(frozen=True)
class Fp8MoeChoice:
    """The kernels of one call's two products."""

    gate_up: ExpertGemmConfig
    down: ExpertGemmConfig

    @property
    def tile_rows(self) -> int:
        return self.gate_up.n_sizes[-1]


SHAPES = (
    (28.1, Shape(2, 2, (16, 24, 32), 8, box=8)),
    (56.2, Shape(2, 2, (32, 48, 64), 6, box=16)),
    (112.0, Shape(2, 2, (96, 112), 6, box=16)),
    (math.inf, Shape(1, 2, (160, 176, 192, 208, 224), 6, parts=2, cluster_m=2, box=32)),
)
"""(most pairs per expert, shape), ascending: the fastest of eight that were measured."""


def choose(pairs: int, num_experts: int, hidden: int, inter: int, is_batch_invariant: bool) -> Fp8MoeChoice:
    """Chooses the kernels of a call. is_batch_invariant: bits must not depend on ``pairs``."""
    density = pairs / num_experts
    shape = next(shape for limit, shape in SHAPES if density <= limit)
    return make(shape, hidden, inter, is_batch_invariant or pairs <= WIDE_PAIRS)


@lru_cache(maxsize=256)
def make(shape: Shape, hidden: int, inter: int, wide: bool) -> Fp8MoeChoice:
    """Makes both products' kernels. wide: the experts' outputs stay float32 until they are summed."""
    return Fp8MoeChoice(_gemm(shape, 2 * inter, swiglu=True), _gemm(shape, hidden, wide=wide))


def _gemm(shape: Shape, num_rows: int, swiglu: bool = False, wide: bool = False) -> ExpertGemmConfig:
    """Returns the shape's kernel, or one with smaller tiles that divide the rows."""
    blocks = num_rows // BLOCK_ROWS
    tiles = ((shape.num_m64, shape.warpgroups_m), (1, 2))
    num_m64, warpgroups_m = next(tile for tile in tiles if blocks % (tile[0] * tile[1]) == 0)
    cluster_m = math.gcd(shape.cluster_m, blocks // (num_m64 * warpgroups_m))
    config = ExpertGemmConfig(
        num_m64,
        warpgroups_m,
        1,
        shape.n_sizes,
        1,
        grouped=True,
        swiglu=swiglu,
        cluster_m=cluster_m,
        wide=wide,
        per_sm=shape.per_sm,
        box=shape.box,
        parts=shape.parts,
    )
    return fit(config, shape.stages)
