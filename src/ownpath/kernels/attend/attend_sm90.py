"""Decode attention on Hopper: one CTA attends from 64 heads of one row to the row's keys, which are the values too.

How it works. Tiles of 64 keys. Three warpgroups: one gathers keys into shared memory, 16 bytes a thread and copy,
swizzled as the tensor cores read them; two multiply. A row of 512 values does not fit the registers of one warpgroup,
so each multiplies by 256 channels. The left one also multiplies queries by keys and computes the softmax, in
registers; it hands each tile's weights to the right one through shared memory, rounded to BF16, with the factors by
which the sums so far shrink. Shared memory: queries 64 KiB; keys 4 stages of 32 KiB, half of a tile's channels each, so
that a half is loaded anew as soon as its warpgroup has read it; weights twice 8 KiB.

The queries come as the projection leaves them: while the first keys are on their way, both multiplying warpgroups norm
and rotate them in shared memory, 8 heads to a warp.

A row's keys are numbered: first its window's (a ring whose rows 0 to min(position, 127) it sees), then its entries.
Only the last tile can have keys that are not there, with score minus infinity, whose memory is not read: zeros stand
for them, or in FP8 pages the window's first key. CTAs can share a row's tiles. With ``merges`` they are a cluster: each
keeps its sums where its keys were, and merges every n-th head from all of them, through distributed shared memory. With
``split`` each writes its sums and, per head, their largest score and sum of weights; ``combine_sm90`` merges them. A
CTA alone starts its sums with the sink, and its epilogue divides, rotates back and rounds.

FP8 pages come to the registers of the warpgroup that loads, a tile ahead, and are decoded from there to shared memory:
E4M3 times a power of two is BF16, exactly.

Positions, slots and block tables are read before the launches in front of this one have ended: those that may start
early, one behind the other, must not write them. Everything else is read after.

Roofline. 1 KiB a key at 4.41 TB/s, 584 bytes in FP8 pages; 2048 cycles of the tensor cores a tile.
Limits: sm_90a; 512 channels, 64 rotary.
"""

from typing import Any

import cutlass
from cutlass import BFloat16, Float32, Int32, Uint8, cute

from ownpath.kernels.attend.config_sm90 import (
    LAUNCH_REGISTERS,
    TILE_HEADS,
    WG,
    AttendConfig,
)
from ownpath.kernels.attend.multiply_sm90 import AttendProducts
from ownpath.kernels.attend.pages_sm90 import AttendPages, PageGuess
from ownpath.kernels.attend.parts_sm90 import (
    CONSUMERS,
    MINUS_INFINITY,
    AttendReads,
    AttendWrites,
)
from ownpath.kernels.dsl import ptx
from ownpath.kernels.dsl.warpgroup import Thread


