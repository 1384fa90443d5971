"""W8A8 on Hopper: E4M3 block weights times E4M3 activations with a scale per 1 x 128, for prefill.

How it works. A tile is ``64 * warpgroups * num_m64`` tokens by 128 features. Two producer threads fill a ring of
shared-memory stages (128 of K each) with plain bulk copies, because both operands already have the layout that
``wgmma`` reads (``kernels.fp8.layout``, ``quantize_sm90``): no tensor maps, no address arithmetic. The producer of
weights starts while the quantiser still runs. Consumer warpgroups multiply a stage from shared memory into a temporary
accumulator, then add it to the float32 total times token scale x weight scale: the promotion per 128 of K that the
published numerics require (FP8 ``wgmma`` keeps about 14 bits while
it sums). While one warpgroup promotes, the others keep the tensor cores busy. CTAs are persistent: the ring is filled
for the next tile while the last one is written. (With ``cluster_n`` 2, two CTAs with neighbouring features fetch half
of every activation block for both; on an H200 this gained nothing, so it is not chosen.)

Why it is fast. Per 128 of K a 256 x 128 tile reads 48 KiB from L2 for 1024 tensor cycles, with 128 multiply-adds per
thread for the promotion, hidden behind the other warpgroup's products. The row order of the packed weights gives each
thread four neighbouring features, so results leave as 8-byte stores without a trip through shared memory.

Roofline. 1979 TFLOP/s on paper; 1222 measured. Limits: sm_90a; the activation blocks of
``quantize_sm90``; the sum inside 128 of K has the tensor core's precision, not float32's.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
from cutlass import BFloat16, Float8E4M3FN, Float32, Int32, Int64, Uint8, cute
from cutlass.cute.nvgpu import warpgroup
from cutlass.utils.hopper_helpers import make_trivial_tiled_mma

from ownpath.kernels.dsl import ptx
from ownpath.kernels.dsl.pipeline import Pipeline, Stages
from ownpath.kernels.dsl.warpgroup import Thread, shared_operand, wgmma
from ownpath.kernels.fp8 import ptx as fp8_ptx
from ownpath.kernels.fp8.config import ACT_STRIDE, ENTRY_BYTES, W8A8_REGISTERS, WG, W8A8Config
from ownpath.kernels.fp8.layout import ACT_BLOCK_BYTES, BLOCK_BYTES
from ownpath.kernels.fp8.output_sm90 import ClusterSums, Output, RowBlock

TILE_N = 128
Scales = tuple[Float32, Float32]


@dataclass(frozen=True)
class CtaTiles:
    """A cluster's share of the output: every ``num_workers``-th tile. rank: of the CTA among those that share
    activations. k_rank: among those that split K, of which this one has ``k_iters`` blocks from ``k_start`` on."""

    cfg: W8A8Config
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
        """Returns the first of this CTA's two blocks of 64 features in a tile."""
        return (tile // self.num_m_tiles * self.cfg.cluster_n + self.rank) * 2


class W8A8:
    """Builds the kernel of one ``W8A8Config``."""

    def __init__(self, config: W8A8Config) -> None:
        self.cfg = config

    @cute.jit
    def __call__(
        self,
        acts: cute.Pointer,
        blocks: cute.Pointer,
        scales: cute.Pointer,
        row_table: cute.Pointer,
        out: cute.Pointer,
        num_tokens: Int32,
        ld_out: Int32,
        num_row_blocks: Int32,
        num_k_blocks: Int32,
        grid: Int32,
    ) -> None:
        """Host side, used to compile only."""
        self.kernel(acts, blocks, scales, row_table, out, num_tokens, ld_out, num_row_blocks, num_k_blocks).launch(
            grid=[grid, 1, 1],
            block=[self.cfg.num_threads, 1, 1],
            cluster=[self.cfg.cluster, 1, 1],
            min_blocks_per_mp=1,
        )

    @cute.kernel
    def kernel(
        self,
        acts: cute.Pointer,
        blocks: cute.Pointer,
        scales: cute.Pointer,
        row_table: cute.Pointer,
        out: cute.Pointer,
        num_tokens: Int32,
        ld_out: Int32,
        num_row_blocks: Int32,
        num_k_blocks: Int32,
    ) -> None:
        """Sets the ring up, then loads or multiplies, by warpgroup."""
        cfg = self.cfg
        thread, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        grid, _, _ = cute.arch.grid_dim()
        warp_group = cute.arch.make_warp_uniform(thread // WG)
        stages = self.allocate()
        inbox = self.open_inbox(stages, thread, cta)
        if thread == 0:
            stages.pipeline.init(2, 4 * cfg.warpgroups)
        cute.arch.sync_threads()
        if cutlass.const_expr(cfg.cluster_n > 1):
            ptx.cluster_barrier()
        if cutlass.const_expr(cfg.cluster_k > 1):
            fp8_ptx.cluster_arrive()
        tiles = self.tiles(cta, grid, num_tokens, num_row_blocks, num_k_blocks)
        if warp_group == cfg.warpgroups:
            cute.arch.setmaxregister_decrease(24)
            if thread == cfg.warpgroups * WG:
                self.load_acts(acts, stages, tiles, num_tokens)
            if thread == cfg.warpgroups * WG + 32:
                self.load_weights(blocks, scales, stages, tiles, num_row_blocks)
        else:
            cute.arch.setmaxregister_increase(W8A8_REGISTERS[cfg.warpgroups])
            output = Output(out, row_table, num_tokens, ld_out, num_row_blocks)
            self.consume(tiles, stages, output, Thread(thread % WG, warp_group), inbox)

    def allocate(self) -> Stages:
        """Allocates all of a CTA's shared memory."""
        cfg = self.cfg
        acts = cute.arch.alloc_smem(Uint8, cfg.num_stages * cfg.m64_per_tile * ACT_STRIDE, 1024)
        weights = cute.arch.alloc_smem(Uint8, cfg.num_stages * 2 * BLOCK_BYTES, 1024)
        scales = cute.arch.alloc_smem(Uint8, cfg.num_stages * 2 * ENTRY_BYTES, 16)
        return Stages(acts, weights, scales, Pipeline.allocate(cfg.num_stages, cfg.cluster_n))

    @cute.jit
    def open_inbox(self, stages: Stages, thread: Int32, cta: Int32) -> ClusterSums:
        """Makes the place where the cluster's other CTAs put sums."""
        cfg = self.cfg
        inbox = ClusterSums(cfg.shares, stages.tokens, stages.pipeline.full)
        if cutlass.const_expr(cfg.cluster_k > 1):
            sums = cute.arch.alloc_smem(Uint8, cfg.shares.num_bytes, 128)
            inbox = ClusterSums(cfg.shares, sums, cute.arch.alloc_smem(Int64, 1, 8))
            inbox.open(thread, cta)
        return inbox

    @cute.jit
    def tiles(self, cta: Int32, grid: Int32, num_tokens: Int32, num_row_blocks: Int32, num_k_blocks: Int32) -> CtaTiles:
        """Returns a CTA's tiles and its share of K."""
        cfg = self.cfg
        num_m_tiles = (num_tokens + cfg.m64_per_tile * 64 - 1) // (cfg.m64_per_tile * 64)
        num_n_tiles = (num_row_blocks + 2 * cfg.cluster_n - 1) // (2 * cfg.cluster_n)
        k_rank = cta % cfg.cluster_k
        share, rest = num_k_blocks // cfg.cluster_k, num_k_blocks % cfg.cluster_k
        k_iters = share
        if k_rank < rest:
            k_iters = share + 1
        return CtaTiles(
            cfg, cta % cfg.cluster_n, cta // cfg.cluster, grid // cfg.cluster, num_m_tiles * num_n_tiles,
            num_m_tiles, num_k_blocks, k_rank, k_rank * share + cutlass.min(k_rank, rest), k_iters,
        )  # fmt: skip

    @cute.jit
    def load_acts(self, acts: cute.Pointer, stages: Stages, tiles: CtaTiles, num_tokens: Int32) -> None:
        """Loads this CTA's share of the cluster's activations, once the quantiser has written them. One thread."""
        cfg = self.cfg
        part = ACT_BLOCK_BYTES // cfg.cluster_n
        peers = (1 << cfg.cluster_n) - 1 if cfg.cluster_n > 1 else 0
        last_m64 = (num_tokens + 63) // 64 - 1
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        ring = stages.pipeline.producer()
        for tile in cutlass.range(tiles.worker, tiles.num_tiles, tiles.num_workers, unroll=1):
            first = tiles.m64(tile)
            for step in cutlass.range(tiles.k_iters, unroll=1):
                k = tiles.k_start + step
                ring.acquire()
                ring.commit(cfg.m64_per_tile * ACT_BLOCK_BYTES)
                for r in cutlass.range_constexpr(cfg.m64_per_tile):
                    m64 = cutlass.min(first + r, last_m64)
                    target = stages.tokens + ((ring.slot * cfg.m64_per_tile + r) * ACT_STRIDE + tiles.rank * part)
                    source = acts + ((Int64(m64) * tiles.num_k_blocks + k) * ACT_BLOCK_BYTES + tiles.rank * part)
                    ptx.load_bulk(target.toint(), source.toint(), part, ring.full, peers=peers)
                ring.advance()

    @cute.jit
    def load_weights(
        self, blocks: cute.Pointer, scales: cute.Pointer, stages: Stages, tiles: CtaTiles, num_row_blocks: Int32
    ) -> None:
        """Loads every stage's weights for this CTA without waiting: no earlier kernel writes them. One thread."""
        ring = stages.pipeline.producer()
        for tile in cutlass.range(tiles.worker, tiles.num_tiles, tiles.num_workers, unroll=1):
            row_block = cutlass.min(tiles.row_block(tile), num_row_blocks - 2)
            for step in cutlass.range(tiles.k_iters, unroll=1):
                k = tiles.k_start + step
                ring.acquire()
                ring.commit(2 * (BLOCK_BYTES + ENTRY_BYTES))
                for half in cutlass.range_constexpr(2):
                    idx = Int64(row_block + half) * tiles.num_k_blocks + k
                    place = ring.slot * 2 + half
                    for target, source, size in (
                        (stages.weights, blocks, BLOCK_BYTES),
                        (stages.scales, scales, ENTRY_BYTES),
                    ):
                        ptx.load_bulk((target + place * size).toint(), (source + idx * size).toint(), size, ring.full)
                ring.advance()

    @cute.jit
    def consume(self, tiles: CtaTiles, stages: Stages, output: Output, thread: Thread, inbox: ClusterSums) -> None:
        """Computes a warpgroup's 64-token blocks of every tile."""
        cfg = self.cfg
        mma = make_trivial_tiled_mma(
            Float8E4M3FN, Float8E4M3FN, cute.nvgpu.OperandMajorMode.K, cute.nvgpu.OperandMajorMode.K, Float32,
            (1, 1, 1), (64, TILE_N),
        )  # fmt: skip
        thr_mma = mma.get_slice(thread.idx)
        acts = shared_operand(stages.tokens, Float8E4M3FN, 64, cfg.num_stages * cfg.m64_per_tile, ACT_STRIDE)
        weights = shared_operand(stages.weights, Float8E4M3FN, TILE_N, cfg.num_stages, 2 * BLOCK_BYTES)
        a = thr_mma.make_fragment_A(thr_mma.partition_A(acts))
        b = thr_mma.make_fragment_B(thr_mma.partition_B(weights))
        acc_shape = thr_mma.partition_shape_C((64, TILE_N))
        totals = [cute.make_rmem_tensor(acc_shape, Float32) for _ in range(cfg.num_m64)]
        sums = cute.make_rmem_tensor(acc_shape, Float32)
        ring = stages.pipeline.consumer()
        for tile in cutlass.range(tiles.worker, tiles.num_tiles, tiles.num_workers, unroll=1):
            for total in totals:
                total.fill(0.0)
            for _ in cutlass.range(tiles.k_iters, unroll=1):
                ring.wait()
                weight_scales = self.weight_scales(stages, ring.slot)
                for r in cutlass.range_constexpr(cfg.num_m64):
                    chunk = ring.slot * cfg.m64_per_tile + thread.wg_m * cfg.num_m64 + r
                    token_scales = self.token_scales(stages, chunk, thread)
                    warpgroup.fence()
                    for k32 in cutlass.range_constexpr(4):
                        wgmma(mma, a[None, None, k32, chunk], b[None, None, k32, ring.slot], sums, k32 > 0)
                    warpgroup.commit_group()
                    warpgroup.wait_group(0)
                    if cutlass.const_expr(r == cfg.num_m64 - 1):
                        ring.release(ring.slot, thread.idx)
                    self.promote(totals[r], sums, token_scales, weight_scales)
                ring.advance()
            if cutlass.const_expr(cfg.cluster_k > 1):
                self.share_sums(totals, tiles, thread, inbox)
            self.write(totals, tile, tiles, output, thread, inbox)
        if cutlass.const_expr(cfg.cluster_n > 1):
            # The peer may still arrive at this CTA's barriers. (Its loading warps have left by now: a cluster barrier
            # waits for threads that have not exited.)
            ptx.cluster_barrier(relaxed=True)

    def weight_scales(self, stages: Stages, slot: Int32) -> Scales:
        """Loads the scales of the tile's two 64-feature blocks."""
        base = stages.scales.toint() + slot * (2 * ENTRY_BYTES) + 8
        return fp8_ptx.load_shared_float(base), fp8_ptx.load_shared_float(base + ENTRY_BYTES)

    def token_scales(self, stages: Stages, chunk: Int32, thread: Thread) -> Scales:
        """Loads the scales of this thread's tokens g and g + 8."""
        row = thread.warp * 16 + thread.row
        base = stages.tokens.toint() + chunk * ACT_STRIDE + BLOCK_BYTES + row * 4
        return fp8_ptx.load_shared_float(base), fp8_ptx.load_shared_float(base + 32)

    def promote(
        self,
        total: cute.Tensor,
        sums: cute.Tensor,
        token_scales: Scales,
        weight_scales: Scales,
    ) -> None:
        """Adds sums * (token scale * weight scale) to total; the scales' product is rounded to float32 first."""
        for half in range(2):
            factors = [scale * weight_scales[half] for scale in token_scales]
            for j in range(8):
                for idx in range(4):
                    at = 4 * (8 * half + j) + idx
                    total[at] = total[at] + factors[idx // 2] * sums[at]

    @cute.jit
    def share_sums(self, totals: list[cute.Tensor], tiles: CtaTiles, thread: Thread, inbox: ClusterSums) -> None:
        """Sends the cluster's other CTAs their sums, and waits for this one's. A cluster has one tile."""
        fp8_ptx.cluster_wait()
        for part in cutlass.range_constexpr(self.cfg.shares.num_parts):
            values = tuple(totals[part // 16][4 * (part % 16) + idx] for idx in range(4))
            inbox.send(part, values, tiles.k_rank, thread.wg_m * WG + thread.idx)
        inbox.wait()

    def added_sums(self, totals: list[cute.Tensor], thread: Thread, inbox: ClusterSums, part: int) -> list[Float32]:
        """Adds up eight sums of one of this thread's 64-token blocks over the cluster."""
        found: list[Float32] = []
        for at in (part, part + 1):
            own = [totals[at // 16][4 * (at % 16) + idx] for idx in range(4)]
            found += inbox.add(at, own, thread.wg_m * WG + thread.idx)
        return found

    @cute.jit
    def write(
        self,
        totals: list[cute.Tensor],
        tile: Int32,
        tiles: CtaTiles,
        output: Output,
        thread: Thread,
        inbox: ClusterSums,
    ) -> None:
        """Writes a warpgroup's part of a tile, 16 features of 64 tokens at a time; of a split K, this CTA's share."""
        cfg = self.cfg
        m64 = tiles.m64(tile) + thread.wg_m * cfg.num_m64
        row_block = tiles.row_block(tile)
        for half in cutlass.range_constexpr(2):
            rows = output.rows(row_block + half)
            for r in cutlass.range_constexpr(cfg.num_m64):
                for group in cutlass.range_constexpr(4):
                    j = 8 * half + 2 * group
                    if cutlass.const_expr(cfg.cluster_k == 1):
                        sums = [totals[r][4 * j + idx] for idx in range(8)]
                        self.store(sums, group, rows, (m64 + r) * 64, thread, output)
                    else:
                        if tiles.k_rank == cfg.shares.owner(16 * r + j):
                            # No name of the other branch: 4.6.0 refuses.
                            added = self.added_sums(totals, thread, inbox, 16 * r + j)
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


def compile_w8a8(config: W8A8Config) -> Any:
    """Compiles for sm_90a; no GPU is needed."""
    ptr = cute.runtime.make_ptr
    space = cute.AddressSpace.gmem
    one = Int32(1)
    return cute.compile(
        W8A8(config),
        ptr(Uint8, 1024, space, assumed_align=128),
        ptr(Uint8, 1024, space, assumed_align=128),
        ptr(Uint8, 1024, space, assumed_align=16),
        ptr(Int32, 1024, space, assumed_align=8),
        ptr(BFloat16, 1024, space, assumed_align=2 if config.ragged else 8),
        one, Int32(64), Int32(2), one, Int32(config.cluster),
    )  # fmt: skip
