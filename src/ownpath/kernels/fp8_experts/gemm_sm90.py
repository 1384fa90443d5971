"""Experts' products on Hopper's FP8 tensor cores: 4-bit weights decoded to E4M3 in registers, E4M3 tokens.

How it works. As ``nvfp4.gemm_sm90``: y.T = W x.T, weight rows are the M of ``wgmma`` and its operand A comes from
registers, tokens are its N. Four producer warps fill a ring of stages of 128 columns: codes, their scales, tokens
(TMA boxes), and the tokens' scales (4-byte copies, because an expert's first row has no alignment). A consumer
warpgroup decodes one K block ahead while its products run, and adds a finished group of products to the float32 totals
times the scale of each token's 1 x 128 block: the promotion that FP8 sums of about 14 bits need.

Decode. An E2M1 code times a power of two is an E4M3 number, so a scale selects one of 16 tables of eight bytes in
shared memory, and three bits of a code select a byte of it: ``prmt`` looks up four codes at once. The layout
(``fp8_experts.layout``) has the magnitudes of two groups of four in nibbles and puts the first group's signs where a
byte has its own. 7 instructions per 8 weights, and 3 for the table of 8. What the window of 15 powers leaves over is
one power of two per weight row, part of the row's multiplier.

Why it is fast. A decoded weight meets up to 256 tokens; codes are half the bytes of E4M3 on their way from L2, tokens
are multicast to a cluster's CTAs. While one warpgroup promotes, the other one's products may run.

Roofline. Below about 150 tokens per expert: bytes, 0.53 per weight. Above: FP8 ``wgmma``, 1222 TFLOP/s measured with
operands in memory; 800 to 880 here (192 tokens per expert). Nothing keeps the two warpgroups apart: where they fall
into step, they multiply together, then promote together. Limits: K a multiple of 256, rows of the tile; sm_90a.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
from cutlass import BFloat16, Float8E4M3FN, Float32, Int32, Int64, Uint8, Uint32, cute
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.utils.hopper_helpers import make_trivial_tiled_mma

from ownpath.kernels.dsl import ptx
from ownpath.kernels.dsl.pipeline import Consumer, Pipeline
from ownpath.kernels.dsl.warpgroup import Thread, shared_operand, wgmma
from ownpath.kernels.fp8_experts import ptx as own_ptx
from ownpath.kernels.fp8_experts.config import TABLE_BYTES, ExpertGemmConfig, part_sizes
from ownpath.kernels.fp8_experts.epilogue_sm90 import RowScaledEpilogue
from ownpath.kernels.fp8_experts.layout import TABLES
from ownpath.kernels.nvfp4.config import BLOCK_K, WG
from ownpath.kernels.nvfp4.schedule import Schedule
from ownpath.kernels.nvfp4.tile_sm90 import Tile, TileScheduler


@dataclass(frozen=True)
class Ring:
    """The shared memory of the stages, and the decoding tables. act_scales: of the tokens, float32."""

    tokens: cute.Pointer
    act_scales: cute.Pointer
    codes: cute.Pointer
    scales: cute.Pointer
    tables: cute.Pointer
    pipeline: Pipeline


class TileWork:
    """A warpgroup's registers for one tile: operands, totals and the sums of the group in flight.

    buffers: decoded weights of two units (a unit is 64 rows of a K block). size: tokens of a part, a group's.
    """

    def __init__(self, cfg: ExpertGemmConfig, ring: Ring, thread: Thread, num_n: int) -> None:
        self.cfg, self.ring, self.thread = cfg, ring, thread
        parts = part_sizes(num_n, cfg.parts)
        self.num_parts, self.size = len(parts), parts[0]
        self.mma = _mma(self.size)
        mine = self.mma.get_slice(thread.idx)
        self.tokens = []
        for part in range(self.num_parts):
            start = ring.tokens + part * self.size * BLOCK_K
            operand = shared_operand(start, Float8E4M3FN, self.size, cfg.num_stages, cfg.token_bytes)
            self.tokens.append(mine.make_fragment_B(mine.partition_B(operand)))
        shape = mine.partition_shape_C((64, self.size))
        self.buffers = [mine.make_fragment_A(mine.partition_shape_A((64, BLOCK_K))) for _ in range(2)]
        self.sums = cute.make_rmem_tensor(shape, Float32)
        self.totals = [
            [cute.make_rmem_tensor(shape, Float32) for _ in range(self.num_parts)] for _ in range(cfg.num_m64)
        ]

    def decode(self, slot: Int32, r: int, buffer: int) -> None:
        """Decodes 64 rows of a stage into a buffer."""
        cfg, ring, thread = self.cfg, self.ring, self.thread
        block = slot * cfg.m64_per_tile + thread.wg_m * cfg.num_m64 + r
        base = ring.codes.toint() + block * cfg.code_bytes + thread.idx * 16
        scale_base = ring.scales.toint() + block * cfg.scale_bytes + thread.warp * 64 + thread.row * 8
        rows = ptx.load_shared_vec2(scale_base)
        words = [*ptx.load_shared_vec4(base), *ptx.load_shared_vec4(base + WG * 16)]
        fragment = cute.recast_tensor(self.buffers[buffer], Uint32)
        for k32 in range(4):
            for half in range(2):
                table = ring.tables.toint() + own_ptx.extract_byte(rows[half], k32)
                first, second = _decode(words[2 * k32 + half], own_ptx.load_table(table))
                fragment[4 * k32 + half] = first
                fragment[4 * k32 + 2 + half] = second

    def issue(self, slot: Int32, part: int, buffer: int) -> None:
        """Starts the products of a buffer with the tokens of a part."""
        warpgroup.fence()
        for k32 in range(4):
            a, b = self.buffers[buffer][None, None, k32], self.tokens[part][None, None, k32, slot]
            wgmma(self.mma, a, b, self.sums, k32 > 0)
        warpgroup.commit_group()

    def promote(self, slot: Int32, r: int, part: int) -> None:
        """Adds a finished part's sums to its totals, times the tokens' scales."""
        total, sums = self.totals[r][part], self.sums
        base = self.ring.act_scales.toint() + slot * (4 * self.cfg.padded_n) + self.thread.pair * 16
        eight, end = part * self.size // 8, (part + 1) * self.size // 8
        at = 0
        while eight < end:
            # Scales of two eights lie together; a part may begin or end between them.
            count = 2 if eight % 2 == 0 and eight + 1 < end else 1
            scales = own_ptx.load_shared_floats(base + eight // 2 * 64 + eight % 2 * 8, 2 * count)
            added = [total[at + idx] + sums[at + idx] * scales[idx // 4 * 2 + idx % 2] for idx in range(4 * count)]
            # Without this the compiler may add them after the next group has overwritten the sums, from copies.
            for idx, value in enumerate(own_ptx.pin(added)):
                total[at + idx] = value
            eight, at = eight + count, at + 4 * count


def _mma(num_n: int) -> cute.TiledMma:
    """Makes the 64 x ``num_n`` x 32 E4M3 MMA with float32 sums and operand A from registers."""
    major, source = cute.nvgpu.OperandMajorMode.K, warpgroup.OperandSource.RMEM
    shape = (64, num_n)
    return make_trivial_tiled_mma(Float8E4M3FN, Float8E4M3FN, major, major, Float32, (1, 1, 1), shape, a_source=source)


def _decode(word: Uint32, table: tuple[Uint32, Uint32]) -> tuple[Uint32, Uint32]:
    """Decodes the two groups of four codes of a word to E4M3."""
    magnitudes = word & Uint32(0x77777777)
    first = own_ptx.choose_bytes(*table, magnitudes)
    second = own_ptx.choose_bytes(*table, magnitudes >> 16)
    return own_ptx.merge_signs(first, word), own_ptx.merge_signs(second, word << 4)


class ExpertGemm:
    """Builds the kernel of one ``ExpertGemmConfig``."""

    def __init__(self, config: ExpertGemmConfig) -> None:
        self.cfg = config
        self.max_n = config.n_sizes[-1]

    @cute.jit
    def __call__(
        self,
        x: cute.Pointer,
        act_scales: cute.Pointer,
        codes: cute.Pointer,
        scales: cute.Pointer,
        row_scales: cute.Pointer,
        out: cute.Pointer,
        schedule: cute.Pointer,
        num_rows: Int32,
        num_cols: Int32,
        num_m_tiles: Int32,
        num_k_blocks: Int32,
        ld_scales: Int32,
        ld_out: Int32,
        swiglu_limit: Float32,
        grid: Int32,
    ) -> None:
        """Host side, used to compile only: the launcher passes the same arguments with its own tensor map."""
        tokens = cute.make_tensor(x, cute.make_layout((num_rows, num_cols), stride=(num_cols, 1)))
        box = cute.make_layout((8, 64), stride=(64, 1))
        op = cpasync.CopyBulkTensorTileG2SOp()
        atom, _ = cpasync.make_tiled_tma_atom(op, tokens, box, (8, 64))
        self.kernel(
            atom, act_scales, codes, scales, row_scales, out, schedule,
            num_m_tiles, num_k_blocks, ld_scales, ld_out, swiglu_limit,
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
        act_scales: cute.Pointer,
        codes: cute.Pointer,
        scales: cute.Pointer,
        row_scales: cute.Pointer,
        out: cute.Pointer,
        schedule: cute.Pointer,
        num_m_tiles: Int32,
        num_k_blocks: Int32,
        ld_scales: Int32,
        ld_out: Int32,
        swiglu_limit: Float32,
    ) -> None:
        """Sets the ring up, then loads or multiplies, by warpgroup. ld_scales: floats from one K block to the next."""
        cfg = self.cfg
        thread, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        grid, _, _ = cute.arch.grid_dim()
        warp_group = cute.arch.make_warp_uniform(thread // WG)
        ring = self.allocate()
        if thread == 0:
            cpasync.prefetch_descriptor(tma_x)
            # Three producers of bytes, and the 32 lanes that copy the tokens' scales.
            ring.pipeline.init(3 + 32, 4 * cfg.num_consumers)
            for idx, (low, high) in enumerate(TABLES):
                own_ptx.store_shared_vec2(ring.tables.toint() + 8 * idx, Uint32(low), Uint32(high))
        cute.arch.sync_threads()
        scheduler = self.share(cta, grid, Schedule(schedule), num_m_tiles, num_k_blocks)
        if warp_group == cfg.num_consumers:
            cute.arch.setmaxregister_decrease(cfg.producer_registers)
            warp = cute.arch.make_warp_uniform(thread % WG // 32)
            if warp < 2:
                if thread % 32 == 0:
                    source, target, num_bytes = codes.toint(), ring.codes.toint(), Int32(cfg.code_bytes)
                    if warp == 1:
                        source, target, num_bytes = scales.toint(), ring.scales.toint(), Int32(cfg.scale_bytes)
                    self.load_weights(source, target, num_bytes, ring.pipeline, scheduler)
            elif warp == 2:
                if thread % 32 == 0:
                    self.load_tokens(ptx.descriptor_address(tma_x), ring, scheduler)
            else:
                self.load_act_scales(act_scales, ld_scales, thread % 32, ring, scheduler)
        else:
            cute.arch.setmaxregister_increase(cfg.consumer_registers)
            num_rows = num_m_tiles * (64 * cfg.m64_per_tile)
            epilogue = RowScaledEpilogue(cfg, row_scales, out, ld_out, swiglu_limit, num_rows)
            self.multiply(scheduler, ring, epilogue, Thread(thread % WG, warp_group))
        if cutlass.const_expr(cfg.cluster_m > 1):
            # No CTA leaves while its neighbour may still write to it or signal it.
            cute.arch.sync_threads()
            ptx.cluster_barrier()

    def allocate(self) -> Ring:
        """Allocates all of a CTA's shared memory."""
        cfg = self.cfg
        tokens = cute.arch.alloc_smem(Uint8, cfg.num_stages * cfg.token_bytes, 1024)
        blocks = cfg.num_stages * cfg.m64_per_tile
        codes = cute.arch.alloc_smem(Uint8, blocks * cfg.code_bytes, 128)
        scales = cute.arch.alloc_smem(Uint8, blocks * cfg.scale_bytes, 128)
        act_scales = cute.arch.alloc_smem(Float32, cfg.num_stages * cfg.padded_n, 128)
        tables = cute.arch.alloc_smem(Uint8, TABLE_BYTES, 128)
        return Ring(tokens, act_scales, codes, scales, tables, Pipeline.allocate(cfg.num_stages, cfg.cluster_m))

    @cute.jit
    def share(
        self, cta: Int32, num_ctas: Int32, schedule: Schedule, num_m_tiles: Int32, num_k_blocks: Int32
    ) -> TileScheduler:
        """Returns this CTA's share of the tiles. The schedule is complete: the kernel before waited for it."""
        cfg = self.cfg
        rank_m = Int32(0)
        if cutlass.const_expr(cfg.cluster_m > 1):
            # The neighbour writes tokens into this CTA's memory: its barriers must be initialised before.
            rank_m = cute.arch.block_idx_in_cluster()
            ptx.cluster_barrier()
        m_per_worker, num_n_tiles = num_m_tiles // cfg.cluster_m, schedule.num_tiles()
        return TileScheduler(
            cfg=cfg,
            schedule=schedule,
            num_rows=Int32(0),
            rows_per_tile=Int32(0),
            worker=cta // cfg.cluster_m,
            num_workers=num_ctas // cfg.cluster_m,
            m_per_worker=m_per_worker,
            num_n_tiles=num_n_tiles,
            num_tiles=num_n_tiles * m_per_worker,
            k_units=num_k_blocks,
            k_iters=num_k_blocks,
            rank=Int32(0),
            rank_m=rank_m,
        )

    @cute.jit
    def load_weights(
        self, source: Int64, target: Int32, num_bytes: Int32, pipeline: Pipeline, scheduler: TileScheduler
    ) -> None:
        """Loads the codes (or the scales) of every stage, ``num_bytes`` per block. One thread.

        It does not wait for the previous kernel, because weights do not depend on it.
        """
        cfg = self.cfg
        m64 = cfg.m64_per_tile
        ring = pipeline.producer()
        for idx in cutlass.range(scheduler.worker, scheduler.num_tiles, scheduler.num_workers, unroll=1):
            tile = scheduler.tile(idx)
            m_tile = (tile.expert * scheduler.m_per_worker + tile.m_group) * cfg.cluster_m + scheduler.rank_m
            start = source + Int64(m_tile * m64) * scheduler.k_units * num_bytes
            for _ in cutlass.range(scheduler.k_iters, unroll=1):
                ring.acquire()
                ring.commit(m64 * num_bytes)
                place = target + ring.slot * m64 * num_bytes
                for r in cutlass.range_constexpr(m64):
                    block = start + Int64(r * scheduler.k_units * num_bytes)
                    ptx.load_bulk(place + r * num_bytes, block, num_bytes, ring.full, not cfg.reuses_weights)
                start += num_bytes
                ring.advance()

    @cute.jit
    def load_tokens(self, descriptor: Int64, ring: Ring, scheduler: TileScheduler) -> None:
        """Loads the tokens of every stage. One thread."""
        cfg = self.cfg
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        producer = ring.pipeline.producer()
        for idx in cutlass.range(scheduler.worker, scheduler.num_tiles, scheduler.num_workers, unroll=1):
            tile = scheduler.tile(idx)
            boxes = (tile.rows + cfg.box_rows - 1) // cfg.box_rows
            for k in cutlass.range(scheduler.k_iters, unroll=1):
                producer.acquire()
                producer.commit(boxes * (cfg.box_rows * BLOCK_K))
                start = cute.recast_ptr(ring.tokens + producer.slot * cfg.token_bytes, dtype=Uint8)
                # The CTAs of a cluster take turns, each loading for all of them.
                for box in cutlass.range(scheduler.rank_m, boxes, cfg.cluster_m, unroll=1):
                    first = box * cfg.box_rows
                    # Two E4M3 make a BF16 of the tensor map.
                    ptx.load_box(
                        start + first * BLOCK_K, descriptor, k * 64, tile.row0 + first, producer.full, cfg.cluster_m
                    )
                producer.advance()

    @cute.jit
    def load_act_scales(
        self, act_scales: cute.Pointer, ld_scales: Int32, lane: Int32, ring: Ring, scheduler: TileScheduler
    ) -> None:
        """Loads the tokens' scales of every stage, in the order in which a thread wants them. One warp.

        Of 16 tokens, thread quarter q finds 2q, 2q + 1, 2q + 8 and 2q + 9 behind each other.
        """
        cfg = self.cfg
        cute.arch.griddepcontrol_wait()
        producer = ring.pipeline.producer()
        for idx in cutlass.range(scheduler.worker, scheduler.num_tiles, scheduler.num_workers, unroll=1):
            tile = scheduler.tile(idx)
            source = act_scales.toint() + Int64(tile.row0 + lane) * 4
            for _ in cutlass.range(scheduler.k_iters, unroll=1):
                producer.acquire()
                base = ring.act_scales.toint() + producer.slot * (4 * cfg.padded_n)
                base += (lane // 16 * 16 + lane % 8 // 2 * 4 + lane // 8 % 2 * 2 + lane % 2) * 4
                for turn in cutlass.range_constexpr((self.max_n + 31) // 32):
                    if lane + 32 * turn < tile.rows:
                        own_ptx.copy_word(base + turn * 128, source + turn * 128)
                own_ptx.arrive_after_copies(producer.full)
                source += Int64(ld_scales) * 4
                producer.advance()

    @cute.jit
    def multiply(self, scheduler: TileScheduler, ring: Ring, epilogue: RowScaledEpilogue, thread: Thread) -> None:
        """Multiplies a warpgroup's part of every tile, with the code for the tile's number of tokens."""
        cfg = self.cfg
        step = Int32(0)
        for idx in cutlass.range(scheduler.worker, scheduler.num_tiles, scheduler.num_workers, unroll=1):
            tile = scheduler.tile(idx)
            for size_idx in cutlass.range_constexpr(len(cfg.n_sizes)):
                below = cfg.n_sizes[size_idx - 1] if size_idx else 0
                if tile.rows > below and tile.rows <= cfg.n_sizes[size_idx]:
                    consumer = ring.pipeline.consumer_at(step)
                    self.consume(cfg.n_sizes[size_idx], tile, consumer, ring, scheduler.k_iters, epilogue, thread)
            step += scheduler.k_iters

    @cute.jit
    def consume(
        self,
        num_n: int,
        tile: Tile,
        consumer: Consumer,
        ring: Ring,
        k_iters: Int32,
        epilogue: RowScaledEpilogue,
        thread: Thread,
    ) -> None:
        """Computes a tile of at most ``num_n`` tokens: the product over K, then the epilogue."""
        cfg = self.cfg
        work = TileWork(cfg, ring, thread, num_n)
        for row in work.totals:
            for total in row:
                total.fill(0.0)
        consumer.wait()
        work.decode(consumer.slot, 0, 0)
        for _ in cutlass.range(k_iters // 2 - 1, unroll=1):
            consumer = self.two_blocks(work, consumer, is_last=False)
        self.two_blocks(work, consumer, is_last=True)
        for r in cutlass.range_constexpr(cfg.num_m64):
            rows = epilogue.rows(tile, tile.m_tile * cfg.m64_per_tile + thread.wg_m * cfg.num_m64 + r, thread)
            for part in cutlass.range_constexpr(work.num_parts):
                total, eights = work.totals[r][part], work.size // 8
                for j in cutlass.range_constexpr(eights):
                    epilogue.store([total[4 * j + idx] for idx in range(4)], rows, part * eights + j)

    def two_blocks(self, work: TileWork, consumer: Consumer, is_last: bool) -> Consumer:
        """Multiplies two K blocks, of which the first unit is decoded, and decodes the next block's first unit.

        Returns the consumer at that block. No product is in flight at the end: the assembler follows groups inside a
        loop's body only, and would wait for each ``wgmma`` otherwise.
        """
        cfg = self.cfg
        num_units, num_parts = 2 * cfg.num_m64, work.num_parts
        for unit in range(num_units):
            r, slot = unit % cfg.num_m64, consumer.slot
            ends_stage, has_next = r == cfg.num_m64 - 1, not (is_last and unit == num_units - 1)
            work.issue(slot, 0, unit % 2)
            if ends_stage:
                consumer.advance()
            if has_next:
                if ends_stage:
                    consumer.wait()
                work.decode(consumer.slot, (r + 1) % cfg.num_m64, (unit + 1) % 2)
            for part in range(num_parts):
                warpgroup.wait_group(0)
                work.promote(slot, r, part)
                if part + 1 < num_parts:
                    work.issue(slot, part + 1, unit % 2)
            if ends_stage:
                consumer.release(slot, work.thread.idx)
        return consumer


def compile_gemm(config: ExpertGemmConfig) -> Any:
    """Compiles for sm_90a; no GPU is needed."""
    ptr = cute.runtime.make_ptr
    space = cute.AddressSpace.gmem
    count = Int32(1)
    return cute.compile(
        ExpertGemm(config),
        ptr(BFloat16, 1024, space, assumed_align=16),
        ptr(Float32, 1024, space, assumed_align=4),
        ptr(Uint8, 1024, space, assumed_align=128),
        ptr(Uint8, 1024, space, assumed_align=128),
        ptr(Float32, 1024, space, assumed_align=4),
        ptr(BFloat16, 1024, space, assumed_align=4),
        ptr(Int32, 1024, space, assumed_align=16),
        count, Int32(64), count, count, count, count, Float32(0.0), count,
    )  # fmt: skip
