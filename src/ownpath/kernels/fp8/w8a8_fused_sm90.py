"""W8A8 on Hopper that quantises BF16 activations on the way to the tensor cores, for products of one wave.

How it works. A tile is 128 tokens by 128 or 192 features, K is walked in blocks of 128. One producer thread brings
weights by bulk copies and does not wait for the kernel in front; another brings the tokens as two TMA boxes of 64 columns,
swizzled. A consumer warpgroup has 64 tokens. The packed columns of the weights (``kernels.fp8.layout``) are such that
lane q of the four that share a token in the tensor cores' operand A needs columns 16q .. 16q + 15 of either box: the four
find the block's largest magnitude by two shuffles, and what each rounds to E4M3 is its operand, in registers. While one
warpgroup rounds or promotes, the other multiplies.

CTAs with neighbouring features may share their tokens: each fetches a part for all of them (``cluster_n``). Others split
K, and add their sums over the cluster (``cluster_k``). Scales, codes and the order of sums are those of ``quantize_sm90``
and ``w8a8_sm90``: the results are the same bits, for the same split of K.

Why it is fast. The quantiser's launch, its way through memory and the wait for its last CTA are gone, about half of the
time at 256 rows. In exchange every tile of features reads tokens as BF16 and rounds them again: about three instructions
a value, 0.6 of a tile's tensor cycles at 128 features.

Roofline. 1222 TFLOP/s, and bytes from L2: 256 a token and block of K for each tile. Limits: sm_90a; K a multiple of 8;
16-byte aligned rows.
"""

from typing import Any

import cutlass
from cutlass import BFloat16, Float8E4M3FN, Float32, Int32, Int64, Uint8, Uint32, cute
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.utils.hopper_helpers import make_trivial_tiled_mma

from ownpath.kernels.dsl import ptx
from ownpath.kernels.dsl.pipeline import Consumer, Pipeline, Stages
from ownpath.kernels.dsl.warpgroup import Thread, shared_operand, wgmma
from ownpath.kernels.fp8 import ptx as fp8_ptx
from ownpath.kernels.fp8.config import BLOCK_K, CHUNK_K, ENTRY_BYTES, W8A8_REGISTERS, WG, FusedW8A8Config
from ownpath.kernels.fp8.layout import BLOCK_BYTES
from ownpath.kernels.fp8.output_sm90 import Output
from ownpath.kernels.fp8.w8a8_tiles_sm90 import CtaTiles, W8A8Tiles

TOKENS = 128
BOX_BYTES = TOKENS * CHUNK_K * 2


