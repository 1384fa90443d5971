"""Chooses the compiled kernel for given sizes: from tuned tables, or by arithmetic for dense sizes without an entry.

``tuned/moe.json`` is keyed by the experts' shape and (token, slot) pairs per expert, ``tuned/linear.json`` by tokens
and matrix; ``ownpath bench --tune`` writes them. Nothing is measured while serving.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ownpath.kernels.nvfp4.config import BLOCK_K, GemmConfig
from ownpath.kernels.nvfp4.moe_sliced_config import MAX_SLICED_PAIRS, SlicedConfig, fits_slices

TUNED = Path(__file__).parent / "tuned"
BLOCK_ROWS = 64
SMS = 132
WIDE_PAIRS = 4096
"""Up to this many pairs the experts' outputs stay float32 until they are summed. With more pairs, float32 would cost
over 5% of the time, so they are rounded to BF16."""


@dataclass(frozen=True)
class MoeChoice:
    """The kernels of one call's two products. sliced: one kernel for both, which is used if it is there."""

    gate_up: GemmConfig
    down: GemmConfig
    sliced: SlicedConfig | None = None

    @property
    def tile_rows(self) -> int:
        return self.gate_up.n_sizes[-1]

    @property
    def is_wide(self) -> bool:
        return self.down.wide


MoeEntries = tuple[tuple[float, dict[str, object]], ...]
MEASURED_FIRST = (4096, 2048)
"""Hidden size and width of the experts whose entries serve what was not measured: V4-Flash's."""


def moe_table(hidden: int, inter: int) -> MoeEntries:
    """Returns (largest pairs per expert, knobs), ascending, for experts hidden -> inter.

    With more pairs than a shape was measured with, the first shape's entries serve it.
    """
    tables = _moe_tables()
    own = tables.get((hidden, inter), ())
    most = own[-1][0] if own else 0.0
    return (*own, *(entry for entry in tables[MEASURED_FIRST] if entry[0] > most))


@lru_cache(maxsize=1)
def _moe_tables() -> Mapping[tuple[int, int], MoeEntries]:
    found: dict[tuple[int, int], list[tuple[float, dict[str, object]]]] = {}
    for case, entry in json.loads((TUNED / "moe.json").read_text(encoding="utf-8"))["entries"].items():
        (hidden, inter), limit = moe_case(case)
        found.setdefault((hidden, inter), []).append((limit, entry["config"]))
    return {shape: tuple(sorted(entries, key=lambda entry: entry[0])) for shape, entries in found.items()}


def moe_case(case: str) -> tuple[tuple[int, int], float]:
    """Parses hidden size, width and limit of a case such as ``hidden=4096,inter=2048,pairs_per_expert<=8``."""
    hidden, inter, limit = (part.split("=")[-1] for part in case.split(","))
    return (int(hidden), int(inter)), float(limit)


def choose_moe(pairs: int, num_experts: int, hidden: int, inter: int, invariant: bool) -> MoeChoice:
    """Chooses the kernels for ``pairs`` (token, slot) pairs. invariant: bits must not depend on ``pairs``."""
    density, table = pairs / num_experts, moe_table(hidden, inter)
    knobs = next((knobs for limit, knobs in table if density <= limit), table[-1][1])
    choice = moe_choice(knobs, hidden, inter, wide=invariant or pairs <= WIDE_PAIRS)
    # Slices sum in another order than the whole width.
    return replace(choice, sliced=None) if invariant or pairs > MAX_SLICED_PAIRS else choice


