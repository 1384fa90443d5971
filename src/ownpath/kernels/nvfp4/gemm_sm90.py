"""W4A16 matrix products on Hopper: NVFP4 weights decoded exactly in registers, fed to the tensor cores as operand A.

How it works. The product is taken transposed, y.T = W x.T: weight rows are the M of ``wgmma`` (64 per instruction)
and tokens its N (any multiple of 8), so that one token costs 8 columns rather than 64 rows. Operand A may come from
registers; the packed weights (``kernels.nvfp4.layout``) put the 4-bit codes of each thread's share of A behind each
other, so that a thread gets 32 codes with one 16-byte load and needs no exchange with others. Three producer warps
(codes, scales, tokens) fill a ring of shared-memory stages: weights by plain bulk copies (each 64 x 128 block is
contiguous), tokens by TMA boxes with the 128-byte swizzle that ``wgmma`` reads. Consumer warpgroups decode one to four
k16 steps into a register buffer while the tensor cores work on another.

Decode. E2M1's sign, exponent and mantissa bits are moved to the sign, low exponent and top mantissa bits of BF16,
which is the value times 2**-126 (subnormals included); the block scale, stored as a byte with a 5-bit exponent, is
expanded to BF16 times 2**107. One BF16 multiply gives code * scale * 2**-19: 2 + 4 significant bits, exact. The
epilogue multiplies the float32 sum by global_scale * 2**19.

Why it is fast. Up to about 30 tokens per expert the issue slots are what competes with memory: 13.5 instructions per 8
weights and thread (5 logic, 2 rotations, 1 multiply-add, 4 BF16 multiplies, 1.5 for the scale) is why the bit layout is
as odd as it is. With many tokens the size of the token boxes decides: 64 rows a copy, not 8 or 16, and tiles of up to
256 tokens, so that a decoded weight is used often.

Roofline. Below about 150 tokens per expert: bytes, 0.5625 per weight at 4.41 TB/s. Above: ``wgmma``, 781 TFLOP/s
(measured with cuBLAS) and in practice the power limit. Limits: K a multiple of 128, rows a multiple of 64 times the
tile; sm_90a only.
"""

from typing import Any

import cutlass
from cutlass import BFloat16, Float32, Int32, Int64, Uint8, Uint32, cute
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.utils.hopper_helpers import make_trivial_tiled_mma

from ownpath.kernels.dsl import ptx
from ownpath.kernels.dsl.ring import next_stage
from ownpath.kernels.nvfp4.config import BLOCK_K, CHUNK_K, WG, GemmConfig
from ownpath.kernels.nvfp4.epilogue_sm90 import Epilogue
from ownpath.kernels.nvfp4.handover import announce, await_rows

BAND_TILES = 16


