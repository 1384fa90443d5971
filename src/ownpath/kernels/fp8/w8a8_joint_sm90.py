"""W8A8 on Hopper with its quantiser in the same launch: the product starts on K's first blocks while the rest is rounded.

How it works. The product is ``w8a8_sm90``'s. Two more warps of every CTA quantise activations into the blocks in global
memory that ``quantize_sm90`` would write, 8 rows by 512 columns at a time, in the order of K. A warp takes its next chunk
from a ticket counter, so that all is done by whichever CTAs run: nothing waits for a CTA that has not started. Rows come
by bulk copies, three chunks ahead. A counter for each 64 rows and 512 columns tells the product's loader that they are
written. The last warp of the grid sets all counters to zero again.

Why it is fast. A quantiser in front takes a launch, reads all of x before the first product, and cannot share an SM with
the product's CTAs, which hold all registers.

Roofline: as ``w8a8_sm90``. Limits: as there; one call of an operand at a time, as calls share its counters.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
from cutlass import BFloat16, Float32, Int32, Int64, Uint8, Uint32, cute
from cutlass.cutlass_dsl import T, dsl_user_op

from ownpath.kernels.dsl import ptx
from ownpath.kernels.dsl.pipeline import Stages
from ownpath.kernels.dsl.ptx import Site, Value, asm
from ownpath.kernels.dsl.warpgroup import Thread
from ownpath.kernels.fp8 import ptx as fp8_ptx
from ownpath.kernels.fp8.config import WG
from ownpath.kernels.fp8.joint_config import CHUNK_BLOCKS, DEPTH, GROUP_ROWS, PITCH, REGISTERS, JointW8A8Config
from ownpath.kernels.fp8.layout import ACT_BLOCK_BYTES, BLOCK_BYTES
from ownpath.kernels.fp8.output_sm90 import Output
from ownpath.kernels.fp8.w8a8_sm90 import W8A8
from ownpath.kernels.fp8.w8a8_tiles_sm90 import CtaTiles

CHUNK_BYTES = GROUP_ROWS * PITCH
CHUNK_COLS = 128 * CHUNK_BLOCKS
GROUPS_PER_M64 = 64 // GROUP_ROWS


@dsl_user_op
def add_acquire_release(address: Value, amount: Value, *, loc: Site = None, ip: Site = None) -> Int32:
    """Adds to a counter in global memory and returns what it held, ordered with this thread's other accesses."""
    operands = [Int64(address).ir_value(loc=loc, ip=ip), Int32(amount).ir_value(loc=loc, ip=ip)]
    text = "atom.acq_rel.gpu.global.add.u32 $0, [$1], $2;"
    return Int32(asm(text, "=r,l,r", T.i32(), operands, False, loc, ip))


@dsl_user_op
def add_relaxed(address: Value, amount: Value, *, loc: Site = None, ip: Site = None) -> Int32:
    """Adds to a counter in global memory and returns what it held."""
    operands = [Int64(address).ir_value(loc=loc, ip=ip), Int32(amount).ir_value(loc=loc, ip=ip)]
    return Int32(asm("atom.relaxed.gpu.global.add.u32 $0, [$1], $2;", "=r,l,r", T.i32(), operands, False, loc, ip))


@dsl_user_op
def add_release(address: Value, amount: Value, *, loc: Site = None, ip: Site = None) -> None:
    """Adds to a counter with release semantics: after all writes that this thread has seen."""
    operands = [Int64(address).ir_value(loc=loc, ip=ip), Int32(amount).ir_value(loc=loc, ip=ip)]
    asm("fence.proxy.async.global; red.release.gpu.global.add.u32 [$0], $1;", "l,r", None, operands, False, loc, ip)


@dsl_user_op
def load_acquire(address: Value, *, loc: Site = None, ip: Site = None) -> Int32:
    """Reads a counter with acquire semantics: before all of this thread's later reads."""
    operands = [Int64(address).ir_value(loc=loc, ip=ip)]
    return Int32(asm("ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", T.i32(), operands, False, loc, ip))


@dsl_user_op
def order_copies(*, loc: Site = None, ip: Site = None) -> None:
    """Makes ordinary stores visible to the copy engine."""
    asm("fence.proxy.async.global;", "", None, [], False, loc, ip)


@dsl_user_op
def as_word(value: Value, *, loc: Site = None, ip: Site = None) -> Uint32:
    """Returns the bits of a float32."""
    return Uint32(asm("mov.b32 $0, $1;", "=r,f", T.i32(), [Float32(value).ir_value(loc=loc, ip=ip)], True, loc, ip))