@lru_cache(maxsize=256)
def _moe_choice(knobs: tuple[tuple[str, int], ...], hidden: int, inter: int, wide: bool) -> MoeChoice:
    read = dict(knobs)
    sizes = tuple(size for size in (read.get(f"n{idx}") for idx in range(16)) if size)
    gate_up = _fit_config(read, sizes, 2 * inter // BLOCK_ROWS, swiglu=True, gather=bool(read["gather"]))
    down = _fit_config(read, sizes, hidden // BLOCK_ROWS, wide=wide)
    return MoeChoice(gate_up, down, _sliced(read, hidden, inter) if "slice_tokens" in read else None)


def _sliced(read: Mapping[str, int], hidden: int, inter: int) -> SlicedConfig | None:
    """Returns the kernel of slices that a table's entry names, where the experts are made of whole slices."""
    if not fits_slices(hidden, inter):
        return None
    return SlicedConfig(read["slice_tokens"], read["slice_stages"], read["slice_per_sm"])


def moe_choice(knobs: Mapping[str, object], hidden: int, inter: int, wide: bool) -> MoeChoice:
    """Makes kernels from a table's knobs: num_m64, warpgroups_m, n0, n1, ... (sizes), stages, depth, gather, per_sm.

    With slices also slice_tokens, slice_stages and slice_per_sm.
    """
    return _moe_choice(tuple((name, int(str(value))) for name, value in sorted(knobs.items())), hidden, inter, wide)


def _fit_config(read: Mapping[str, int], sizes: tuple[int, ...], num_blocks: int, **flags: bool) -> GemmConfig:
    """Returns the tuned tile, or the next smaller one that divides the rows."""
    tiles = ((read["num_m64"], read["warpgroups_m"]), (2, 2), (1, 2))
    num_m64, warpgroups_m = next(tile for tile in tiles if num_blocks % (tile[0] * tile[1]) == 0)
    num_tiles = num_blocks // (num_m64 * warpgroups_m)
    cluster_m = 1 if flags.get("gather") else math.gcd(read.get("cluster_m", 1), num_tiles)
    return fit(
        GemmConfig(
            num_m64,
            warpgroups_m,
            1,
            sizes,
            1,
            grouped=True,
            depth=read["depth"],
            group=read.get("group", 1),
            cluster_m=cluster_m,
            per_sm=read["per_sm"],
            box=read.get("box", 64),
            per_block=bool(read.get("per_block", 0)),
            stage_k=read.get("stage_k", BLOCK_K),
            **flags,
        ),
        read["stages"],
    )


def fit(config: GemmConfig, stages: int) -> GemmConfig:
    """Returns ``config`` with as many of the wanted stages as shared memory holds."""
    per_stage = config.stage_bytes + 16
    most = (config.max_smem_bytes - config.reduce_bytes) // per_stage
    return GemmConfig(**{**vars(config), "num_stages": max(1, min(stages, most))})


@dataclass(frozen=True)
class LinearChoice:
    """The kernel of a dense product. rows_per_tile: tokens of a tile; grid: CTAs."""

    gemm: GemmConfig
    rows_per_tile: int
    grid: int


@lru_cache(maxsize=4096)
def choose_linear(num_tokens: int, num_rows: int, num_cols: int, invariant: bool) -> LinearChoice:
    """Chooses the kernel for x [num_tokens, num_cols] and a weight of num_rows.

    Few tokens: K is split over two warpgroups and a cluster until the CTAs fill the GPU once, because latency dominates
    for a small matrix. Many: tiles that fill the last wave best. ``invariant`` never splits K.
    """
    blocks, k_blocks = num_rows // BLOCK_ROWS, num_cols // BLOCK_K
    tuned = linear_table().get((num_rows, num_cols), ())
    knobs = next((knobs for limit, knobs in tuned if num_tokens <= limit), None)
    if knobs is not None and not invariant:
        config = linear_config(knobs)
    elif num_tokens <= 64:
        size = next(size for size in (8, 16, 32, 64) if num_tokens <= size)
        if blocks >= 2 * SMS or invariant or k_blocks % 2:
            tiles = ((1, 4), (1, 2), (1, 1)) if blocks >= 2 * SMS and size < 64 else ((1, 2), (1, 1))
            config = fit(_dense(_tile(blocks, tiles), size), 8)
        else:
            config = _split(blocks, k_blocks, size)
    elif num_tokens <= 512:
        wide = blocks >= 2 * SMS and num_tokens > 128 and blocks % 4 == 0
        config = fit(_dense((2, 2), 128), 4) if wide else fit(_dense(_tile(blocks, ((1, 2), (1, 1))), 64), 6)
    else:
        config = _waves(num_tokens, blocks)
    return linear_choice(config, num_tokens, num_rows)


@lru_cache(maxsize=1)
def linear_table() -> Mapping[tuple[int, int], tuple[tuple[int, dict[str, int]], ...]]:
    """Returns (rows, columns) of a matrix -> (largest number of tokens, knobs), ascending."""
    found: dict[tuple[int, int], list[tuple[int, dict[str, int]]]] = {}
    for case, entry in json.loads((TUNED / "linear.json").read_text(encoding="utf-8"))["entries"].items():
        tokens, rows, cols = (int(part.split("=")[1]) for part in case.split(","))
        found.setdefault((rows, cols), []).append((tokens, entry["config"]))
    return {matrix: tuple(sorted(entries, key=lambda entry: entry[0])) for matrix, entries in found.items()}


def linear_config(knobs: Mapping[str, object]) -> GemmConfig:
    """Makes a kernel from a table's knobs: fields of ``GemmConfig``, ``size`` for tokens of a tile, most ``stages``."""
    read: dict[str, Any] = {name: int(str(value)) for name, value in knobs.items()}
    size, stages = read.pop("size"), read.pop("stages")
    return fit(GemmConfig(n_sizes=(size,), num_stages=1, **read), stages)


def _tile(blocks: int, tiles: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    return next(tile for tile in tiles if blocks % (tile[0] * tile[1]) == 0)


def _dense(tile: tuple[int, int], size: int) -> GemmConfig:
    return GemmConfig(tile[0], tile[1], 1, (size,), 1)


CLUSTER_CTAS = {1: 132, 2: 132, 4: 120, 8: 120}
"""Cluster size -> CTAs that an H200 holds at one CTA per SM (measured): SMs left over in a GPC stay idle."""


def _split(blocks: int, k_blocks: int, size: int) -> GemmConfig:
    """Splits K over two warpgroups, and over the largest cluster that still runs in one wave."""
    # Wide tiles read the tokens half as often; they need a cluster to fill the GPU and to sum through one buffer.
    for num_m64 in (2, 1) if size == 64 and blocks % 2 == 0 else (1,):
        tiles, cluster = blocks // num_m64, 1
        while cluster < 8 and tiles * cluster * 2 <= CLUSTER_CTAS[cluster * 2] and k_blocks % (cluster * 4) == 0:
            cluster *= 2
        if tiles * cluster > SMS // 2:
            break
    return fit(GemmConfig(num_m64, 1, 2, (size,), 1, cluster_k=cluster), 6)


def _waves(num_tokens: int, blocks: int) -> GemmConfig:
    """Returns the tile width with the least work on the busiest SM, in columns; 16 stands for a tile's fixed cost."""
    tile = _tile(blocks, ((2, 2), (1, 2), (1, 1)))
    m_tiles = blocks // (tile[0] * tile[1])

    def cost(size: int) -> int:
        return -(-m_tiles * -(-num_tokens // size) // SMS) * (size + 16)

    return fit(_dense(tile, min((128, 112, 96), key=cost)), 4)


def linear_choice(config: GemmConfig, num_tokens: int, num_rows: int) -> LinearChoice:
    """Cuts tokens into even tiles of at most the kernel's size, and returns them with the grid that runs them."""
    n_tiles = -(-num_tokens // config.n_sizes[-1])
    rows_per_tile = -(-num_tokens // (n_tiles * 8)) * 8
    tiles = num_rows // (BLOCK_ROWS * config.m64_per_tile) * -(-num_tokens // rows_per_tile)
    if config.reduces:
        return LinearChoice(config, rows_per_tile, tiles * config.cluster_k)
    resident = SMS * config.per_sm
    return LinearChoice(config, rows_per_tile, min(tiles, resident) // config.cluster_m * config.cluster_m)
