"""Chooses the FP8 kernel for a weight and token count: from a tuned table, or by arithmetic where it has no entry.

``ownpath bench --tune fp8`` writes ``tuned/fp8.json``; nothing is measured while serving. An entry for W8A16 holds for
its token count and fewer, down to the entry before. One for W8A8 holds only for the number of 64-token blocks that it
was measured with, because each further block changes how well tiles fill the device. Entries are measured with scales
that fold and rows that 4 divides, and serve only such weights.
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

from ownpath.kernels.fp8.config import (
    CTA_SMEM,
    MAX_K_BLOCKS,
    TOKEN_TILES,
    QuantizeConfig,
    W8A8Config,
    W8A16Config,
    w8a8_stages,
    w8a16_stages_of,
)

TABLE = Path(__file__).parent / "tuned" / "fp8.json"
WGMMA_FROM = 32
"""Tokens of a tile from which ``wgmma`` beats ``mma``, whose cost grows with them."""
CLUSTERS = {1: 132, 2: 66, 4: 30, 8: 15}
"""Cluster size -> clusters that an H200 runs at once with one CTA per SM, as its driver reports."""
WAVE_BLOCKS = 12
"""Fixed cost of a wave of CTAs, about 3 us, in blocks of 8 KiB per CTA."""
W8A8_SHAPES = ((2, 2, 1), (3, 1, 1), (2, 1, 1), (2, 1, 2), (2, 1, 4))
"""Warpgroups, 64-token blocks of each, and CTAs that split K, that the rule chooses from."""
QUANTIZE_PER_SM = 8
"""CTAs of the quantiser that fit an SM: 256 threads of 32 registers, with one block each."""
SUM_STEPS = 8
"""Fixed cost of adding sums over a cluster, about 2 us, in tensor-core steps of 64 tokens by 128 features by 128."""
W8A16_KNOBS = frozenset({"num_m64", "num_n", "cluster_k", "per_sm", "consumers", "wgmma"})
W8A8_KNOBS = frozenset({"warpgroups", "num_m64", "cluster_n", "cluster_k", "num_stages"})

WeightKey = tuple[int, int, bool, bool]
"""The properties of a weight that decide its kernels: row blocks, K blocks, folded, ragged."""
Tuned = tuple[tuple[int, W8A16Config | W8A8Config], ...]
"""(tokens it was measured with, kernel), ascending."""


@lru_cache(maxsize=4096)
def w8a16_config(num_tokens: int, key: WeightKey, sms: int, is_batch_invariant: bool = False) -> W8A16Config:
    """Chooses the kernel shape for a token count and a weight: the table's, or the rule's.

    is_batch_invariant: always the same instructions in the same order for a row, whatever the number of rows.
    Errors: ValueError naming an entry of the table that is not a valid kernel.
    """
    if not is_batch_invariant:
        for limit, config in tuned(key):
            if isinstance(config, W8A16Config) and num_tokens <= limit:
                return config
    sizes = TOKEN_TILES[:3] if is_batch_invariant else TOKEN_TILES
    num_n = next((size for size in sizes if num_tokens <= size), sizes[-1])
    return w8a16_shape(num_n, key, sms, wgmma=num_n >= WGMMA_FROM and not is_batch_invariant)


def w8a16_shape(num_n: int, key: WeightKey, sms: int, wgmma: bool) -> W8A16Config:
    """Chooses rows per CTA and CTAs per cluster along K so that the busiest SM's share of the weight is smallest.

    Ties go to more rows per CTA (tokens are fetched less often), then to fewer CTAs per cluster (fewer sums to add).
    """
    num_row_blocks, num_k_blocks, folded, ragged = key
    best = (1 << 62, 0, 0)
    # The sums of two row blocks by 128 tokens fill the registers, twice where each block of K is scaled apart.
    for num_m64 in (4, 2) if num_n < 128 or folded else (2,):
        for cluster_k, clusters in CLUSTERS.items():
            per_cta = -(-num_k_blocks // cluster_k)
            if per_cta > MAX_K_BLOCKS or cluster_k > num_k_blocks:
                continue
            groups = -(-num_row_blocks // num_m64)
            waves = -(-groups // max(1, clusters * sms // 132))
            best = min(best, (waves * (per_cta * num_m64 + WAVE_BLOCKS), -num_m64, cluster_k))
    num_m64, cluster_k = -best[1], best[2]
    stages = w8a16_stages_of(num_m64, num_n, cluster_k, per_sm=1, consumers=2)
    return W8A16Config(num_m64, num_n, stages, cluster_k, folded, ragged, wgmma=wgmma)


@lru_cache(maxsize=4096)
def w8a8_config(num_tokens: int, key: WeightKey, sms: int) -> W8A8Config:
    """Chooses the table's kernel shape, or the one with the fewest tensor-core steps on the busiest SM.

    Errors: ValueError naming an entry of the table that is not a valid kernel.
    """
    for limit, config in tuned(key):
        if isinstance(config, W8A8Config) and -(-num_tokens // 64) == -(-limit // 64):
            return config
    shapes = (w8a8_shape(*shape, key[3]) for shape in W8A8_SHAPES)
    return min(shapes, key=lambda config: _w8a8_steps(config, num_tokens, key, sms))


def quantize_config(
    product: W8A8Config, num_tokens: int, key: WeightKey, sms: int, power_of_two: bool
) -> QuantizeConfig:
    """Chooses the quantiser in front of a product: two blocks a CTA where that brings its CTAs to one for each place.

    The product's CTAs may start when all of the quantiser's have. Two blocks are slower alone. Where the product before
    fills the device, the few SMs that it leaves first would get most of the quantiser's CTAs: those are spread.
    """
    num_row_blocks, num_k_blocks, _, _ = key
    one, two, spread = quantize_configs(power_of_two)
    places = QUANTIZE_PER_SM * sms
    is_full = product.grid(num_tokens, num_row_blocks, sms) > sms * 9 // 10
    if is_full and prod(one.grid(num_tokens, num_k_blocks)) <= 2 * sms:
        return spread
    is_two = prod(two.grid(num_tokens, num_k_blocks)) <= places < prod(one.grid(num_tokens, num_k_blocks))
    return two if is_two else one


def quantize_configs(power_of_two: bool) -> tuple[QuantizeConfig, QuantizeConfig, QuantizeConfig]:
    """Returns every result of ``quantize_config``: one block a CTA, two, and one spread."""
    return QuantizeConfig(power_of_two), QuantizeConfig(power_of_two, 2), QuantizeConfig(power_of_two, is_spread=True)


def _w8a8_steps(config: W8A8Config, num_tokens: int, key: WeightKey, sms: int) -> int:
    """Counts the tensor-core steps of the busiest SM; no step for a shape that splits K into more than there is."""
    num_row_blocks, num_k_blocks, _, _ = key
    if config.cluster_k > num_k_blocks:
        return 1 << 62
    clusters = max(1, CLUSTERS[config.cluster_k] * sms // 132)
    waves = -(-config.num_tiles(num_tokens, num_row_blocks) // clusters)
    fixed = SUM_STEPS if config.cluster_k > 1 else 0
    return waves * (config.m64_per_tile * -(-num_k_blocks // config.cluster_k) + fixed)


def w8a8_shape(warpgroups: int, num_m64: int, cluster_k: int, ragged: bool) -> W8A8Config:
    """Returns the kernel with tiles of 64 * warpgroups * num_m64 tokens and as many stages as fit."""
    return W8A8Config(warpgroups, num_m64, w8a8_stages(warpgroups, num_m64, cluster_k), 1, cluster_k, ragged)


def w8a16_configs(key: WeightKey, sms: int, prefill_from: int | None, is_batch_invariant: bool) -> list[W8A16Config]:
    """Returns every result of ``w8a16_config`` for fewer than ``prefill_from`` tokens (``None``: for any number)."""
    limits = [limit for limit, config in tuned(key) if isinstance(config, W8A16Config)]
    # A choice holds up to a limit or a tile's tokens; larger counts have a choice of their own.
    ends = sorted({*TOKEN_TILES, *limits})
    counts = [*ends, ends[-1] + 1]
    if prefill_from is not None:
        counts = [count for count in ends if count < prefill_from] + [prefill_from - 1]
    return [w8a16_config(count, key, sms, is_batch_invariant) for count in counts]


def w8a8_configs(key: WeightKey) -> list[W8A8Config]:
    """Returns every result of ``w8a8_config`` for any number of tokens."""
    own = [config for _, config in tuned(key) if isinstance(config, W8A8Config)]
    return [w8a8_shape(*shape, key[3]) for shape in W8A8_SHAPES] + own


def tuned(key: WeightKey) -> Tuned:
    """Returns the table's entries for a weight; without any, the W8A16 entries of a matrix as wide with fewer rows.

    Down to half as many: a CTA's share is the same, and more rows are more CTAs. Joined products have such weights.
    """
    num_row_blocks, num_k_blocks, folded, ragged = key
    if not folded or ragged:
        return ()
    table = fp8_table()
    if (num_row_blocks, num_k_blocks) in table:
        return table[num_row_blocks, num_k_blocks]
    fewer = [rows for rows, width in table if width == num_k_blocks and num_row_blocks // 2 < rows < num_row_blocks]
    entries = table[max(fewer), num_k_blocks] if fewer else ()
    return tuple(entry for entry in entries if isinstance(entry[1], W8A16Config))


@lru_cache(maxsize=1)
def fp8_table() -> Mapping[tuple[int, int], Tuned]:
    """Reads the table: (row blocks, K blocks) -> entries. Errors: ValueError naming an entry that is not valid."""
    return read_table(json.loads(TABLE.read_text(encoding="utf-8"))["entries"])


def read_table(entries: Mapping[str, Mapping[str, Any]]) -> dict[tuple[int, int], Tuned]:
    """Parses the file's entries, ``tokens=T,rows=N,cols=K`` -> {"config": knobs}, into ``fp8_table``'s form."""
    found: dict[tuple[int, int], list[tuple[int, W8A16Config | W8A8Config]]] = {}
    for case, entry in entries.items():
        tokens, rows, cols = (int(part.split("=")[1]) for part in case.split(","))
        num_k_blocks = -(-cols // 128)
        try:
            config = knobs_config(entry["config"], num_k_blocks)
        except ValueError as failure:
            raise ValueError(f"tuned/{TABLE.name}, {case}: {failure}") from failure
        found.setdefault((2 * -(-rows // 128), num_k_blocks), []).append((tokens, config))
    return {matrix: tuple(sorted(tried, key=lambda entry: entry[0])) for matrix, tried in found.items()}


def knobs_config(knobs: Mapping[str, Any], num_k_blocks: int) -> W8A16Config | W8A8Config:
    """Makes a kernel from a table's knobs, for scales that fold and rows that 4 divides.

    W8A16: num_m64, num_n, cluster_k, per_sm, consumers, wgmma; as many stages as fit. W8A8: warpgroups, num_m64,
    cluster_n, cluster_k, num_stages. Errors: ValueError for knobs that are no valid kernel for this number of K blocks.
    """
    names = W8A16_KNOBS if "num_n" in knobs else W8A8_KNOBS
    if set(knobs) != names:
        raise ValueError(f"knobs {', '.join(sorted(knobs))} instead of {', '.join(sorted(names))}")
    cluster_k, most = knobs["cluster_k"], MAX_K_BLOCKS if "num_n" in knobs else num_k_blocks
    if not num_k_blocks / most <= cluster_k <= num_k_blocks:
        raise ValueError(f"cluster_k={cluster_k} does not share {num_k_blocks} blocks of K, {most} each at most")
    if "num_n" not in knobs:
        return W8A8Config(**knobs)
    if knobs["per_sm"] not in CTA_SMEM:
        raise ValueError(f"per_sm={knobs['per_sm']}: 1 to {max(CTA_SMEM)} CTAs")
    shape = (knobs[name] for name in ("num_m64", "num_n", "cluster_k", "per_sm", "consumers"))
    stages = w8a16_stages_of(*shape)
    return W8A16Config(num_stages=stages, folded=True, **knobs)
