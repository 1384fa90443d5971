"""What the W8A8 products share: a CTA's tiles, its weights, the promotion of sums and the way out.

How it works. A tile is 64 * ``m64_per_tile`` tokens by 64 * ``num_n64`` features. Weights come as blocks of 64 features x
128 of K, a scale to a block. The sums of 128 of K, from the tensor cores, enter float32 totals times token scale x
weight scale. Where a cluster's CTAs split K, each puts its totals into its shared memory and adds a share of everyone's,
in the order of K. The row order of the packed weights gives each thread four neighbouring features, so results leave as
8-byte stores without a trip through shared memory.

Roofline and limits: those of the products, ``w8a8_sm90`` and ``w8a8_joint_sm90``.
"""

from dataclasses import dataclass

import cutlass
from cutlass import BFloat16, Float32, Int32, Int64, cute

from ownpath.kernels.dsl import ptx
from ownpath.kernels.dsl.pipeline import Stages
from ownpath.kernels.dsl.warpgroup import Thread
from ownpath.kernels.fp8 import ptx as fp8_ptx
from ownpath.kernels.fp8.config import ENTRY_BYTES, WG, W8A8Config
from ownpath.kernels.fp8.joint_config import JointW8A8Config
from ownpath.kernels.fp8.layout import BLOCK_BYTES
from ownpath.kernels.fp8.output_sm90 import Output, RowBlock, cluster_sum

Scales = tuple[Float32, ...]


