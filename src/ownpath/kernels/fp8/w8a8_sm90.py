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
from ownpath.kernels.fp8.output_sm90 import Output
from ownpath.kernels.fp8.w8a8_tiles_sm90 import CtaTiles, Scales, W8A8Tiles


class W8A8(W8A8Tiles):
    """Builds the kernel of one ``W8A8Config``."""

    cfg: W8A8Config

    def __init__(self, config: W8A8Config) -> None:
        super().__init__(config)

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
            min_blocks_per_mp=self.cfg.per_sm,
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
        if thread == 0:
            stages.pipeline.init(2, 4 * cfg.warpgroups)
        cute.arch.sync_threads()
        if cutlass.const_expr(cfg.cluster_n > 1):
            ptx.cluster_barrier()
        tiles = self.tiles(cta, grid, num_tokens, num_row_blocks, num_k_blocks)
        if warp_group == cfg.warpgroups:
            cute.arch.setmaxregister_decrease(W8A8_REGISTERS[cfg.warpgroups][0])
            if thread == cfg.warpgroups * WG:
                self.load_acts(acts, stages, tiles, num_tokens)
            if thread == cfg.warpgroups * WG + 32:
                self.load_weights(blocks, scales, stages, tiles, num_row_blocks)
        else:
            cute.arch.setmaxregister_increase(W8A8_REGISTERS[cfg.warpgroups][1])
            output = Output(out, row_table, num_tokens, ld_out, num_row_blocks)
            self.consume(tiles, stages, output, Thread(thread % WG, warp_group))

    def allocate(self) -> Stages:
        """Allocates all of a CTA's shared memory."""
        cfg = self.cfg
        acts = cute.arch.alloc_smem(Uint8, cfg.num_stages * cfg.m64_per_tile * ACT_STRIDE, 1024)
        weights = cute.arch.alloc_smem(Uint8, cfg.num_stages * cfg.num_n64 * BLOCK_BYTES, 1024)
        scales = cute.arch.alloc_smem(Uint8, cfg.num_stages * cfg.num_n64 * ENTRY_BYTES, 16)
        return Stages(acts, weights, scales, Pipeline.allocate(cfg.num_stages, cfg.cluster_n))

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
    def consume(self, tiles: CtaTiles, stages: Stages, output: Output, thread: Thread) -> None:
        """Computes a warpgroup's 64-token blocks of every tile."""
        cfg = self.cfg
        mma = make_trivial_tiled_mma(
            Float8E4M3FN, Float8E4M3FN, cute.nvgpu.OperandMajorMode.K, cute.nvgpu.OperandMajorMode.K, Float32,
            (1, 1, 1), (64, 64 * cfg.num_n64),
        )  # fmt: skip
        thr_mma = mma.get_slice(thread.idx)
        acts = shared_operand(stages.tokens, Float8E4M3FN, 64, cfg.num_stages * cfg.m64_per_tile, ACT_STRIDE)
        weights = shared_operand(
            stages.weights, Float8E4M3FN, 64 * cfg.num_n64, cfg.num_stages, cfg.num_n64 * BLOCK_BYTES
        )
        a = thr_mma.make_fragment_A(thr_mma.partition_A(acts))
        b = thr_mma.make_fragment_B(thr_mma.partition_B(weights))
        acc_shape = thr_mma.partition_shape_C((64, 64 * cfg.num_n64))
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
                self.share_sums(totals, stages, thread)
            self.write(totals, tile, tiles, stages, output, thread)
        if cutlass.const_expr(cfg.cluster > 1):
            # The peers may still arrive at this CTA's barriers, or read its sums. (Its loading warps have left by now:
            # a cluster barrier waits for threads that have not exited.)
            ptx.cluster_barrier(relaxed=True)

    def token_scales(self, stages: Stages, chunk: Int32, thread: Thread) -> Scales:
        """Loads the scales of this thread's tokens g and g + 8."""
        row = thread.warp * 16 + thread.row
        base = stages.tokens.toint() + chunk * ACT_STRIDE + BLOCK_BYTES + row * 4
        return fp8_ptx.load_shared_float(base), fp8_ptx.load_shared_float(base + 32)


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