class Attend(AttendPages, AttendProducts):
    """Builds the kernel of one ``AttendConfig``."""

    @cute.jit
    def __call__(
        self,
        q: cute.Pointer,
        cos: cute.Pointer,
        sin: cute.Pointer,
        window: cute.Pointer,
        entries: cute.Pointer,
        positions: cute.Pointer,
        slots: cute.Pointer,
        table: cute.Pointer,
        counts: cute.Pointer,
        sink: cute.Pointer,
        out: cute.Pointer,
        sums: cute.Pointer,
        stats: cute.Pointer,
        num_heads: Int32,
        q_row: Int32,
        q_head: Int32,
        width: Int32,
        scale: Float32,
        eps: Float32,
        num_rows: Int32,
        num_splits: Int32,
    ) -> None:
        """Host side, used to compile only."""
        groups = (num_heads + TILE_HEADS - 1) // TILE_HEADS
        self.kernel(
            q, cos, sin, window, entries, positions, slots, table, counts, sink, out, sums, stats,
            num_heads, q_row, q_head, width, scale, eps,
        ).launch(
            grid=[num_splits, groups, num_rows],
            block=[self.cfg.num_threads, 1, 1],
            min_blocks_per_mp=1,
            preferred_smem_carveout=100,
        )  # fmt: skip

    @cute.kernel
    def kernel(
        self,
        q: cute.Pointer,
        cos: cute.Pointer,
        sin: cute.Pointer,
        window: cute.Pointer,
        entries: cute.Pointer,
        positions: cute.Pointer,
        slots: cute.Pointer,
        table: cute.Pointer,
        counts: cute.Pointer,
        sink: cute.Pointer,
        out: cute.Pointer,
        sums: cute.Pointer,
        stats: cute.Pointer,
        num_heads: Int32,
        q_row: Int32,
        q_head: Int32,
        width: Int32,
        scale: Float32,
        eps: Float32,
    ) -> None:
        """Loads keys, or multiplies, by warpgroup. scale: of the scores."""
        inputs = AttendReads(
            q, cos, sin, window, entries, positions, slots, table, counts, sink,
            num_heads, q_row, q_head, width, scale, eps,
        )  # fmt: skip
        results = AttendWrites(out, sums, stats)
        thread, _, _ = cute.arch.thread_idx()
        warp_group = cute.arch.make_warp_uniform(thread // WG)
        memory = self.allocate()
        if thread == 0:
            memory.pipeline.init(self.cfg.num_arrivals, 4)
        cute.arch.sync_threads()
        cute.arch.griddepcontrol_launch_dependents()
        registers = self.cfg.registers
        end, slot = self.row_state(inputs)
        guess = PageGuess(Int32(0), Int32(0))
        if cutlass.const_expr(self.cfg.selected):
            cute.arch.griddepcontrol_wait()
            if cutlass.const_expr(self.cfg.fp8):
                guess = self.guess_pages(inputs, end, slot, thread)
            if warp_group < 2:
                self.copy_queries(inputs, memory, thread)
            # Nothing is left to wait for, but the compiler moves no load to before this one.
            cute.arch.griddepcontrol_wait()
        share = self.share(inputs, end, slot)
        if warp_group == 2:
            cute.arch.setmaxregister_decrease(registers[0])
            if cutlass.const_expr(self.cfg.fp8):
                self.load_pages(inputs, share, memory, guess, thread % WG)
            else:
                self.load_keys(inputs, share, memory, thread % WG)
        else:
            if cutlass.const_expr(registers[1] > LAUNCH_REGISTERS):
                cute.arch.setmaxregister_increase(registers[1])
            if cutlass.const_expr(not self.cfg.selected):
                cute.arch.griddepcontrol_wait()
                self.copy_queries(inputs, memory, thread)
            self.load_queries(inputs, share, memory, thread)
            place = Thread(thread % WG, warp_group)
            if share.num_tiles > 0:
                if warp_group == 0:
                    cute.arch.setmaxregister_increase(registers[2])
                    self.multiply_left(inputs, results, share, memory, place)
                else:
                    if cutlass.const_expr(registers[1] < LAUNCH_REGISTERS):
                        cute.arch.setmaxregister_decrease(registers[1])
                    self.multiply_right(inputs, results, share, memory, place)
            else:
                if cutlass.const_expr(self.cfg.split):
                    if thread < TILE_HEADS:
                        self.write_stats(results, share, inputs, thread, Float32(MINUS_INFINITY), Float32(0.0))
                if cutlass.const_expr(self.cfg.merges):
                    if thread < TILE_HEADS:
                        self.keep_stats(memory, thread, Float32(MINUS_INFINITY), Float32(0.0))
        if cutlass.const_expr(self.cfg.merges):
            ptx.cluster_barrier()
            if thread < CONSUMERS:
                self.merge(inputs, results, share, memory, thread)
            # Nobody leaves while others read its sums; what was read is in registers.
            ptx.cluster_barrier(relaxed=True)


def compile_attend(config: AttendConfig) -> Any:
    """Compiles for sm_90a; no GPU is needed."""
    space = cute.AddressSpace.gmem

    def pointer(dtype: Any, align: int) -> cute.Pointer:
        return cute.runtime.make_ptr(dtype, 1024, space, assumed_align=align)

    count = Int32(1)
    return cute.compile(
        Attend(config),
        pointer(BFloat16, 16), pointer(Float32, 16), pointer(Float32, 16), pointer(Uint8, 16), pointer(Uint8, 16),
        pointer(Int32, 4), pointer(Int32, 4), pointer(Int32, 4), pointer(Int32, 4), pointer(Float32, 4),
        pointer(BFloat16, 16), pointer(Float32, 16), pointer(Float32, 8),
        Int32(64), Int32(32768), Int32(512), count, Float32(1.0), Float32(1.0), count, count,
    )  # fmt: skip