class FusedW8A8(W8A8Tiles):
    """Builds the kernel of one ``FusedW8A8Config``."""

    cfg: FusedW8A8Config

    def __init__(self, config: FusedW8A8Config) -> None:
        super().__init__(config)

    @cute.jit
    def __call__(
        self,
        x: cute.Pointer,
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
        """Host side, used to compile only: the launcher passes the same arguments with its own tensor map."""
        width = num_k_blocks * BLOCK_K
        tokens = cute.make_tensor(x, cute.make_layout((num_tokens, width), stride=(width, 1)))
        box = cute.make_layout((8, CHUNK_K), stride=(CHUNK_K, 1))
        atom, _ = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), tokens, box, (8, CHUNK_K))
        self.kernel(atom, blocks, scales, row_table, out, num_tokens, ld_out, num_row_blocks, num_k_blocks).launch(
            grid=[grid, 1, 1],
            block=[self.cfg.num_threads, 1, 1],
            cluster=[self.cfg.cluster, 1, 1],
            min_blocks_per_mp=1,
        )

    @cute.kernel
    def kernel(
        self,
        tma_x: cute.CopyAtom,
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
            cpasync.prefetch_descriptor(tma_x)
            stages.pipeline.init(2, 4 * cfg.warpgroups)
        cute.arch.sync_threads()
        cute.arch.griddepcontrol_launch_dependents()
        if cutlass.const_expr(cfg.cluster_n > 1):
            ptx.cluster_barrier()
        tiles = self.tiles(cta, grid, num_tokens, num_row_blocks, num_k_blocks)
        if warp_group == cfg.warpgroups:
            cute.arch.setmaxregister_decrease(24)
            if thread == cfg.warpgroups * WG:
                self.load_tokens(ptx.descriptor_address(tma_x), stages, tiles)
            if thread == cfg.warpgroups * WG + 32:
                self.load_weights(blocks, scales, stages, tiles, num_row_blocks)
        else:
            cute.arch.setmaxregister_increase(W8A8_REGISTERS[cfg.warpgroups])
            output = Output(out, row_table, num_tokens, ld_out, num_row_blocks)
            self.consume(tiles, stages, output, Thread(thread % WG, warp_group))

    def allocate(self) -> Stages:
        """Allocates all of a CTA's shared memory."""
        cfg = self.cfg
        tokens = cute.arch.alloc_smem(Uint8, cfg.num_stages * 2 * BOX_BYTES, 1024)
        weights = cute.arch.alloc_smem(Uint8, cfg.num_stages * cfg.num_n64 * BLOCK_BYTES, 1024)
        scales = cute.arch.alloc_smem(Uint8, cfg.num_stages * cfg.num_n64 * ENTRY_BYTES, 16)
        return Stages(tokens, weights, scales, Pipeline.allocate(cfg.num_stages, cfg.cluster_n))

    @cute.jit
    def load_tokens(self, descriptor: Int64, stages: Stages, tiles: CtaTiles) -> None:
        """Loads this CTA's share of the cluster's tokens, zeros where there is no token or no k. One thread."""
        cfg = self.cfg
        peers = ((1 << cfg.cluster_n) - 1) << (tiles.k_rank * cfg.cluster_n)
        cute.arch.griddepcontrol_wait()
        ring = stages.pipeline.producer()
        for tile in cutlass.range(tiles.worker, tiles.num_tiles, tiles.num_workers, unroll=1):
            token0 = tiles.m64(tile) * 64 + tiles.rank * cfg.box_rows
            for step in cutlass.range(tiles.k_iters, unroll=1):
                column = (tiles.k_start + step) * BLOCK_K
                ring.acquire()
                ring.commit(2 * BOX_BYTES)
                for half in cutlass.range_constexpr(2):
                    place = (ring.slot * 2 + half) * BOX_BYTES + tiles.rank * (cfg.box_rows * CHUNK_K * 2)
                    target = stages.tokens + place
                    if cutlass.const_expr(cfg.cluster_n == 1):
                        ptx.load_box(target, descriptor, column + half * CHUNK_K, token0, ring.full)
                    else:
                        fp8_ptx.load_box_for(target, descriptor, column + half * CHUNK_K, token0, ring.full, peers)
                ring.advance()

    @cute.jit
    def consume(self, tiles: CtaTiles, stages: Stages, output: Output, thread: Thread) -> None:
        """Computes a warpgroup's 64 tokens of every tile."""
        cfg = self.cfg
        major = cute.nvgpu.OperandMajorMode.K
        mma = make_trivial_tiled_mma(
            Float8E4M3FN, Float8E4M3FN, major, major, Float32, (1, 1, 1), (64, 64 * cfg.num_n64),
            a_source=warpgroup.OperandSource.RMEM,
        )  # fmt: skip
        thr_mma = mma.get_slice(thread.idx)
        place = cfg.num_n64 * BLOCK_BYTES
        weights = shared_operand(stages.weights, Float8E4M3FN, 64 * cfg.num_n64, cfg.num_stages, place)
        a = thr_mma.make_fragment_A(thr_mma.partition_shape_A((64, BLOCK_K)))
        b = thr_mma.make_fragment_B(thr_mma.partition_B(weights))
        acc_shape = thr_mma.partition_shape_C((64, 64 * cfg.num_n64))
        total = cute.make_rmem_tensor(acc_shape, Float32)
        sums = cute.make_rmem_tensor(acc_shape, Float32)
        codes = cute.recast_tensor(a, Uint32)
        ring = stages.pipeline.consumer()
        for tile in cutlass.range(tiles.worker, tiles.num_tiles, tiles.num_workers, unroll=1):
            total.fill(0.0)
            for _ in cutlass.range(tiles.k_iters, unroll=1):
                ring.wait()
                token_scales = tuple(self.quantize(stages, ring.slot, lower, codes, thread) for lower in range(2))
                warpgroup.fence()
                for k32 in cutlass.range_constexpr(4):
                    wgmma(mma, a[None, None, k32], b[None, None, k32, ring.slot], sums, k32 > 0)
                warpgroup.commit_group()
                weight_scales = self.weight_scales(stages, ring.slot)
                warpgroup.wait_group(0)
                self.release(ring, tiles, thread)
                self.promote(total, sums, token_scales, weight_scales)
                ring.advance()
            if cutlass.const_expr(cfg.cluster_k > 1):
                self.share_sums([total], stages, thread)
            self.write([total], tile, tiles, stages, output, thread)
        if cutlass.const_expr(cfg.cluster > 1):
            # The peers may still arrive at this CTA's barriers, or read its sums. (Its loading warps have left by now:
            # a cluster barrier waits for threads that have not exited.)
            ptx.cluster_barrier(relaxed=True)

    @cute.jit
    def release(self, ring: Consumer, tiles: CtaTiles, thread: Thread) -> None:
        """Releases the stage, on every CTA that writes there."""
        if cutlass.const_expr(self.cfg.cluster_n > 1):
            if thread.lane < self.cfg.cluster_n:
                peer = tiles.k_rank * self.cfg.cluster_n + thread.lane
                ptx.arrive_remote(ring.pipeline.empty + ring.slot, peer)
        else:
            ring.release(ring.slot, thread.idx)

    def quantize(self, stages: Stages, slot: Int32, lower: int, codes: cute.Tensor, thread: Thread) -> Float32:
        """Rounds this thread's 32 values of token g (``lower`` 0) or g + 8 to E4M3; returns the token's scale."""
        row = thread.wg_m * 64 + thread.warp * 16 + thread.row + 8 * lower
        words: list[Uint32] = []
        for half in range(2):
            base = stages.tokens.toint() + (slot * 2 + half) * BOX_BYTES + row * 128
            for unit in range(2):
                words += ptx.load_shared_vec4(base + ((2 * thread.pair + unit) ^ thread.row) * 16)
        rest = words
        while len(rest) > 1:
            rest = [fp8_ptx.max_abs_bf16x2(*pair) for pair in zip(rest[::2], rest[1::2], strict=True)]
        largest = fp8_ptx.max_u32(rest[0] & Uint32(0x7FFF), (rest[0] >> 16) & Uint32(0x7FFF))
        for step in (1, 2):
            largest = fp8_ptx.max_u32(largest, cute.arch.shuffle_sync_bfly(largest, offset=step))
        scale, values = self.scaled(largest << 16, words)
        for k32 in range(4):
            for half in range(2):
                first, second = 16 * half + 2 * k32, 16 * half + 2 * k32 + 8
                codes[4 * k32 + 2 * half + lower] = fp8_ptx.to_e4m3x4(
                    values[second], values[first], values[second + 1], values[first + 1]
                )
        return scale

    def scaled(self, amax_bits: Uint32, words: list[Uint32]) -> tuple[Float32, list[Float32]]:
        """Returns the scale of 128 values, from the float32 bits of their largest magnitude, and values over scale."""
        bits = fp8_ptx.max_u32(amax_bits, Uint32(fp8_ptx.AMAX_FLOOR_BITS))
        if cutlass.const_expr(self.cfg.power_of_two):
            exponent = fp8_ptx.scale_exponent(bits)
            scale = ptx.as_float(exponent << 23)
            factor = (Uint32(254) - exponent) << 7
            # Exact, but for products below 2**-126, which round to zero in E4M3 either way.
            words = [ptx.mul_bf16x2(word, factor | (factor << 16)) for word in words]
        else:
            scale = fp8_ptx.divide(ptx.as_float(bits), Float32(448.0))
        values = [ptx.widen_bf16(word, high) for word in words for high in (False, True)]
        if cutlass.const_expr(not self.cfg.power_of_two):
            values = [fp8_ptx.divide(value, scale) for value in values]
        return fp8_ptx.nan_unless_finite(scale, amax_bits), values


def compile_fused_w8a8(config: FusedW8A8Config) -> Any:
    """Compiles for sm_90a; no GPU is needed."""
    ptr = cute.runtime.make_ptr
    space = cute.AddressSpace.gmem
    one = Int32(1)
    return cute.compile(
        FusedW8A8(config),
        ptr(BFloat16, 1024, space, assumed_align=16),
        ptr(Uint8, 1024, space, assumed_align=128),
        ptr(Uint8, 1024, space, assumed_align=16),
        ptr(Int32, 1024, space, assumed_align=8),
        ptr(BFloat16, 1024, space, assumed_align=2 if config.ragged else 8),
        Int32(8), Int32(64), Int32(2), one, Int32(config.cluster),
    )  # fmt: skip
