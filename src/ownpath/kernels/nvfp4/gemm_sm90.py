"""W4A16 matrix products on Hopper: NVFP4 weights decoded exactly in registers, fed to the tensor cores as operand A.

How it works. The product is taken transposed, y.T = W x.T: weight rows are the M of ``wgmma`` (64 per instruction)
and tokens its N (any multiple of 8), so that one token costs 8 columns rather than 64 rows. Operand A may come from
registers; the packed weights (``kernels.nvfp4.layout``) put the 4-bit codes of each thread's share of A behind each
other, so that a thread gets 32 codes with one 16-byte load and needs no exchange with others. Three producer warps
(codes, scales, tokens) fill a ring of shared-memory stages: weights by plain bulk copies (each 64 x 128 block is
contiguous), tokens by TMA boxes with the 128-byte swizzle that ``wgmma`` reads. Consumer warpgroups decode one to four
k16 steps into a register buffer while the tensor cores work on another.

Decode. ``decode_sm90``: code * scale * 2**-19 in BF16, exact. The epilogue multiplies the float32 sum by global_scale *
2**19.

Why it is fast. Up to about 30 tokens per expert the issue slots are what competes with memory: 13.5 instructions per 8
weights and thread (5 logic, 2 rotations, 1 multiply-add, 4 BF16 multiplies, 1.5 for the scale) is why the bit layout is
as odd as it is. With many tokens the size of the token boxes decides: 64 rows a copy, not 8 or 16, and tiles of up to
256 tokens, so that a decoded weight is used often.

Roofline. Below about 150 tokens per expert: bytes, 0.5625 per weight at 4.41 TB/s. Above: ``wgmma``, 781 TFLOP/s
(measured with cuBLAS) and in practice the power limit. Limits: K a multiple of 128, rows a multiple of 64 times the
tile; sm_90a only.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
from cutlass import BFloat16, Float32, Int32, Int64, Uint8, Uint32, cute
from cutlass.cute.nvgpu import cpasync, warpgroup

from ownpath.kernels.dsl import ptx
from ownpath.kernels.dsl.pipeline import Consumer, Pipeline, Stages
from ownpath.kernels.dsl.warpgroup import Operands, Thread, decoded_mma, shared_operand, wgmma
from ownpath.kernels.nvfp4.config import BLOCK_K, CHUNK_K, WG, GemmConfig
from ownpath.kernels.nvfp4.decode_sm90 import decode
from ownpath.kernels.nvfp4.epilogue_sm90 import Epilogue
from ownpath.kernels.nvfp4.fragments_sm90 import Fragments, Half
from ownpath.kernels.nvfp4.handover import announce, await_rows
from ownpath.kernels.nvfp4.schedule import Schedule, element
from ownpath.kernels.nvfp4.tile_sm90 import Tile, TileScheduler


@dataclass(frozen=True)
class PartialSums:
    """Buffers for the sums of warpgroups that share K. turn: 0 and 1 from tile to tile; rank: of the CTA."""

    memory: cute.Pointer
    turn: Int32
    rank: Int32


class Gemm:
    """Builds the kernel of one ``GemmConfig``."""

    def __init__(self, config: GemmConfig) -> None:
        self.cfg = config
        self.num_consumers = config.num_consumers
        self.max_n = config.n_sizes[-1]
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
        """Sets the ring up, then loads or multiplies, by warpgroup."""
        cfg = self.cfg
        thread, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        grid, _, _ = cute.arch.grid_dim()
        warp_group = cute.arch.make_warp_uniform(thread // WG)
        stages, partial_sums = self.allocate()
        if thread == 0:
            cpasync.prefetch_descriptor(tma_x)
            stages.pipeline.init(3, 4 * self.num_consumers)
        cute.arch.sync_threads()
        scheduler = self.share(cta, grid, Schedule(schedule), num_rows, num_m_tiles, num_k_blocks, rows_per_tile)
        if warp_group == self.num_consumers:
            if cutlass.const_expr(cfg.consumer_registers):
                cute.arch.setmaxregister_decrease(cfg.producer_registers)
            warp = cute.arch.make_warp_uniform(thread % WG // 32)
            if warp < 2:
                if thread % 32 == 0:
                    source, target, num_bytes = codes.toint(), stages.weights.toint(), Int32(cfg.code_bytes)
                    if warp == 1:
                        source, target, num_bytes = scales.toint(), stages.scales.toint(), Int32(cfg.scale_bytes)
                    self.load_weights(source, target, num_bytes, stages.pipeline, scheduler)
            elif warp == 2:
                # Single rows are loaded by all lanes of the warp, boxes by one.
                if thread % 32 < (32 if cfg.gather else 1):
                    self.load_tokens(ptx.descriptor_address(tma_x), thread % 32, stages, scheduler)
        else:
            if cutlass.const_expr(cfg.consumer_registers):
                cute.arch.setmaxregister_increase(cfg.consumer_registers)
            epilogue = Epilogue(cfg, global_scale, out, ld_out, swiglu_limit)
            self.multiply(scheduler, stages, partial_sums, epilogue, thread, warp_group)
        if cutlass.const_expr(cfg.cluster_m > 1):
            # No CTA leaves while its neighbour may still write to it or signal it.
            cute.arch.sync_threads()
            ptx.cluster_barrier()

    def allocate(self) -> tuple[Stages, cute.Pointer]:
        """Allocates all of a CTA's shared memory: the ring and buffers for partial sums."""
        cfg = self.cfg
        tokens = cute.arch.alloc_smem(BFloat16, cfg.num_stages * self.num_chunks * self.max_n * CHUNK_K, 1024)
        blocks = cfg.num_stages * cfg.m64_per_tile * cfg.warpgroups_k
        codes = cute.arch.alloc_smem(Uint8, blocks * cfg.code_bytes, 128)
        scales = cute.arch.alloc_smem(Uint8, blocks * cfg.scale_bytes, 128)
        sums = cute.arch.alloc_smem(Uint8, cfg.reduce_bytes, 128) if cfg.reduces else codes
        return Stages(tokens, codes, scales, Pipeline.allocate(cfg.num_stages, cfg.cluster_m)), sums

    @cute.jit
    def share(
        self,
        worker: Int32,
        num_workers: Int32,
        schedule: Schedule,
        num_rows: Int32,
        num_m_tiles: Int32,
        num_k_blocks: Int32,
        rows_per_tile: Int32,
    ) -> TileScheduler:
        """Waits until the schedule may be read and returns the share of CTA ``worker`` of ``num_workers``."""
        cfg = self.cfg
        rank, rank_m = Int32(0), Int32(0)
        if cutlass.const_expr(cfg.cluster > 1):
            worker, num_workers = worker // cfg.cluster, num_workers // cfg.cluster
        if cutlass.const_expr(cfg.cluster_k > 1):
            rank = cute.arch.block_idx_in_cluster()
        if cutlass.const_expr(cfg.cluster_m > 1):
            # The neighbour writes tokens into this CTA's memory: its barriers must be initialised before.
            rank_m = cute.arch.block_idx_in_cluster()
            ptx.cluster_barrier()
        if cutlass.const_expr(cfg.grouped and cfg.swiglu):
            cute.arch.griddepcontrol_wait()
        num_n_tiles = Int32(0)
        if cutlass.const_expr(cfg.grouped):
            num_n_tiles = schedule.num_tiles()
        else:
            num_n_tiles = (num_rows + rows_per_tile - 1) // rows_per_tile
        m_per_worker = num_m_tiles // cfg.cluster_m
        k_units = num_k_blocks * (BLOCK_K // cfg.stage_k)
        return TileScheduler(
            cfg=cfg,
            schedule=schedule,
            num_rows=num_rows,
            rows_per_tile=rows_per_tile,
            worker=worker,
            num_workers=num_workers,
            m_per_worker=m_per_worker,
            num_n_tiles=num_n_tiles,
            num_tiles=num_n_tiles * m_per_worker,
            k_units=k_units,
            k_iters=k_units // (cfg.warpgroups_k * cfg.cluster_k),
            rank=rank,
            rank_m=rank_m,
        )

    @cute.jit
    def load_weights(
        self, source: Int64, target: Int32, num_bytes: Int32, pipeline: Pipeline, scheduler: TileScheduler
    ) -> None:
        """Loads the codes (or the scales) of every stage, ``num_bytes`` per block, as stages become free. One thread.

        It does not wait for the previous kernel, because weights do not depend on it.
        """
        cfg = self.cfg
        m64, k_blocks = cfg.m64_per_tile, cfg.warpgroups_k
        ring = pipeline.producer()
        for idx in cutlass.range(scheduler.worker, scheduler.num_tiles, scheduler.num_workers, unroll=1):
            tile = scheduler.tile(idx)
            m_tile = (tile.expert * scheduler.m_per_worker + tile.m_group) * cfg.cluster_m + scheduler.rank_m
            first = Int64(m_tile * m64) * scheduler.k_units
            start = source + (first + scheduler.rank * scheduler.k_iters * k_blocks) * num_bytes
            for _ in cutlass.range(scheduler.k_iters, unroll=1):
                ring.acquire()
                ring.commit(m64 * k_blocks * num_bytes)
                place = target + ring.slot * (m64 * k_blocks) * num_bytes
                for r in cutlass.range_constexpr(m64):
                    block = start + Int64(r * scheduler.k_units * num_bytes)
                    ptx.load_bulk(
                        place + r * k_blocks * num_bytes, block, k_blocks * num_bytes, ring.full,
                        not cfg.reuses_weights,
                    )  # fmt: skip
                start += k_blocks * num_bytes
                ring.advance()

    @cute.jit
    def load_tokens(self, descriptor: Int64, lane: Int32, stages: Stages, scheduler: TileScheduler) -> None:
        """Loads the tokens of every stage. One thread, or a warp for single rows."""
        cfg = self.cfg
        if cutlass.const_expr(not cfg.follows):
            cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        ring = stages.pipeline.producer()
        for idx in cutlass.range(scheduler.worker, scheduler.num_tiles, scheduler.num_workers, unroll=1):
            tile = scheduler.tile(idx)
            if cutlass.const_expr(cfg.follows):
                # Gate and up rows: two for each of this product's columns.
                await_rows(scheduler.schedule.counter(tile.n_tile), 2 * CHUNK_K * self.num_chunks * scheduler.k_iters)
            boxes = (tile.rows + cfg.box_rows - 1) // cfg.box_rows
            places = cute.make_rmem_tensor(cute.make_layout((self.max_n + 31) // 32), Int32)
            if cutlass.const_expr(cfg.gather):
                tokens = scheduler.schedule.tokens()
                for turn in cutlass.range_constexpr((self.max_n + 31) // 32):
                    places[turn] = Int32(0)
                    if lane + 32 * turn < tile.rows:
                        places[turn] = element(tokens, tile.row0 + lane + 32 * turn)[0]
            for k in cutlass.range(scheduler.k_iters, unroll=1):
                ring.acquire()
                if lane == 0:
                    ring.commit(boxes * (cfg.box_rows * CHUNK_K * 2 * self.num_chunks))
                for chunk in cutlass.range_constexpr(self.num_chunks):
                    column = ((scheduler.rank * scheduler.k_iters + k) * self.num_chunks + chunk) * CHUNK_K
                    start = stages.tokens + (ring.slot * self.num_chunks + chunk) * (self.max_n * CHUNK_K)
                    if cutlass.const_expr(cfg.gather):
                        for turn in cutlass.range_constexpr((self.max_n + 31) // 32):
                            row = lane + 32 * turn
                            if row < tile.rows:
                                ptx.load_box(start + row * CHUNK_K, descriptor, column, places[turn], ring.full)
                    else:
                        # The CTAs of a cluster take turns, each loading for all of them.
                        for box in cutlass.range(scheduler.rank_m, boxes, cfg.cluster_m, unroll=1):
                            first = box * cfg.box_rows
                            place = start + first * CHUNK_K
                            ptx.load_box(place, descriptor, column, tile.row0 + first, ring.full, cfg.cluster_m)
                ring.advance()

    @cute.jit
    def multiply(
        self,
        scheduler: TileScheduler,
        stages: Stages,
        partial_sums: cute.Pointer,
        epilogue: Epilogue,
        thread: Int32,
        warp_group: Int32,
    ) -> None:
        """Multiplies a warpgroup's part of every tile, with the code for the tile's number of tokens."""
        cfg = self.cfg
        step, turn = Int32(0), Int32(0)
        for idx in cutlass.range(scheduler.worker, scheduler.num_tiles, scheduler.num_workers, unroll=1):
            tile = scheduler.tile(idx)
            for size_idx in cutlass.range_constexpr(len(cfg.n_sizes)):
                below = cfg.n_sizes[size_idx - 1] if size_idx else 0
                if tile.rows > below and tile.rows <= cfg.n_sizes[size_idx]:
                    place = Thread(thread % WG, warp_group // cfg.warpgroups_k, warp_group % cfg.warpgroups_k)
                    ring, operands = stages.pipeline.consumer_at(step), Operands(place, stages, scheduler.k_iters)
                    partial = PartialSums(partial_sums, turn, scheduler.rank)
                    self.consume(cfg.n_sizes[size_idx], tile, ring, operands, partial, epilogue)
            if cutlass.const_expr(cfg.hands_over):
                announce(scheduler.schedule.counter(tile.n_tile), thread, 16 * cfg.num_m64 // cfg.warpgroups_k)
            step += scheduler.k_iters
            turn = turn ^ 1

    @cute.jit
    def consume(
        self,
        num_n: int,
        tile: Tile,
        ring: Consumer,
        operands: Operands,
        partial: PartialSums,
        epilogue: Epilogue,
    ) -> None:
        """Computes a tile of at most ``num_n`` tokens: the product over K, then the epilogue."""
        cfg = self.cfg
        thread = operands.thread
        mma = decoded_mma(num_n)
        thr_mma = mma.get_slice(thread.idx)
        chunks = cfg.num_stages * self.num_chunks
        shared = shared_operand(operands.stages.tokens, BFloat16, num_n, chunks, self.max_n * CHUNK_K)
        tokens = thr_mma.make_fragment_B(thr_mma.partition_B(shared))
        sums = [cute.make_rmem_tensor(thr_mma.partition_shape_C((64, num_n)), Float32) for _ in range(cfg.num_m64)]
        for acc in sums:
            acc.fill(0.0)
        depth, group, blocks = cfg.depth, cfg.group, cfg.blocks_of_a_group
        weights = [
            [thr_mma.make_fragment_A(thr_mma.partition_shape_A((64, 16 * group))) for _ in range(blocks)]
            for _ in range(depth)
        ]
        # The assembler must not recognise this as a constant: it would load it again for every use.
        scale_bits = Uint32(0x0FF00FF0) | Uint32(epilogue.ld_out >> 31)
        fragments = Fragments.of(cfg, operands.stages, thread)
        last = ring.slot
        for k in cutlass.range(operands.k_iters, unroll=1):
            ring.wait()
            halves: list[Half] = []
            for turn in cutlass.range_constexpr(cfg.num_groups):
                # Buffers alternate: products of the last ``depth - 1`` groups run while this one is decoded.
                buffer = weights[turn % depth]
                part, first_block = cfg.group_at(turn)
                fragments.load(halves, ring.slot, turn)
                for r in cutlass.range_constexpr(blocks):
                    fragment = cute.recast_tensor(buffer[r], Uint32)
                    for kk in cutlass.range_constexpr(group):
                        word, scales = fragments.words(halves, first_block + r, part * group + kk)
                        for idx, register in enumerate(decode(word, scales & scale_bits)):
                            fragment[4 * kk + idx] = register
                warpgroup.fence()
                for kk in cutlass.range_constexpr(group):
                    k16 = part * group + kk
                    chunk = ring.slot * self.num_chunks + thread.wg_k * self.chunks_per_group + k16 // 4
                    for r in cutlass.range_constexpr(blocks):
                        wgmma(mma, buffer[r][None, None, kk], tokens[None, None, k16 % 4, chunk], sums[first_block + r])
                warpgroup.commit_group()
                warpgroup.wait_group(depth - 1)
                if cutlass.const_expr(turn == depth - 2):
                    # Every product of the previous stage is done.
                    if k > 0:
                        ring.release(last, thread.idx)
            last = ring.slot
            ring.advance()
        warpgroup.wait_group(0)
        ring.release(last, thread.idx)
        if cutlass.const_expr(cfg.reduces):
            self.reduce_and_store(sums, tile, thread, partial, epilogue)
        else:
            self.store(sums, tile, thread, epilogue)

    @cute.jit
    def store(self, sums: list[cute.Tensor], tile: Tile, thread: Thread, epilogue: Epilogue) -> None:
        """Stores the sums of this warpgroup's rows, which are complete."""
        cfg = self.cfg
        for r in cutlass.range_constexpr(cfg.num_m64):
            rows = epilogue.rows(tile, tile.m_tile * cfg.m64_per_tile + thread.wg_m * cfg.num_m64 + r, thread)
            for j in cutlass.range_constexpr(cute.size(sums[r]) // 4):
                values = [sums[r][4 * j + idx] for idx in range(4)]
                epilogue.store(values, rows, j)

    @cute.jit
    def reduce_and_store(
        self, sums: list[cute.Tensor], tile: Tile, thread: Thread, partial: PartialSums, epilogue: Epilogue
    ) -> None:
        """Sums the partial tiles of all warpgroups (and CTAs of the cluster) in a fixed order, then the epilogue."""
        cfg = self.cfg
        pieces = cute.size(sums[0]) // 4
        part_bytes = cfg.num_m64 * pieces * WG * 16
        base = partial.memory.toint()
        if cutlass.const_expr(cfg.cluster_k == 1):
            # Two buffers alternate: a warpgroup that is one tile ahead must not overwrite sums that are still read.
            base += partial.turn * (cfg.reduce_bytes // 2)
        for r in cutlass.range_constexpr(cfg.num_m64):
            for j in cutlass.range_constexpr(pieces):
                address = base + thread.wg_k * part_bytes + (r * pieces + j) * (WG * 16) + thread.idx * 16
                ptx.store_shared_vec4(address, tuple(sums[r][4 * j + idx] for idx in range(4)))
        if cutlass.const_expr(cfg.cluster_k > 1):
            ptx.cluster_barrier()
        else:
            ptx.named_barrier(1, WG * cfg.warpgroups_k)
        for r in cutlass.range_constexpr(cfg.num_m64):
            block = tile.m_tile * cfg.m64_per_tile + r
            for j in cutlass.range_constexpr(pieces):
                unit = r * pieces + j
                owner = unit // cfg.cluster_k % cfg.warpgroups_k
                if partial.rank == unit % cfg.cluster_k and thread.wg_k == owner:
                    total = [Float32(0.0)] * 4
                    for peer in cutlass.range_constexpr(cfg.cluster_k * cfg.warpgroups_k):
                        address = base + peer % cfg.warpgroups_k * part_bytes + unit * (WG * 16) + thread.idx * 16
                        piece = ptx.load_cluster_vec4(address, Int32(peer // cfg.warpgroups_k))
                        total = [a + b for a, b in zip(total, piece, strict=True)]
                    epilogue.store(total, epilogue.rows(tile, block, thread), j)
        if cutlass.const_expr(cfg.cluster_k > 1):
            ptx.cluster_barrier()


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
