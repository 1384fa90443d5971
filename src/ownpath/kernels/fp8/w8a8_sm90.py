"""W8A8 on Hopper: E4M3 block weights times E4M3 activations with a scale per 1 x 128, for prefill.

How it works. A tile is ``64 * warpgroups * num_m64`` tokens by 128 features. Two producer threads fill a ring of
shared-memory stages (128 of K each) with plain bulk copies, because both operands already stand in memory as ``wgmma``
reads them (``kernels.fp8.layout``, ``quantize_sm90``): no tensor maps, no address arithmetic. The one for weights
starts while the quantiser still runs. Consumer warpgroups
multiply a stage from shared memory into a temporary accumulator, then add it to the float32 total times token scale x
weight scale: the promotion per 128 of K that the published numerics ask for (FP8 ``wgmma`` keeps about 14 bits while
it sums). While one warpgroup promotes, the others keep the tensor cores busy. CTAs are persistent: the ring is filled
for the next tile while the last one is written. (With ``cluster_n`` 2, two CTAs with neighbouring features fetch half
of every activation block for both; on an H200 this gained nothing, so it is not chosen.)

Why it is fast. Per 128 of K a 256 x 128 tile asks 48 KiB of L2 for 1024 tensor cycles, and 128 multiply-adds per
thread for the promotion, hidden behind the other warpgroup's products. The row order of the packed weights gives each
thread four neighbouring features, so results leave as 8-byte stores without a trip through shared memory.

Roofline. 1979 TFLOP/s on paper; 1222 reached (docs/kernels-fp8.md). Limits: sm_90a; the activation blocks of
``quantize_sm90``; the sum inside 128 of K has the tensor core's precision, not float32's; K is not split, so few
tokens with a long K keep few SMs busy.
"""

from typing import Any

import cutlass
from cutlass import BFloat16, Float8E4M3FN, Float32, Int32, Int64, Uint8, cute
from cutlass.cute.nvgpu import warpgroup
from cutlass.utils.hopper_helpers import make_trivial_tiled_mma

from ownpath.kernels.dsl import ptx
from ownpath.kernels.dsl.ring import next_stage
from ownpath.kernels.fp8 import ptx as fp8_ptx
from ownpath.kernels.fp8.config import ACT_STRIDE, ENTRY_BYTES, W8A8_REGISTERS, WG, W8A8Config
from ownpath.kernels.fp8.layout import ACT_BLOCK_BYTES, BLOCK_BYTES