class Gemm:
    """Builds the kernel of one ``GemmConfig``."""

    def __init__(self, config: GemmConfig) -> None:
        self.cfg = config
        self.num_consumers = config.num_consumers
        self.max_n = config.n_sizes[-1]
        self.epilogue = Epilogue(config)
        self.chunks_per_group = config.stage_k // CHUNK_K
        self.num_chunks = self.chunks_per_group * config.warpgroups_k

    @cute.jit
    def __call__(
        self,
        x: cute.Pointer,
        codes: cute.Pointer,
        scales: cute.Pointer,
        global_scale: cute.Pointer,
        out: cute.Pointer,
        schedule: cute.Pointer,
        num_rows: Int32,
        num_cols: Int32,
        num_m_tiles: Int32,
        num_k_blocks: Int32,
        rows_per_tile: Int32,
        ld_out: Int32,
        swiglu_limit: Float32,
        grid: Int32,
    ) -> None:
        """Host side, used to compile only: the launcher passes the same arguments with its own tensor map."""
        tokens = cute.make_tensor(x, cute.make_layout((num_rows, num_cols), stride=(num_cols, 1)))
        box = cute.make_layout((8, CHUNK_K), stride=(CHUNK_K, 1))
        op = cpasync.CopyBulkTensorTileG2SOp()
        atom, _ = cpasync.make_tiled_tma_atom(op, tokens, box, (8, CHUNK_K))
        self.kernel(
            atom, codes, scales, global_scale, out, schedule,
            num_rows, num_m_tiles, num_k_blocks, rows_per_tile, ld_out, swiglu_limit,
        ).launch(
            grid=[grid, 1, 1],
            block=[self.cfg.num_threads, 1, 1],
            cluster=[self.cfg.cluster, 1, 1],
            min_blocks_per_mp=self.cfg.per_sm,
            preferred_smem_carveout=100,
        )  # fmt: skip

    def chunk_layout(self, num_rows: int, num_chunks: Any) -> Any:
        """[rows, 64, chunks] of BF16, K contiguous, 128-byte swizzle; chunks are ``max_n`` rows apart."""
        stride = self.max_n * CHUNK_K
        outer = cute.make_layout(((8, num_rows // 8), CHUNK_K, num_chunks), stride=((CHUNK_K, 8 * CHUNK_K), 1, stride))
        return cute.make_composed_layout(cute.make_swizzle(3, 4, 3), 0, outer)

    @cute.kernel
    def kernel(
        self,
        tma_x: cute.CopyAtom,
        codes: cute.Pointer,
        scales: cute.Pointer,
        global_scale: cute.Pointer,
        out: cute.Pointer,
        schedule: cute.Pointer,
        num_rows: Int32,
        num_m_tiles: Int32,
        num_k_blocks: Int32,
        rows_per_tile: Int32,
        ld_out: Int32,
        swiglu_limit: Float32,
    ) -> None:
        cfg = self.cfg
        thread, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        grid, _, _ = cute.arch.grid_dim()
        warp_group = cute.arch.make_warp_uniform(thread // WG)

        smem_x = cute.arch.alloc_smem(BFloat16, cfg.num_stages * self.num_chunks * self.max_n * CHUNK_K, 1024)
        blocks = cfg.m64_per_tile * cfg.warpgroups_k
        smem_codes = cute.arch.alloc_smem(Uint8, cfg.num_stages * blocks * cfg.code_bytes, 128)
        smem_scales = cute.arch.alloc_smem(Uint8, cfg.num_stages * blocks * cfg.scale_bytes, 128)
        smem_sums = smem_codes
        if cutlass.const_expr(cfg.reduces):
            smem_sums = cute.arch.alloc_smem(Uint8, cfg.reduce_bytes, 128)
        full = cute.arch.alloc_smem(Int64, cfg.num_stages, 8)
        empty = cute.arch.alloc_smem(Int64, cfg.num_stages, 8)
        if thread == 0:
            cpasync.prefetch_descriptor(tma_x)
            for stage in cutlass.range_constexpr(cfg.num_stages):
                cute.arch.mbarrier_init(full + stage, 3)
                cute.arch.mbarrier_init(empty + stage, 4 * self.num_consumers * cfg.cluster_m)
            cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()

        rank, rank_m = Int32(0), Int32(0)
        worker, num_workers = cta, grid
        if cutlass.const_expr(cfg.cluster > 1):
            worker, num_workers = cta // cfg.cluster, grid // cfg.cluster
        if cutlass.const_expr(cfg.cluster_k > 1):
            rank = cute.arch.block_idx_in_cluster()
        if cutlass.const_expr(cfg.cluster_m > 1):
            # The neighbour writes tokens into this CTA's memory: its barriers must stand before that.
            rank_m = cute.arch.block_idx_in_cluster()
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        if cutlass.const_expr(cfg.grouped and cfg.swiglu):
            cute.arch.griddepcontrol_wait()
        num_n_tiles = Int32(0)
        if cutlass.const_expr(cfg.grouped):
            num_n_tiles = self.read(schedule, 0)
        else:
            num_n_tiles = (num_rows + rows_per_tile - 1) // rows_per_tile
        # With clusters along M a worker is a cluster, and a tile one of its CTAs' each.
        m_per_worker = num_m_tiles // cfg.cluster_m
        num_tiles = num_n_tiles * m_per_worker
        k_units = num_k_blocks * (BLOCK_K // cfg.stage_k)
        k_iters = k_units // (cfg.warpgroups_k * cfg.cluster_k)

        if warp_group == self.num_consumers:
            if cutlass.const_expr(cfg.consumer_registers):
                cute.arch.setmaxregister_decrease(cfg.producer_registers)
            warp = cute.arch.make_warp_uniform(thread % WG // 32)
            if warp < 2:
                if thread % 32 == 0:
                    source, shared, num_bytes = codes, smem_codes, Int32(cfg.code_bytes)
                    if warp == 1:
                        source, shared, num_bytes = scales, smem_scales, Int32(cfg.scale_bytes)
                    self.produce_weights(
                        source, shared, num_bytes, schedule, full, empty, worker, num_workers, num_tiles, m_per_worker,
                        num_n_tiles, k_units, k_iters, rank, rank_m,
                    )  # fmt: skip
            elif warp == 2:
                # Single rows are loaded by all lanes of the warp, boxes by one.
                if thread % 32 < (32 if cfg.gather else 1):
                    self.produce_tokens(
                        ptx.descriptor_address(tma_x), thread % 32, schedule, smem_x, full, empty, worker, num_workers,
                        num_tiles, m_per_worker, num_n_tiles, k_iters, rank, rank_m, num_rows, rows_per_tile,
                    )  # fmt: skip
        else:
            if cutlass.const_expr(cfg.consumer_registers):
                cute.arch.setmaxregister_increase(cfg.consumer_registers)
            step = Int32(0)
            parity = Int32(0)
            for tile in cutlass.range(worker, num_tiles, num_workers, unroll=1):
                m_tile, n_tile = self.place_in_grid(tile, m_per_worker, num_n_tiles)
                expert, row0, rows = self.tile_rows(schedule, n_tile, num_rows, rows_per_tile)
                m_tile = m_tile * cfg.cluster_m + rank_m
                for idx in cutlass.range_constexpr(len(cfg.n_sizes)):
                    below = cfg.n_sizes[idx - 1] if idx else 0
                    if rows > below and rows <= cfg.n_sizes[idx]:
                        self.consume(
                            cfg.n_sizes[idx], global_scale, out, smem_x, smem_codes, smem_scales, smem_sums, full,
                            empty, step, parity, k_iters, thread, warp_group, m_tile, expert, row0, rows, ld_out,
                            swiglu_limit, rank,
                        )  # fmt: skip
                if cutlass.const_expr(cfg.hands_over):
                    announce(schedule + (4 + 4 * n_tile + 3), thread, 16 * cfg.num_m64 // cfg.warpgroups_k)
                step += k_iters
                parity = parity ^ 1
        if cutlass.const_expr(cfg.cluster_m > 1):
            # No CTA leaves while its neighbour may still write to it or signal it.
            cute.arch.sync_threads()
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()

    def read(self, schedule: cute.Pointer, idx: Any) -> Int32:
        return cute.make_tensor(schedule + idx, cute.make_layout(1))[0]

    @cute.jit
    def place_in_grid(self, tile: Int32, m_per_worker: Int32, num_n_tiles: Int32) -> tuple[Int32, Int32]:
        """Which weight rows and which tokens a worker's tile has.

        Experts go one after another. Dense products go in bands of weight rows, all tokens of a band first: a wave of
        CTAs then reads few weights and few tokens from memory, and the rest from L2.
        """
        m_tile, n_tile = tile % m_per_worker, tile // m_per_worker
        if cutlass.const_expr(not self.cfg.grouped):
            band_tiles = BAND_TILES // self.cfg.cluster_m
            first = tile // (band_tiles * num_n_tiles) * band_tiles
            in_band = tile - first * num_n_tiles
            height = cutlass.min(band_tiles, m_per_worker - first)
            m_tile, n_tile = first + in_band % height, in_band // height
        return m_tile, n_tile

    @cute.jit
    def tile_rows(
        self, schedule: cute.Pointer, n_tile: Int32, num_rows: Int32, rows_per_tile: Int32
    ) -> tuple[Int32, Int32, Int32]:
        """Expert, first row and number of rows of a tile of tokens."""
        expert, row0, rows = Int32(0), n_tile * rows_per_tile, rows_per_tile
        if cutlass.const_expr(self.cfg.grouped):
            entry = 4 + 4 * n_tile
            expert, row0 = self.read(schedule, entry), self.read(schedule, entry + 1)
            rows = self.read(schedule, entry + 2)
        else:
            rows = cutlass.min(rows_per_tile, num_rows - row0)
        return expert, row0, rows

    @cute.jit
    def produce_weights(
        self,
        source: cute.Pointer,
        shared: cute.Pointer,
        num_bytes: Int32,
        schedule: cute.Pointer,
        full: cute.Pointer,
        empty: cute.Pointer,
        worker: Int32,
        num_workers: Int32,
        num_tiles: Int32,
        m_per_worker: Int32,
        num_n_tiles: Int32,
        k_units: Int32,
        k_iters: Int32,
        rank: Int32,
        rank_m: Int32,
    ) -> None:
        """One thread: the codes (or the scales) of every stage, ``num_bytes`` per block, as fast as stages free up.

        It does not wait for the previous kernel: weights do not depend on it.
        """
        cfg = self.cfg
        m64, k_blocks = cfg.m64_per_tile, cfg.warpgroups_k
        slot, phase = Int32(0), Int32(1)
        for tile in cutlass.range(worker, num_tiles, num_workers, unroll=1):
            m_tile, n_tile = self.place_in_grid(tile, m_per_worker, num_n_tiles)
            expert = Int32(0)
            if cutlass.const_expr(cfg.grouped):
                expert = self.read(schedule, 4 + 4 * n_tile)
            m_tile = (expert * m_per_worker + m_tile) * cfg.cluster_m + rank_m
            first = Int64(m_tile * m64) * k_units
            start = source.toint() + (first + rank * k_iters * k_blocks) * num_bytes
            for _ in cutlass.range(k_iters, unroll=1):
                cute.arch.mbarrier_wait(empty + slot, phase)
                cute.arch.mbarrier_arrive_and_expect_tx(full + slot, m64 * k_blocks * num_bytes)
                target = shared.toint() + slot * (m64 * k_blocks) * num_bytes
                for idx in cutlass.range_constexpr(m64):
                    block = start + Int64(idx * k_units * num_bytes)
                    ptx.load_bulk(
                        target + idx * k_blocks * num_bytes, block, k_blocks * num_bytes, full + slot,
                        not cfg.reuses_weights,
                    )  # fmt: skip
                start += k_blocks * num_bytes
                slot, phase = next_stage(slot, phase, cfg.num_stages)

    @cute.jit
    def produce_tokens(
        self,
        descriptor: Int64,
        lane: Int32,
        schedule: cute.Pointer,
        smem_x: cute.Pointer,
        full: cute.Pointer,
        empty: cute.Pointer,
        worker: Int32,
        num_workers: Int32,
        num_tiles: Int32,
        m_per_worker: Int32,
        num_n_tiles: Int32,
        k_iters: Int32,
        rank: Int32,
        rank_m: Int32,
        num_rows: Int32,
        rows_per_tile: Int32,
    ) -> None:
        """One thread (or warp, for single rows): the tokens of every stage."""
        cfg = self.cfg
        if cutlass.const_expr(not cfg.follows):
            cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        slot, phase = Int32(0), Int32(1)
        for tile in cutlass.range(worker, num_tiles, num_workers, unroll=1):
            _, n_tile = self.place_in_grid(tile, m_per_worker, num_n_tiles)
            _, row0, rows = self.tile_rows(schedule, n_tile, num_rows, rows_per_tile)
            if cutlass.const_expr(cfg.follows):
                # Gate and up rows: two for each of this product's columns.
                await_rows(schedule + (4 + 4 * n_tile + 3), 2 * CHUNK_K * self.num_chunks * k_iters)
            boxes = (rows + cfg.box_rows - 1) // cfg.box_rows
            places = cute.make_rmem_tensor(cute.make_layout((self.max_n + 31) // 32), Int32)
            if cutlass.const_expr(cfg.gather):
                index = schedule + self.read(schedule, 1)
                for turn in cutlass.range_constexpr((self.max_n + 31) // 32):
                    places[turn] = Int32(0)
                    if lane + 32 * turn < rows:
                        places[turn] = self.read(index, row0 + lane + 32 * turn)
            for k in cutlass.range(k_iters, unroll=1):
                cute.arch.mbarrier_wait(empty + slot, phase)
                if lane == 0:
                    num_bytes = boxes * (cfg.box_rows * CHUNK_K * 2 * self.num_chunks)
                    cute.arch.mbarrier_arrive_and_expect_tx(full + slot, num_bytes)
                for chunk in cutlass.range_constexpr(self.num_chunks):
                    column = ((rank * k_iters + k) * self.num_chunks + chunk) * CHUNK_K
                    start = smem_x + (slot * self.num_chunks + chunk) * (self.max_n * CHUNK_K)
                    if cutlass.const_expr(cfg.gather):
                        for turn in cutlass.range_constexpr((self.max_n + 31) // 32):
                            row = lane + 32 * turn
                            if row < rows:
                                ptx.load_box(start + row * CHUNK_K, descriptor, column, places[turn], full + slot)
                    else:
                        # The CTAs of a cluster take turns, each loading for all of them.
                        for box in cutlass.range(rank_m, boxes, cfg.cluster_m, unroll=1):
                            row = box * cfg.box_rows
                            target = start + row * CHUNK_K
                            ptx.load_box(target, descriptor, column, row0 + row, full + slot, cfg.cluster_m)
                slot, phase = next_stage(slot, phase, cfg.num_stages)

    @cute.jit
    def consume(
        self,
        num_n: int,
        global_scale: cute.Pointer,
        out: cute.Pointer,
        smem_x: cute.Pointer,
        smem_codes: cute.Pointer,
        smem_scales: cute.Pointer,
        smem_sums: cute.Pointer,
        full: cute.Pointer,
        empty: cute.Pointer,
        step: Int32,
        parity: Int32,
        k_iters: Int32,
        thread: Int32,
        warp_group: Int32,
        m_tile: Int32,
        expert: Int32,
        row0: Int32,
        rows: Int32,
        ld_out: Int32,
        swiglu_limit: Float32,
        rank: Int32,
    ) -> None:
        """One tile: the product over K, then the epilogue."""
        cfg = self.cfg
        lane = thread % WG
        wg_m, wg_k = warp_group // cfg.warpgroups_k, warp_group % cfg.warpgroups_k
        mma = make_trivial_tiled_mma(
            BFloat16, BFloat16, cute.nvgpu.OperandMajorMode.K, cute.nvgpu.OperandMajorMode.K, Float32,
            (1, 1, 1), (64, num_n), a_source=warpgroup.OperandSource.RMEM,
        )  # fmt: skip
        layout = self.chunk_layout(num_n, cfg.num_stages * self.num_chunks)
        shared = cute.make_tensor(cute.recast_ptr(smem_x, layout.inner, BFloat16), layout.outer)
        thr_mma = mma.get_slice(lane)
        tokens = thr_mma.make_fragment_B(thr_mma.partition_B(shared))
        sums = [cute.make_rmem_tensor(thr_mma.partition_shape_C((64, num_n)), Float32) for _ in range(cfg.num_m64)]
        for acc in sums:
            acc.fill(0.0)
        depth, group = cfg.depth, cfg.group
        weights = [
            [thr_mma.make_fragment_A(thr_mma.partition_shape_A((64, 16 * group))) for _ in range(cfg.num_m64)]
            for _ in range(depth)
        ]
        # A constant that the assembler does not know to be one: it would load it again for every use.
        scale_bits = Uint32(0x0FF00FF0) | Uint32(ld_out >> 31)
        slot = step % cfg.num_stages
        phase = (step // cfg.num_stages) % 2
        last = slot
        for k in cutlass.range(k_iters, unroll=1):
            cute.arch.mbarrier_wait(full + slot, phase)
            words, scale_words = self.load_fragments(smem_codes, smem_scales, slot, wg_m, wg_k, lane)
            for part in cutlass.range_constexpr(cfg.num_steps // group):
                # Buffers take turns: products of the last ``depth - 1`` groups run while this one is decoded.
                buffer = weights[part % depth]
                for r in cutlass.range_constexpr(cfg.num_m64):
                    fragment = cute.recast_tensor(buffer[r], Uint32)
                    for kk in cutlass.range_constexpr(group):
                        k16 = part * group + kk
                        scales = scale_words[r][k16 // 2]
                        if cutlass.const_expr(k16 % 2):
                            scales = ptx.rotate_right(scales, 8)
                        self.decode(words[r][k16], scales & scale_bits, fragment, 4 * kk)
                warpgroup.fence()
                for kk in cutlass.range_constexpr(group):
                    k16 = part * group + kk
                    chunk = slot * self.num_chunks + wg_k * self.chunks_per_group + k16 // 4
                    for r in cutlass.range_constexpr(cfg.num_m64):
                        atom = cute.make_mma_atom(mma.op)
                        atom.set(warpgroup.Field.ACCUMULATE, True)
                        a = buffer[r][None, None, kk]
                        cute.gemm(atom, sums[r], a, tokens[None, None, k16 % 4, chunk], sums[r])
                warpgroup.commit_group()
                warpgroup.wait_group(depth - 1)
                if cutlass.const_expr(part == depth - 2):
                    # Every product of the previous stage is done.
                    if k > 0:
                        self.release(empty + last, lane)
            last = slot
            slot, phase = next_stage(slot, phase, cfg.num_stages)
        warpgroup.wait_group(0)
        self.release(empty + last, lane)
        if cutlass.const_expr(cfg.reduces):
            self.reduce_and_store(
                num_n, sums, smem_sums, parity, lane, wg_k, rank, global_scale, out,
                m_tile, expert, row0, rows, ld_out, swiglu_limit,
            )  # fmt: skip
        else:
            for r in cutlass.range_constexpr(cfg.num_m64):
                block = m_tile * cfg.m64_per_tile + wg_m * cfg.num_m64 + r
                factors = self.epilogue.factors(global_scale, expert, block, lane)
                place, pitch = self.epilogue.place(out, row0, block, lane, ld_out)
                for j in cutlass.range_constexpr(num_n // 8):
                    values = [sums[r][4 * j + idx] for idx in range(4)]
                    self.epilogue.store(
                        values, factors, place, pitch, rows - (8 * j + 2 * (lane % 4)), lane, swiglu_limit
                    )
                    place += 8 * pitch

    @cute.jit
    def release(self, barrier: cute.Pointer, lane: Int32) -> None:
        """A warp is done with a stage: it has read its codes and its products are finished. Every CTA that writes
        into the stage must know."""
        if cutlass.const_expr(self.cfg.cluster_m > 1):
            if lane % 32 < self.cfg.cluster_m:
                ptx.arrive_remote(barrier, lane % 32)
        else:
            if lane % 32 == 0:
                cute.arch.mbarrier_arrive(barrier)

    def load_fragments(
        self,
        smem_codes: cute.Pointer,
        smem_scales: cute.Pointer,
        slot: Int32,
        wg_m: Int32,
        wg_k: Int32,
        lane: Int32,
    ) -> tuple[list[Any], list[Any]]:
        """This thread's codes (one word per k16 step) and scales (one word for two steps) of each 64-row block."""
        cfg = self.cfg
        words, scale_words = [], []
        for r in range(cfg.num_m64):
            block = (slot * cfg.m64_per_tile + wg_m * cfg.num_m64 + r) * cfg.warpgroups_k + wg_k
            base = smem_codes.toint() + block * cfg.code_bytes + lane * 16
            scale_base = smem_scales.toint() + block * cfg.scale_bytes + (lane // 32) * 64 + (lane % 32) // 4 * 8
            halves = range(self.chunks_per_group)
            words.append([word for half in halves for word in ptx.load_shared_vec4(base + half * (WG * 16))])
            scale_words.append([word for half in halves for word in ptx.load_shared_vec2(scale_base + half * 256)])
        return words, scale_words

    def decode(self, word: Any, scales: Any, fragment: Any, start: int) -> None:
        """Eight codes of one k16 step to BF16: registers (row g, low k), (g + 8, low), (g, high), (g + 8, high)."""
        scale_low, scale_high = ptx.broadcast_halves(scales | Uint32(0x70007000))
        wanted = Uint32(0x81C081C0)
        first = word & wanted
        second = ptx.rotate_right(word, 3) & wanted
        third = ptx.rotate_right(word, 6) & wanted
        fourth = ptx.mad(word & Uint32(0x001B001B), 0x1084, 0) & wanted
        fragment[start] = ptx.mul_bf16x2(first, scale_low)
        fragment[start + 1] = ptx.mul_bf16x2(second, scale_high)
        fragment[start + 2] = ptx.mul_bf16x2(third, scale_low)
        fragment[start + 3] = ptx.mul_bf16x2(fourth, scale_high)

    @cute.jit
    def reduce_and_store(
        self,
        num_n: int,
        sums: list[Any],
        smem_sums: cute.Pointer,
        parity: Int32,
        lane: Int32,
        wg_k: Int32,
        rank: Int32,
        global_scale: cute.Pointer,
        out: cute.Pointer,
        m_tile: Int32,
        expert: Int32,
        row0: Int32,
        rows: Int32,
        ld_out: Int32,
        swiglu_limit: Float32,
    ) -> None:
        """Sums the partial tiles of all warpgroups (and CTAs of the cluster) in a fixed order, then the epilogue."""
        cfg = self.cfg
        pieces = num_n // 8
        part_bytes = cfg.num_m64 * pieces * WG * 16
        base = smem_sums.toint()
        if cutlass.const_expr(cfg.cluster_k == 1):
            # Two buffers in turn: a warpgroup one tile ahead must not overwrite sums that are still read.
            base += parity * (cfg.reduce_bytes // 2)
        for r in cutlass.range_constexpr(cfg.num_m64):
            for j in cutlass.range_constexpr(pieces):
                address = base + wg_k * part_bytes + (r * pieces + j) * (WG * 16) + lane * 16
                ptx.store_shared_vec4(address, tuple(sums[r][4 * j + idx] for idx in range(4)))
        if cutlass.const_expr(cfg.cluster_k > 1):
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        else:
            ptx.named_barrier(1, WG * cfg.warpgroups_k)
        for r in cutlass.range_constexpr(cfg.num_m64):
            block = m_tile * cfg.m64_per_tile + r
            for j in cutlass.range_constexpr(pieces):
                unit = r * pieces + j
                owner = unit // cfg.cluster_k % cfg.warpgroups_k
                if rank == unit % cfg.cluster_k and wg_k == owner:
                    total = [Float32(0.0)] * 4
                    for part in cutlass.range_constexpr(cfg.cluster_k * cfg.warpgroups_k):
                        address = base + part % cfg.warpgroups_k * part_bytes + unit * (WG * 16) + lane * 16
                        piece = ptx.load_cluster_vec4(address, Int32(part // cfg.warpgroups_k))
                        total = [a + b for a, b in zip(total, piece, strict=True)]
                    factors = self.epilogue.factors(global_scale, expert, block, lane)
                    place, pitch = self.epilogue.place(out, row0, block, lane, ld_out)
                    left = rows - (8 * j + 2 * (lane % 4))
                    self.epilogue.store(total, factors, place + 8 * j * pitch, pitch, left, lane, swiglu_limit)
        if cutlass.const_expr(cfg.cluster_k > 1):
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()


def compile_gemm(config: GemmConfig) -> Any:
    """Compiles for sm_90a; no GPU is needed."""
    ptr = cute.runtime.make_ptr
    space = cute.AddressSpace.gmem
    count = Int32(1)
    return cute.compile(
        Gemm(config),
        ptr(BFloat16, 1024, space, assumed_align=16),
        ptr(Uint8, 1024, space, assumed_align=128),
        ptr(Uint8, 1024, space, assumed_align=128),
        ptr(Float32, 1024, space, assumed_align=4),
        ptr(BFloat16, 1024, space, assumed_align=4),
        ptr(Int32, 1024, space, assumed_align=16),
        count, Int32(64), count, count, count, count, Float32(0.0), count,
    )  # fmt: skip
