"""Products and softmax of the attention kernel."""

from dataclasses import dataclass

import cutlass
from cutlass import BFloat16, Float32, Int32, Uint32, cute
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup
from cutlass.utils.hopper_helpers import make_trivial_tiled_mma

from ownpath.kernels.attend import ptx as attend_ptx
from ownpath.kernels.attend.config_sm90 import (
    TILE_HEADS,
    TILE_KEYS,
)
from ownpath.kernels.attend.parts_sm90 import (
    CHUNK,
    CONSUMERS,
    HALF,
    LINE_BYTES,
    LOG2_E,
    P_BYTES,
    P_EMPTY,
    P_FULL,
    SUMS_READY,
    AttendMemory,
    AttendReads,
    AttendShare,
    AttendWrites,
)
from ownpath.kernels.attend.result_sm90 import AttendResults
from ownpath.kernels.dsl import ptx
from ownpath.kernels.dsl.warpgroup import Thread, shared_operand, wgmma


@dataclass(frozen=True)
class AttendRegisters:
    """A thread's part of a tile's scores and weights, and of the row's sums and statistics."""

    scores: cute.Tensor
    weights: cute.Tensor
    sums: cute.Tensor
    stats: cute.Tensor


class AttendProducts(AttendResults):
    """The work of the two multiplying warpgroups."""

    def values_operand(self, memory: AttendMemory) -> cute.Tensor:
        """Makes the keys' stages as values, [256 channels, 64 keys, stages]: channels are contiguous."""
        outer = cute.make_layout(
            ((CHUNK, HALF // CHUNK), (8, TILE_KEYS // 8), 4),
            stride=((1, CHUNK * TILE_KEYS), (CHUNK, 8 * CHUNK), TILE_KEYS * HALF),
        )
        layout = cute.make_composed_layout(cute.make_swizzle(3, 4, 3), 0, outer)
        return cute.make_tensor(cute.recast_ptr(memory.keys, layout.inner, BFloat16), layout.outer)

    @cute.jit
    def multiply_left(
        self, inputs: AttendReads, results: AttendWrites, share: AttendShare, memory: AttendMemory, thread: Thread
    ) -> None:
        """Scores, softmax, and the left half of the values."""
        major = OperandMajorMode
        qk = make_trivial_tiled_mma(BFloat16, BFloat16, major.K, major.K, Float32, (1, 1, 1), (TILE_HEADS, TILE_KEYS))
        thr_qk = qk.get_slice(thread.idx)
        q = thr_qk.make_fragment_A(
            thr_qk.partition_A(shared_operand(memory.q, BFloat16, TILE_HEADS, 8, TILE_HEADS * CHUNK))
        )
        k = thr_qk.make_fragment_B(
            thr_qk.partition_B(shared_operand(memory.keys, BFloat16, TILE_KEYS, 16, TILE_KEYS * CHUNK))
        )
        scores = cute.make_rmem_tensor(thr_qk.partition_shape_C((TILE_HEADS, TILE_KEYS)), Float32)
        pv = make_trivial_tiled_mma(
            BFloat16, BFloat16, major.K, major.MN, Float32, (1, 1, 1), (TILE_HEADS, HALF),
            a_source=warpgroup.OperandSource.RMEM,
        )  # fmt: skip
        thr_pv = pv.get_slice(thread.idx)
        values = thr_pv.make_fragment_B(thr_pv.partition_B(self.values_operand(memory)))
        weights = thr_pv.make_fragment_A(thr_pv.partition_shape_A((TILE_HEADS, TILE_KEYS)))
        sums = cute.make_rmem_tensor(thr_pv.partition_shape_C((TILE_HEADS, HALF)), Float32)
        sums.fill(0.0)
        stats = self.initial_stats(inputs, share, thread)
        registers = AttendRegisters(scores, weights, sums, stats)
        self.issue_scores(qk, q, k, scores, memory, Int32(0))
        warpgroup.wait_group(0)
        last = share.num_tiles - 1
        for i in cutlass.range(last, unroll=1):
            self.soften(registers, inputs.scale * LOG2_E, memory, thread, i, None)
            warpgroup.fence()
            self.issue_values(pv, weights, values, sums, (i & 1) * 2)
            self.issue_scores(qk, q, k, scores, memory, i + 1)
            warpgroup.wait_group(2)
            self.release(memory, (i & 1) * 2, thread)
            warpgroup.wait_group(0)
        limit = share.num_keys - (share.first_tile + last) * TILE_KEYS
        self.soften(registers, inputs.scale * LOG2_E, memory, thread, last, limit)
        warpgroup.fence()
        self.issue_values(pv, weights, values, sums, (last & 1) * 2)
        self.finish_stats(stats, inputs, results, share, memory, thread)
        warpgroup.wait_group(0)
        self.finish(sums, inputs, results, share, memory, thread, 0)

    @cute.jit
    def multiply_right(
        self, inputs: AttendReads, results: AttendWrites, share: AttendShare, memory: AttendMemory, thread: Thread
    ) -> None:
        """The right half of the values, with the weights that the other warpgroup hands over."""
        major = OperandMajorMode
        pv = make_trivial_tiled_mma(BFloat16, BFloat16, major.K, major.MN, Float32, (1, 1, 1), (TILE_HEADS, HALF))
        thr_pv = pv.get_slice(thread.idx)
        values = thr_pv.make_fragment_B(thr_pv.partition_B(self.values_operand(memory)))
        p = thr_pv.make_fragment_A(
            thr_pv.partition_A(shared_operand(memory.p, BFloat16, TILE_HEADS, 2, TILE_HEADS * TILE_KEYS))
        )
        sums = cute.make_rmem_tensor(thr_pv.partition_shape_C((TILE_HEADS, HALF)), Float32)
        sums.fill(0.0)
        row = thread.warp * 16 + thread.row
        for i in cutlass.range(share.num_tiles, unroll=1):
            buffer = i & 1
            attend_ptx.barrier_sync(P_FULL + buffer, CONSUMERS)
            for half in cutlass.range_constexpr(2):
                factor = attend_ptx.load_shared_float(memory.lines.toint() + buffer * LINE_BYTES + (row + 8 * half) * 4)
                self.shrink(sums, half, factor)
            stage = buffer * 2 + 1
            cute.arch.mbarrier_wait(memory.pipeline.full + stage, (i >> 1) & 1)
            attend_ptx.fence_async()
            warpgroup.fence()
            for k16 in cutlass.range_constexpr(TILE_KEYS // 16):
                wgmma(pv, p[None, None, k16, buffer], values[None, None, k16, stage], sums)
            warpgroup.commit_group()
            warpgroup.wait_group(0)
            self.release(memory, stage, thread)
            if i + 2 < share.num_tiles:
                attend_ptx.barrier_arrive(P_EMPTY + buffer, CONSUMERS)
        attend_ptx.barrier_sync(SUMS_READY, CONSUMERS)
        self.finish(sums, inputs, results, share, memory, thread, 1)

    @cute.jit
    def issue_scores(
        self, qk: cute.TiledMma, q: cute.Tensor, k: cute.Tensor, scores: cute.Tensor, memory: AttendMemory, i: Int32
    ) -> None:
        """Starts queries times the keys of tile i, each half as it arrives: two groups of instructions."""
        for half in cutlass.range_constexpr(2):
            stage = (i & 1) * 2 + half
            cute.arch.mbarrier_wait(memory.pipeline.full + stage, (i >> 1) & 1)
            attend_ptx.fence_async()
            if cutlass.const_expr(half == 0):
                warpgroup.fence()
            for chunk in cutlass.range_constexpr(HALF // CHUNK):
                for k16 in cutlass.range_constexpr(CHUNK // 16):
                    a, b = q[None, None, k16, half * 4 + chunk], k[None, None, k16, stage * 4 + chunk]
                    wgmma(qk, a, b, scores, half + chunk + k16 > 0)
            warpgroup.commit_group()

    @cute.jit
    def issue_values(
        self, pv: cute.TiledMma, weights: cute.Tensor, values: cute.Tensor, sums: cute.Tensor, stage: Int32
    ) -> None:
        """Starts weights times the values of a stage."""
        for k16 in cutlass.range_constexpr(TILE_KEYS // 16):
            wgmma(pv, weights[None, None, k16], values[None, None, k16, stage], sums)
        warpgroup.commit_group()

    @cute.jit
    def soften(
        self,
        registers: AttendRegisters,
        scale: Float32,
        memory: AttendMemory,
        thread: Thread,
        i: Int32,
        limit: Int32 | None,
    ) -> None:
        """Turns tile i's scores into weights relative to the largest score so far, hands them over, shrinks the sums.

        scale: turns scores into powers of two. limit: the tile's number of keys, where it may have fewer than 64.
        """
        scores, sums, stats = registers.scores, registers.sums, registers.stats
        words = cute.recast_tensor(registers.weights, Uint32)
        factors = []
        for half in cutlass.range_constexpr(2):
            old = stats[2 * half]
            largest = old
            row_scores = []
            for j in cutlass.range_constexpr(TILE_KEYS // 8):
                for odd in cutlass.range_constexpr(2):
                    score = scores[4 * j + 2 * half + odd]
                    if cutlass.const_expr(limit is not None):
                        score = attend_ptx.minus_infinity_from(score, 8 * j + 2 * thread.pair + odd, limit)
                    row_scores.append(score)
                    largest = ptx.maximum(largest, score)
            for power in cutlass.range_constexpr(2):
                largest = ptx.maximum(largest, cute.arch.shuffle_sync_bfly(largest, 1 << power))
            factor = ptx.exp2((old - largest) * scale)
            offset = -(largest * scale)
            total = stats[2 * half + 1] * factor
            for j in cutlass.range_constexpr(TILE_KEYS // 8):
                low, high = [ptx.exp2(attend_ptx.fma(row_scores[2 * j + odd], scale, offset)) for odd in range(2)]
                total = total + (low + high)
                words[4 * (j // 2) + 2 * (j % 2) + half] = ptx.pack_bf16x2(low, high)
            stats[2 * half] = largest
            stats[2 * half + 1] = total
            factors.append(factor)
        buffer = i & 1
        if i >= 2:
            attend_ptx.barrier_sync(P_EMPTY + buffer, CONSUMERS)
        row = thread.warp * 16 + thread.row
        line = memory.p.toint() + buffer * P_BYTES + row * 128 + thread.pair * 4
        for half in cutlass.range_constexpr(2):
            for j in cutlass.range_constexpr(TILE_KEYS // 8):
                address = line + half * (8 * 128) + (thread.row ^ j) * 16
                attend_ptx.store_shared_word(address, words[4 * (j // 2) + 2 * (j % 2) + half])
            if thread.pair == 0:
                attend_ptx.store_shared_float(
                    memory.lines.toint() + buffer * LINE_BYTES + (row + 8 * half) * 4, factors[half]
                )
        attend_ptx.fence_async()
        attend_ptx.barrier_arrive(P_FULL + buffer, CONSUMERS)
        for half in cutlass.range_constexpr(2):
            self.shrink(sums, half, factors[half])

    def shrink(self, sums: cute.Tensor, half: int, factor: Float32) -> None:
        """Multiplies the sums of rows g (half 0) or g + 8."""
        for j in range(HALF // 8):
            for odd in range(2):
                at = 4 * j + 2 * half + odd
                sums[at] = sums[at] * factor

    def release(self, memory: AttendMemory, stage: Int32, thread: Thread) -> None:
        """Releases a stage, which this warpgroup was the last to read."""
        memory.pipeline.consumer().release(stage, thread.idx)