TILE_N = 128


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
            cluster=[self.cfg.cluster_n, 1, 1],
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
        cfg = self.cfg
        thread, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        grid, _, _ = cute.arch.grid_dim()
        warp_group = cute.arch.make_warp_uniform(thread // WG)

        smem_a = cute.arch.alloc_smem(Uint8, cfg.num_stages * cfg.m64_per_tile * ACT_STRIDE, 1024)
        smem_b = cute.arch.alloc_smem(Uint8, cfg.num_stages * 2 * BLOCK_BYTES, 1024)
        smem_scales = cute.arch.alloc_smem(Uint8, cfg.num_stages * 2 * ENTRY_BYTES, 16)
        full = cute.arch.alloc_smem(Int64, cfg.num_stages, 8)
        empty = cute.arch.alloc_smem(Int64, cfg.num_stages, 8)
        if thread == 0:
            for stage in cutlass.range_constexpr(cfg.num_stages):
                cute.arch.mbarrier_init(full + stage, 2)
                cute.arch.mbarrier_init(empty + stage, 4 * cfg.warpgroups * cfg.cluster_n)
            cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        if cutlass.const_expr(cfg.cluster_n > 1):
            fp8_ptx.cluster_barrier()

        rank = cta % cfg.cluster_n
        worker, num_workers = cta // cfg.cluster_n, grid // cfg.cluster_n
        num_m_tiles = (num_tokens + cfg.m64_per_tile * 64 - 1) // (cfg.m64_per_tile * 64)
        num_n_tiles = (num_row_blocks + 2 * cfg.cluster_n - 1) // (2 * cfg.cluster_n)
        num_tiles = num_m_tiles * num_n_tiles

        if warp_group == cfg.warpgroups:
            cute.arch.setmaxregister_decrease(24)
            if thread == cfg.warpgroups * WG:
                self.produce_acts(
                    acts, smem_a, full, empty, rank, worker, num_workers, num_tiles, num_m_tiles, num_tokens,
                    num_k_blocks,
                )  # fmt: skip
            if thread == cfg.warpgroups * WG + 32:
                self.produce_weights(
                    blocks, scales, smem_b, smem_scales, full, empty, rank, worker, num_workers, num_tiles,
                    num_m_tiles, num_row_blocks, num_k_blocks,
                )  # fmt: skip
        else:
            cute.arch.setmaxregister_increase(W8A8_REGISTERS[cfg.warpgroups])
            self.consume(
                row_table, out, smem_a, smem_b, smem_scales, full, empty, thread % WG, warp_group, rank, worker,
                num_workers, num_tiles, num_m_tiles, num_tokens, ld_out, num_row_blocks, num_k_blocks,
            )  # fmt: skip

    @cute.jit
    def produce_acts(
        self,
        acts: cute.Pointer,
        smem_a: cute.Pointer,
        full: cute.Pointer,
        empty: cute.Pointer,
        rank: Int32,
        worker: Int32,
        num_workers: Int32,
        num_tiles: Int32,
        num_m_tiles: Int32,
        num_tokens: Int32,
        num_k_blocks: Int32,
    ) -> None:
        """One thread: this CTA's share of the cluster's activations, once the quantiser has written them."""
        cfg = self.cfg
        part = ACT_BLOCK_BYTES // cfg.cluster_n
        peers = (1 << cfg.cluster_n) - 1 if cfg.cluster_n > 1 else 0
        last_m64 = (num_tokens + 63) // 64 - 1
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        slot, phase = Int32(0), Int32(1)
        for tile in cutlass.range(worker, num_tiles, num_workers, unroll=1):
            m_tile = tile % num_m_tiles
            for k in cutlass.range(num_k_blocks, unroll=1):
                cute.arch.mbarrier_wait(empty + slot, phase)
                cute.arch.mbarrier_arrive_and_expect_tx(full + slot, cfg.m64_per_tile * ACT_BLOCK_BYTES)
                for r in cutlass.range_constexpr(cfg.m64_per_tile):
                    m64 = cutlass.min(m_tile * cfg.m64_per_tile + r, last_m64)
                    fp8_ptx.load_bulk(
                        smem_a + ((slot * cfg.m64_per_tile + r) * ACT_STRIDE + rank * part),
                        acts + ((Int64(m64) * num_k_blocks + k) * ACT_BLOCK_BYTES + rank * part),
                        part, full + slot, peers,
                    )  # fmt: skip
                slot, phase = next_stage(slot, phase, cfg.num_stages)

    @cute.jit
    def produce_weights(
        self,
        blocks: cute.Pointer,
        scales: cute.Pointer,
        smem_b: cute.Pointer,
        smem_scales: cute.Pointer,
        full: cute.Pointer,
        empty: cute.Pointer,
        rank: Int32,
        worker: Int32,
        num_workers: Int32,
        num_tiles: Int32,
        num_m_tiles: Int32,
        num_row_blocks: Int32,
        num_k_blocks: Int32,
    ) -> None:
        """One thread: every stage's weights for this CTA. No earlier kernel writes them: it waits for none."""
        cfg = self.cfg
        slot, phase = Int32(0), Int32(1)
        for tile in cutlass.range(worker, num_tiles, num_workers, unroll=1):
            row_block = cutlass.min((tile // num_m_tiles * cfg.cluster_n + rank) * 2, num_row_blocks - 2)
            for k in cutlass.range(num_k_blocks, unroll=1):
                cute.arch.mbarrier_wait(empty + slot, phase)
                cute.arch.mbarrier_arrive_and_expect_tx(full + slot, 2 * (BLOCK_BYTES + ENTRY_BYTES))
                for half in cutlass.range_constexpr(2):
                    idx = Int64(row_block + half) * num_k_blocks + k
                    fp8_ptx.load_bulk(
                        smem_b + (slot * 2 + half) * BLOCK_BYTES, blocks + idx * BLOCK_BYTES, BLOCK_BYTES, full + slot
                    )
                    fp8_ptx.load_bulk(
                        smem_scales + (slot * 2 + half) * ENTRY_BYTES, scales + idx * ENTRY_BYTES, ENTRY_BYTES,
                        full + slot,
                    )  # fmt: skip
                slot, phase = next_stage(slot, phase, cfg.num_stages)

    @cute.jit
    def consume(
        self,
        row_table: cute.Pointer,
        out: cute.Pointer,
        smem_a: cute.Pointer,
        smem_b: cute.Pointer,
        smem_scales: cute.Pointer,
        full: cute.Pointer,
        empty: cute.Pointer,
        lane: Int32,
        warp_group: Int32,
        rank: Int32,
        worker: Int32,
        num_workers: Int32,
        num_tiles: Int32,
        num_m_tiles: Int32,
        num_tokens: Int32,
        ld_out: Int32,
        num_row_blocks: Int32,
        num_k_blocks: Int32,
    ) -> None:
        """One warpgroup: its 64-token blocks of every tile."""
        cfg = self.cfg
        mma = make_trivial_tiled_mma(
            Float8E4M3FN, Float8E4M3FN, cute.nvgpu.OperandMajorMode.K, cute.nvgpu.OperandMajorMode.K, Float32,
            (1, 1, 1), (64, TILE_N),
        )  # fmt: skip
        thr_mma = mma.get_slice(lane)
        acts = self.operand(smem_a, 64, cfg.num_stages * cfg.m64_per_tile, ACT_STRIDE)
        weights = self.operand(smem_b, TILE_N, cfg.num_stages, 2 * BLOCK_BYTES)
        a = thr_mma.make_fragment_A(thr_mma.partition_A(acts))
        b = thr_mma.make_fragment_B(thr_mma.partition_B(weights))
        acc_shape = thr_mma.partition_shape_C((64, TILE_N))
        totals = [cute.make_rmem_tensor(acc_shape, Float32) for _ in range(cfg.num_m64)]
        sums = cute.make_rmem_tensor(acc_shape, Float32)
        slot, phase = Int32(0), Int32(0)
        for tile in cutlass.range(worker, num_tiles, num_workers, unroll=1):
            for total in totals:
                total.fill(0.0)
            for _ in cutlass.range(num_k_blocks, unroll=1):
                cute.arch.mbarrier_wait(full + slot, phase)
                weight_scales = self.weight_scales(smem_scales, slot)
                for r in cutlass.range_constexpr(cfg.num_m64):
                    chunk = slot * cfg.m64_per_tile + warp_group * cfg.num_m64 + r
                    token_scales = self.token_scales(smem_a, chunk, lane)
                    warpgroup.fence()
                    for k32 in cutlass.range_constexpr(4):
                        atom = cute.make_mma_atom(mma.op)
                        atom.set(warpgroup.Field.ACCUMULATE, k32 > 0)
                        cute.gemm(atom, sums, a[None, None, k32, chunk], b[None, None, k32, slot], sums)
                    warpgroup.commit_group()
                    warpgroup.wait_group(0)
                    if cutlass.const_expr(r == cfg.num_m64 - 1):
                        self.release(empty + slot, lane)
                    self.promote(totals[r], sums, token_scales, weight_scales)
                slot, phase = next_stage(slot, phase, cfg.num_stages)
            m64 = tile % num_m_tiles * cfg.m64_per_tile + warp_group * cfg.num_m64
            row_block = (tile // num_m_tiles * cfg.cluster_n + rank) * 2
            for half in cutlass.range_constexpr(2):
                row0, num_valid = self.read_rows(row_table, row_block + half, num_row_blocks)
                for r in cutlass.range_constexpr(cfg.num_m64):
                    self.store(totals[r], half, out, row0, num_valid, (m64 + r) * 64, lane, num_tokens, ld_out)
        if cutlass.const_expr(cfg.cluster_n > 1):
            fp8_ptx.cluster_barrier(relaxed=True)  # the peer may still arrive at this CTA's barriers

    def operand(self, smem: cute.Pointer, num_rows: int, num_blocks: int, stride: int) -> Any:
        """[rows, 128, blocks] of E4M3, K contiguous, 128-byte swizzle."""
        outer = cute.make_layout(((8, num_rows // 8), 128, num_blocks), stride=((128, 1024), 1, stride))
        layout = cute.make_composed_layout(cute.make_swizzle(3, 4, 3), 0, outer)
        return cute.make_tensor(cute.recast_ptr(smem, layout.inner, Float8E4M3FN), layout.outer)

    def weight_scales(self, smem_scales: cute.Pointer, slot: Int32) -> tuple[Any, Any]:
        """Scales of the tile's two 64-feature blocks."""
        base = smem_scales.toint() + slot * (2 * ENTRY_BYTES) + 8
        return fp8_ptx.load_shared_float(base), fp8_ptx.load_shared_float(base + ENTRY_BYTES)

    def token_scales(self, smem_a: cute.Pointer, chunk: Int32, lane: Int32) -> tuple[Any, Any]:
        """Scales of this thread's tokens g and g + 8."""
        row = lane // 32 * 16 + lane % 32 // 4
        base = smem_a.toint() + chunk * ACT_STRIDE + BLOCK_BYTES + row * 4
        return fp8_ptx.load_shared_float(base), fp8_ptx.load_shared_float(base + 32)

    @cute.jit
    def release(self, barrier: cute.Pointer, lane: Int32) -> None:
        """Each warp tells every CTA of the cluster, whose producers all write into this stage, that it is read."""
        if cutlass.const_expr(self.cfg.cluster_n == 1):
            if lane % 32 == 0:
                cute.arch.mbarrier_arrive(barrier)
        else:
            if lane % 32 < self.cfg.cluster_n:
                ptx.arrive_remote(barrier, lane % 32)

    def promote(self, total: Any, sums: Any, token_scales: tuple[Any, Any], weight_scales: tuple[Any, Any]) -> None:
        """total += sums * (token scale * weight scale); the product of the scales is rounded to float32 first."""
        for half in range(2):
            factors = [scale * weight_scales[half] for scale in token_scales]
            for j in range(8):
                for idx in range(4):
                    at = 4 * (8 * half + j) + idx
                    total[at] = total[at] + factors[idx // 2] * sums[at]

    @cute.jit
    def read_rows(self, row_table: cute.Pointer, row_block: Int32, num_row_blocks: Int32) -> tuple[Int32, Int32]:
        """First output feature of a row block, and how many of its rows exist (none beyond the matrix)."""
        row0, num_valid = Int32(0), Int32(0)
        if row_block < num_row_blocks:
            table = cute.make_tensor(row_table + 2 * row_block, cute.make_layout(2))
            row0, num_valid = table[0], table[1]
        return row0, num_valid

    @cute.jit
    def store(
        self,
        total: Any,
        half: int,
        out: cute.Pointer,
        row0: Int32,
        num_valid: Int32,
        token0: Int32,
        lane: Int32,
        num_tokens: Int32,
        ld_out: Int32,
    ) -> None:
        """Writes 64 features of 64 tokens: features 4q .. 4q + 3 of every 16, for tokens g and g + 8 of a warp."""
        q = lane % 4
        token = token0 + lane // 32 * 16 + lane % 32 // 4
        for lower in cutlass.range_constexpr(2):
            mine = token + 8 * lower
            if mine < num_tokens:
                line = out + (Int64(mine) * ld_out + row0)
                for group in cutlass.range_constexpr(4):
                    first = 4 * (8 * half + 2 * group) + 2 * lower
                    values = [total[first], total[first + 4], total[first + 1], total[first + 5]]
                    feature = 16 * group + 4 * q
                    if cutlass.const_expr(self.cfg.ragged):
                        for idx in cutlass.range_constexpr(4):
                            if feature + idx < num_valid:
                                cute.make_tensor(line + (feature + idx), cute.make_layout(1))[0] = BFloat16(values[idx])
                    elif feature < num_valid:
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
        one, Int32(64), Int32(2), one, Int32(config.cluster_n),
    )  # fmt: skip