@dataclass(frozen=True)
class Source:
    """The activations of a call, BF16 [num_tokens, ld_x], the blocks that they are rounded to, and the counters."""

    x: cute.Pointer
    acts: cute.Pointer
    counters: cute.Pointer
    num_tokens: Int32
    width: Int32
    ld_x: Int32
    num_k_blocks: Int32

    @property
    def num_groups(self) -> Int32:
        return (self.num_tokens + (GROUP_ROWS - 1)) // GROUP_ROWS

    @property
    def num_chunks_k(self) -> Int32:
        return (self.num_k_blocks + (CHUNK_BLOCKS - 1)) // CHUNK_BLOCKS

    def flag(self, m64: Int32, chunk_k: Int32) -> Int64:
        """Returns the address of the counter of finished chunks."""
        return (self.counters + (2 + m64 * self.num_chunks_k + chunk_k)).toint()


@dataclass(frozen=True)
class Chunks:
    """A quantising warp's buffers and their barriers."""

    memory: cute.Pointer
    full: cute.Pointer
    lane: Int32


class JointW8A8(W8A8):
    """Builds the kernel of one ``JointW8A8Config``."""

    cfg: JointW8A8Config

    def __init__(self, config: JointW8A8Config) -> None:
        self.cfg = config

    @cute.jit
    def __call__(
        self,
        x: cute.Pointer,
        acts: cute.Pointer,
        blocks: cute.Pointer,
        scales: cute.Pointer,
        row_table: cute.Pointer,
        counters: cute.Pointer,
        out: cute.Pointer,
        num_tokens: Int32,
        width: Int32,
        ld_x: Int32,
        ld_out: Int32,
        num_row_blocks: Int32,
        num_k_blocks: Int32,
        grid: Int32,
    ) -> None:
        """Host side, used to compile only."""
        self.kernel(
            x,
            acts,
            blocks,
            scales,
            row_table,
            counters,
            out,
            num_tokens,
            width,
            ld_x,
            ld_out,
            num_row_blocks,
            num_k_blocks,
        ).launch(
            grid=[grid, 1, 1],
            block=[self.cfg.num_threads, 1, 1],
            cluster=[self.cfg.cluster, 1, 1],
            min_blocks_per_mp=1,
        )

    @cute.kernel
    def kernel(
        self,
        x: cute.Pointer,
        acts: cute.Pointer,
        blocks: cute.Pointer,
        scales: cute.Pointer,
        row_table: cute.Pointer,
        counters: cute.Pointer,
        out: cute.Pointer,
        num_tokens: Int32,
        width: Int32,
        ld_x: Int32,
        ld_out: Int32,
        num_row_blocks: Int32,
        num_k_blocks: Int32,
    ) -> None:
        """Sets the ring up, then loads, quantises or multiplies, by warp."""
        cfg = self.cfg
        thread, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        grid, _, _ = cute.arch.grid_dim()
        warp_group = cute.arch.make_warp_uniform(thread // WG)
        stages = self.allocate()
        memory = cute.arch.alloc_smem(Uint8, 2 * DEPTH * CHUNK_BYTES, 128)
        full = cute.arch.alloc_smem(Int64, 2 * DEPTH, 8)
        if thread == 0:
            for idx in cutlass.range_constexpr(2 * DEPTH):
                cute.arch.mbarrier_init(full + idx, 1)
            stages.pipeline.init(2, 4 * cfg.warpgroups)
        cute.arch.sync_threads()
        if cutlass.const_expr(cfg.cluster_n > 1):
            ptx.cluster_barrier()
        tiles = self.tiles(cta, grid, num_tokens, num_row_blocks, num_k_blocks)
        if warp_group == cfg.warpgroups:
            cute.arch.setmaxregister_decrease(REGISTERS[cfg.warpgroups][0])
            source = Source(x, acts, counters, num_tokens, width, ld_x, num_k_blocks)
            worker = thread - cfg.warpgroups * WG
            warp = cute.arch.make_warp_uniform(worker // 32)
            lane = worker % 32
            if warp == 0:
                self.load_written_acts(source, stages, tiles, lane)
                self.finish(source, grid, lane)
            if worker == 32:
                self.load_weights(blocks, scales, stages, tiles, num_row_blocks)
            if warp >= 2:
                own = Chunks(memory + (warp - 2) * (DEPTH * CHUNK_BYTES), full + (warp - 2) * DEPTH, lane)
                self.quantize_all(source, own)
                self.finish(source, grid, lane)
        else:
            cute.arch.setmaxregister_increase(REGISTERS[cfg.warpgroups][1])
            output = Output(out, row_table, num_tokens, ld_out, num_row_blocks)
            self.consume(tiles, stages, output, Thread(thread % WG, warp_group))

    @cute.jit
    def load_written_acts(self, source: Source, stages: Stages, tiles: CtaTiles, lane: Int32) -> None:
        """Loads this CTA's share of the cluster's activations, each chunk of K once it is quantised. One warp."""
        cfg = self.cfg
        part = ACT_BLOCK_BYTES // cfg.cluster_n
        peers = (1 << cfg.cluster_n) - 1 if cfg.cluster_n > 1 else 0
        last_m64 = (source.num_tokens + 63) // 64 - 1
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        ring = stages.pipeline.producer()
        for tile in cutlass.range(tiles.worker, tiles.num_tiles, tiles.num_workers, unroll=1):
            first = tiles.m64(tile)
            mine = cutlass.min(first + cutlass.min(lane, cfg.m64_per_tile - 1), last_m64)
            needed = cutlass.min(source.num_groups - mine * GROUPS_PER_M64, GROUPS_PER_M64)
            for step in cutlass.range(tiles.k_iters, unroll=1):
                k = tiles.k_start + step
                if step == 0 or k % CHUNK_BLOCKS == 0:
                    flag = source.flag(mine, k // CHUNK_BLOCKS)
                    written = load_acquire(flag)
                    while written < needed:
                        written = load_acquire(flag)
                    order_copies()
                    cute.arch.sync_warp()
                ring.acquire()
                if lane == 0:
                    ring.commit(cfg.m64_per_tile * ACT_BLOCK_BYTES)
                    for r in cutlass.range_constexpr(cfg.m64_per_tile):
                        m64 = cutlass.min(first + r, last_m64)
                        target = stages.tokens + ((ring.slot * cfg.m64_per_tile + r) * 9216 + tiles.rank * part)
                        block = (Int64(m64) * tiles.num_k_blocks + k) * ACT_BLOCK_BYTES
                        ptx.load_bulk(
                            target.toint(), (source.acts + (block + tiles.rank * part)).toint(), part, ring.full,
                            peers=peers,
                        )  # fmt: skip
                ring.advance()

    @cute.jit
    def quantize_all(self, source: Source, own: Chunks) -> None:
        """Quantises chunks until none is left. One warp."""
        cute.arch.griddepcontrol_wait()
        total = source.num_groups * source.num_chunks_k
        held = Int32(0)  # lane d holds the ticket of buffer d
        for first in cutlass.range(DEPTH, unroll=1):
            ticket = self.ask(source, own, first, total)
            held = ticket if own.lane == first else held
        slot, phase = Int32(0), Int32(0)
        now = cute.arch.shuffle_sync(held, slot)
        while now < total:
            cute.arch.mbarrier_wait(own.full + slot, phase)
            self.quantize_chunk(source, own, slot, now)
            cute.arch.sync_warp()
            if own.lane == 0:
                m64 = now % source.num_groups // GROUPS_PER_M64
                add_release(source.flag(m64, now // source.num_groups), Int32(1))
            ticket = self.ask(source, own, slot, total)
            held = ticket if own.lane == slot else held
            slot += 1
            if slot == DEPTH:
                slot = Int32(0)
                phase = phase ^ 1
            now = cute.arch.shuffle_sync(held, slot)

    @cute.jit
    def ask(self, source: Source, own: Chunks, slot: Int32, total: Int32) -> Int32:
        """Takes a ticket and asks for its chunk's rows; returns the ticket, ``total`` or more when none is left."""
        ticket = Int32(0)
        if own.lane == 0:
            ticket = add_relaxed(source.counters.toint(), Int32(1))
        ticket = cute.arch.shuffle_sync(ticket, 0)
        if ticket < total:
            row0, column = ticket % source.num_groups * GROUP_ROWS, ticket // source.num_groups * CHUNK_COLS
            num_rows = cutlass.min(source.num_tokens - row0, GROUP_ROWS)
            num_bytes = 2 * cutlass.min(source.width - column, CHUNK_COLS)
            target = own.memory + slot * CHUNK_BYTES
            if num_bytes < 2 * CHUNK_COLS:
                for at in cutlass.range(own.lane * 16 + num_bytes, 2 * CHUNK_COLS, 512, unroll=1):
                    for row in cutlass.range_constexpr(GROUP_ROWS):
                        zeros = tuple(Float32(0.0) for _ in range(4))
                        ptx.store_shared_vec4((target + row * PITCH).toint() + at, zeros)
                cute.arch.sync_warp()
            if own.lane == 0:
                cute.arch.mbarrier_arrive_and_expect_tx(own.full + slot, num_rows * num_bytes)
            cute.arch.sync_warp()
            if own.lane < num_rows:
                line = source.x + (Int64(row0 + own.lane) * source.ld_x + column)
                ptx.load_bulk((target + own.lane * PITCH).toint(), line.toint(), num_bytes, own.full + slot)
        return ticket

    @cute.jit
    def quantize_chunk(self, source: Source, own: Chunks, slot: Int32, ticket: Int32) -> None:
        """Rounds 8 rows by 512 columns; four lanes share a row."""
        row, pair = own.lane // 4, own.lane % 4
        token = ticket % source.num_groups * GROUP_ROWS + row
        first = ticket // source.num_groups * CHUNK_BLOCKS
        line = (own.memory + (slot * CHUNK_BYTES + row * PITCH + pair * 32)).toint()
        block = (source.acts + (Int64(token // 64) * source.num_k_blocks + first) * ACT_BLOCK_BYTES).toint()
        for k in cutlass.range(cutlass.min(source.num_k_blocks - first, CHUNK_BLOCKS), unroll=1):
            words: list[Uint32] = []
            for half in cutlass.range_constexpr(2):
                for unit in cutlass.range_constexpr(2):
                    words += ptx.load_shared_vec4(line + k * 256 + half * 128 + unit * 16)
            scale, codes = rounded(words)
            if token < source.num_tokens:
                place = block + (token % 64 * 128 + row * 16 + pair * 4)
                for unit in cutlass.range_constexpr(8):
                    ptx.store_global(place ^ (unit * 16), codes[unit])  # rows are multiples of 128 bytes
                if pair == 0:
                    ptx.store_global(block + (BLOCK_BYTES + token % 64 * 4), as_word(scale))
            block += ACT_BLOCK_BYTES

    @cute.jit
    def finish(self, source: Source, grid: Int32, lane: Int32) -> None:
        """Counts this warp as finished; the grid's last one sets all counters to zero."""
        cute.arch.sync_warp()
        before = Int32(0)
        if lane == 0:
            before = add_acquire_release((source.counters + 1).toint(), Int32(1))
        before = cute.arch.shuffle_sync(before, 0)
        if before == 3 * grid - 1:
            count = 2 + (source.num_tokens + 63) // 64 * source.num_chunks_k
            for idx in cutlass.range(lane, count, 32, unroll=1):
                ptx.store_global((source.counters + idx).toint(), Uint32(0))


def rounded(words: list[Uint32]) -> tuple[Float32, list[Uint32]]:
    """Rounds a lane's 32 of a row's 128 values: returns the row's scale and a word of each 16-byte unit."""
    rest = words
    while len(rest) > 1:
        rest = [fp8_ptx.max_abs_bf16x2(*pair) for pair in zip(rest[::2], rest[1::2], strict=True)]
    largest = fp8_ptx.max_u32(rest[0] & Uint32(0x7FFF), (rest[0] >> 16) & Uint32(0x7FFF))
    for step in (1, 2):
        largest = fp8_ptx.max_u32(largest, cute.arch.shuffle_sync_bfly(largest, offset=step))
    amax_bits = largest << 16
    # As ``quantize_sm90``: of amax, at least 1e-4, over 448 = 1.75 * 2**8, rounded up.
    bits = fp8_ptx.max_u32(amax_bits, Uint32(0x38D1B717))
    exponent = ((bits + Uint32(0x1FFFFF)) >> 23) - Uint32(8)
    factor = (Uint32(254) - exponent) << 7
    # Exact, but for products below 2**-126, which round to zero in E4M3 either way.
    scaled = [ptx.mul_bf16x2(word, factor | (factor << 16)) for word in words]
    values = [ptx.widen_bf16(word, high) for word in scaled for high in (False, True)]
    codes = []
    for k32 in range(4):
        for half in range(2):
            first, second = 16 * half + 2 * k32, 16 * half + 2 * k32 + 8
            codes.append(fp8_ptx.to_e4m3x4(values[second], values[first], values[second + 1], values[first + 1]))
    return fp8_ptx.nan_unless_finite(ptx.as_float(exponent << 23), amax_bits), codes


def compile_joint_w8a8(config: JointW8A8Config) -> Any:
    """Compiles for sm_90a; no GPU is needed."""
    ptr = cute.runtime.make_ptr
    space = cute.AddressSpace.gmem
    one = Int32(1)
    return cute.compile(
        JointW8A8(config),
        ptr(BFloat16, 1024, space, assumed_align=16),
        ptr(Uint8, 1024, space, assumed_align=128),
        ptr(Uint8, 1024, space, assumed_align=128),
        ptr(Uint8, 1024, space, assumed_align=16),
        ptr(Int32, 1024, space, assumed_align=8),
        ptr(Int32, 1024, space, assumed_align=16),
        ptr(BFloat16, 1024, space, assumed_align=8),
        one, Int32(8), Int32(8), Int32(64), Int32(2), one, Int32(config.cluster),
    )  # fmt: skip