@dataclass(frozen=True)
class CtaTiles:
    """A cluster's share of the output: every ``num_workers``-th tile. rank: of the CTA among those that share
    activations. k_rank: among those that split K, of which this one has ``k_iters`` blocks from ``k_start`` on. In a
    cluster those that share activations follow each other."""

    cfg: W8A8Config | JointW8A8Config
    rank: Int32
    worker: Int32
    num_workers: Int32
    num_tiles: Int32
    num_m_tiles: Int32
    num_k_blocks: Int32
    k_rank: Int32
    k_start: Int32
    k_iters: Int32

    def m64(self, tile: Int32) -> Int32:
        """Returns the first of a tile's blocks of 64 tokens."""
        return tile % self.num_m_tiles * self.cfg.m64_per_tile

    def row_block(self, tile: Int32) -> Int32:
        """Returns the first of this CTA's blocks of 64 features in a tile."""
        return (tile // self.num_m_tiles * self.cfg.cluster_n + self.rank) * self.cfg.num_n64


class W8A8Tiles:
    """The parts of a W8A8 product that do not depend on where its activations come from."""

    def __init__(self, config: W8A8Config | JointW8A8Config) -> None:
        self.cfg = config

    @cute.jit
    def tiles(self, cta: Int32, grid: Int32, num_tokens: Int32, num_row_blocks: Int32, num_k_blocks: Int32) -> CtaTiles:
        """Returns a CTA's tiles and its share of K."""
        cfg = self.cfg
        num_m_tiles = (num_tokens + cfg.m64_per_tile * 64 - 1) // (cfg.m64_per_tile * 64)
        num_n64 = cfg.num_n64 * cfg.cluster_n
        num_n_tiles = (num_row_blocks + num_n64 - 1) // num_n64
        k_rank = cta % cfg.cluster // cfg.cluster_n
        share, rest = num_k_blocks // cfg.cluster_k, num_k_blocks % cfg.cluster_k
        k_iters = share
        if k_rank < rest:
            k_iters = share + 1
        return CtaTiles(
            cfg, cta % cfg.cluster_n, cta // cfg.cluster, grid // cfg.cluster, num_m_tiles * num_n_tiles,
            num_m_tiles, num_k_blocks, k_rank, k_rank * share + cutlass.min(k_rank, rest), k_iters,
        )  # fmt: skip

    @cute.jit
    def load_weights(
        self, blocks: cute.Pointer, scales: cute.Pointer, stages: Stages, tiles: CtaTiles, num_row_blocks: Int32
    ) -> None:
        """Loads every stage's weights for this CTA without waiting: no earlier kernel writes them. One thread."""
        ring = stages.pipeline.producer()
        for tile in cutlass.range(tiles.worker, tiles.num_tiles, tiles.num_workers, unroll=1):
            row_block = tiles.row_block(tile)
            for step in cutlass.range(tiles.k_iters, unroll=1):
                k = tiles.k_start + step
                ring.acquire()
                ring.commit(self.cfg.num_n64 * (BLOCK_BYTES + ENTRY_BYTES))
                for n64 in cutlass.range_constexpr(self.cfg.num_n64):
                    idx = Int64(cutlass.min(row_block + n64, num_row_blocks - 1)) * tiles.num_k_blocks + k
                    place = ring.slot * self.cfg.num_n64 + n64
                    for target, source, size in (
                        (stages.weights, blocks, BLOCK_BYTES),
                        (stages.scales, scales, ENTRY_BYTES),
                    ):
                        ptx.load_bulk((target + place * size).toint(), (source + idx * size).toint(), size, ring.full)
                ring.advance()

    def weight_scales(self, stages: Stages, slot: Int32) -> Scales:
        """Loads the scales of the tile's blocks of 64 features."""
        base = stages.scales.toint() + slot * (self.cfg.num_n64 * ENTRY_BYTES) + 8
        return tuple(fp8_ptx.load_shared_float(base + n64 * ENTRY_BYTES) for n64 in range(self.cfg.num_n64))

    def promote(
        self,
        total: cute.Tensor,
        sums: cute.Tensor,
        token_scales: Scales,
        weight_scales: Scales,
    ) -> None:
        """Adds sums * (token scale * weight scale) to total; the scales' product is rounded to float32 first."""
        for n64, weight_scale in enumerate(weight_scales):
            factors = [scale * weight_scale for scale in token_scales]
            for j in range(8):
                for idx in range(4):
                    at = 4 * (8 * n64 + j) + idx
                    total[at] = total[at] + factors[idx // 2] * sums[at]

    def sums_address(self, stages: Stages, thread: Thread, r: int) -> Int32:
        """Returns where this thread's sums of one of its 64-token blocks lie, in the activations' stages."""
        return (
            stages.tokens.toint() + ((thread.wg_m * self.cfg.num_m64 + r) * 8 * self.cfg.num_n64 * WG + thread.idx) * 16
        )

    @cute.jit
    def share_sums(self, totals: list[cute.Tensor], stages: Stages, thread: Thread) -> None:
        """Puts the sums where the cluster's CTAs read them, in groups of four."""
        ptx.named_barrier(1, self.cfg.warpgroups * WG)  # every stage is read before sums overwrite the ring
        for r in cutlass.range_constexpr(self.cfg.num_m64):
            base = self.sums_address(stages, thread, r)
            for j in cutlass.range_constexpr(8 * self.cfg.num_n64):
                values = tuple(totals[r][4 * j + idx] for idx in range(4))
                ptx.store_shared_vec4(base + j * (WG * 16), values)
        ptx.cluster_barrier()

    def added_sums(self, tiles: CtaTiles, stages: Stages, thread: Thread, r: int, j: int) -> list[Float32]:
        """Adds up eight sums of one of this thread's 64-token blocks over the cluster."""
        base = self.sums_address(stages, thread, r) + j * (WG * 16)
        peers = [tiles.rank + self.cfg.cluster_n * peer for peer in range(self.cfg.cluster_k)]
        return cluster_sum(base, peers) + cluster_sum(base + WG * 16, peers)

    @cute.jit
    def write(
        self,
        totals: list[cute.Tensor],
        tile: Int32,
        tiles: CtaTiles,
        stages: Stages,
        output: Output,
        thread: Thread,
    ) -> None:
        """Writes a warpgroup's part of a tile, 16 features of 64 tokens at a time; of a split K, this CTA's share."""
        cfg = self.cfg
        m64 = tiles.m64(tile) + thread.wg_m * cfg.num_m64
        row_block = tiles.row_block(tile)
        for n64 in cutlass.range_constexpr(cfg.num_n64):
            rows = output.rows(row_block + n64)
            for r in cutlass.range_constexpr(cfg.num_m64):
                for group in cutlass.range_constexpr(4):
                    j = 8 * n64 + 2 * group
                    if cutlass.const_expr(cfg.cluster_k == 1):
                        sums = [totals[r][4 * j + idx] for idx in range(8)]
                        self.store(sums, group, rows, (m64 + r) * 64, thread, output)
                    else:
                        if tiles.k_rank == (4 * (cfg.num_n64 * r + n64) + group) % cfg.cluster_k:
                            added = self.added_sums(
                                tiles, stages, thread, r, j
                            )  # 4.6.0 refuses the other branch's name
                            self.store(added, group, rows, (m64 + r) * 64, thread, output)

    @cute.jit
    def store(
        self, sums: list[Float32], group: int, rows: RowBlock, token0: Int32, thread: Thread, output: Output
    ) -> None:
        """Writes 16 features of 64 tokens: features 4q .. 4q + 3, for tokens g and g + 8 of a warp."""
        token = token0 + thread.warp * 16 + thread.row
        feature = 16 * group + 4 * thread.pair
        for lower in cutlass.range_constexpr(2):
            mine = token + 8 * lower
            if mine < output.num_tokens and feature < rows.num_valid:
                line = output.out + (Int64(mine) * output.ld_out + rows.first)
                values = [sums[2 * lower + idx] for idx in (0, 4, 1, 5)]
                if cutlass.const_expr(self.cfg.ragged):
                    for idx in cutlass.range_constexpr(4):
                        if feature + idx < rows.num_valid:
                            cute.make_tensor(line + (feature + idx), cute.make_layout(1))[0] = BFloat16(values[idx])
                else:
                    fp8_ptx.store_global8(
                        line + feature, ptx.pack_bf16x2(values[0], values[1]), ptx.pack_bf16x2(values[2], values[3])
                    )
