"""Merges the partial sums of attention's splits, with the sink, and rotates the result back.

How it works. A CTA has one head of one row, a thread four channels. Every warp holds the statistics of all splits, two
to a lane, and turns them into the splits' weights; sums of splits without keys are not read. Splits are added in their
order, so the bits depend on their number only.

Roofline: 2 KiB per head and split. Limits: at most 64 splits.
"""

from typing import Any

import cutlass
from cutlass import BFloat16, Float32, Int32, Int64, cute

from ownpath.kernels.attend import ptx as attend_ptx
from ownpath.kernels.attend.config_sm90 import COMBINE_THREADS, HEAD_DIM, NUM_ROTARY, AttendCombineConfig
from ownpath.kernels.dsl import ptx

LOG2_E = 1.4426950408889634
MINUS_INFINITY = float("-inf")


class AttendCombine:
    """Builds the kernel."""

    @cute.jit
    def __call__(
        self,
        sums: cute.Pointer,
        stats: cute.Pointer,
        sink: cute.Pointer,
        cos: cute.Pointer,
        sin: cute.Pointer,
        out: cute.Pointer,
        num_splits: Int32,
        num_heads: Int32,
        num_rows: Int32,
    ) -> None:
        """Host side, used to compile only."""
        self.kernel(sums, stats, sink, cos, sin, out, num_splits).launch(
            grid=[num_heads, num_rows, 1], block=[COMBINE_THREADS, 1, 1]
        )

    @cute.kernel
    def kernel(
        self,
        sums: cute.Pointer,
        stats: cute.Pointer,
        sink: cute.Pointer,
        cos: cute.Pointer,
        sin: cute.Pointer,
        out: cute.Pointer,
        num_splits: Int32,
    ) -> None:
        """Merges one head of one row."""
        thread, _, _ = cute.arch.thread_idx()
        head, row, _ = cute.arch.block_idx()
        num_heads, _, _ = cute.arch.grid_dim()
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()
        sink_power = attend_ptx.load_float(sink.toint() + Int64(head) * 4) * LOG2_E
        lane = thread % 32
        first = Int64(row * num_splits) * num_heads + head
        line = stats.toint() + first * 8
        powers, totals = [], []
        for turn in cutlass.range_constexpr(2):
            power, total = Float32(MINUS_INFINITY), Float32(0.0)
            split = lane + 32 * turn
            if split < num_splits:
                place = line + Int64(split * num_heads) * 8
                power, total = attend_ptx.load_float(place), attend_ptx.load_float(place + 4)
            powers.append(power)
            totals.append(total)
        largest = ptx.maximum(sink_power, ptx.maximum(powers[0], powers[1]))
        for bit in cutlass.range_constexpr(5):
            largest = ptx.maximum(largest, cute.arch.shuffle_sync_bfly(largest, 1 << bit))
        weights = [ptx.exp2(power - largest) for power in powers]
        total = weights[0] * totals[0] + weights[1] * totals[1]
        for bit in cutlass.range_constexpr(5):
            total = total + cute.arch.shuffle_sync_bfly(total, 1 << bit)
        inverse = ptx.reciprocal(total + ptx.exp2(sink_power - largest))
        merged = self.merge(sums.toint() + (first * HEAD_DIM + thread * 4) * 4, num_heads, num_splits, weights)
        x = []
        pair = thread * 2 - (HEAD_DIM - NUM_ROTARY) // 2
        place = (Int64(row) * (NUM_ROTARY // 2) + pair) * 4
        for at in cutlass.range_constexpr(0, 4, 2):
            c, s = Float32(1.0), Float32(0.0)
            if pair >= 0:
                c = attend_ptx.load_float(cos.toint() + place + at * 2)
                s = attend_ptx.load_float(sin.toint() + place + at * 2)
            x0, x1 = merged[at] * inverse, merged[at + 1] * inverse
            x += [attend_ptx.fma(x0, c, x1 * s), attend_ptx.fma(x1, c, -(x0 * s))]
        address = out.toint() + ((Int64(row) * num_heads + head) * HEAD_DIM + thread * 4) * 2
        attend_ptx.store_words2(address, ptx.pack_bf16x2(x[0], x[1]), ptx.pack_bf16x2(x[2], x[3]))

    @cute.jit
    def merge(self, address: Int64, num_heads: Int32, num_splits: Int32, weights: list[Float32]) -> list[Float32]:
        """Adds four channels of every split, times its weight."""
        merged = cute.make_rmem_tensor(4, Float32)
        merged.fill(0.0)
        step = Int64(num_heads) * (HEAD_DIM * 4)
        for first in cutlass.range(0, num_splits, 4, unroll=1):
            parts = []
            for idx in cutlass.range_constexpr(4):
                split = first + idx
                weight = cute.arch.shuffle_sync(weights[0], split % 32)
                upper = cute.arch.shuffle_sync(weights[1], split % 32)
                if split >= 32:
                    weight = upper
                inside = Int32(0)
                if split < num_splits and weight != 0.0:
                    inside = Int32(1)
                parts.append((weight, attend_ptx.load_words_or_zero(address + split * step, inside)))
            for weight, words in parts:
                for at in cutlass.range_constexpr(4):
                    merged[at] = attend_ptx.fma(weight, ptx.as_float(words[at]), merged[at])
        return [merged[at] for at in range(4)]


def compile_combine(_config: AttendCombineConfig) -> Any:
    """Compiles for sm_90a; no GPU is needed."""
    space = cute.AddressSpace.gmem

    def pointer(dtype: Any, align: int) -> cute.Pointer:
        return cute.runtime.make_ptr(dtype, 1024, space, assumed_align=align)

    count = Int32(1)
    return cute.compile(
        AttendCombine(), pointer(Float32, 16), pointer(Float32, 8), pointer(Float32, 4), pointer(Float32, 16),
        pointer(Float32, 16), pointer(BFloat16, 16), count, count, count,
    )  # fmt: skip
