"""AttendWrites of the attention kernel: written, left to ``combine_sm90``, or merged by a cluster."""

import cutlass
from cutlass import Float32, Int32, Int64, Uint32, cute

from ownpath.kernels.attend import ptx as attend_ptx
from ownpath.kernels.attend.config_sm90 import (
    HEAD_DIM,
    NUM_ROTARY,
    TILE_HEADS,
)
from ownpath.kernels.attend.parts_sm90 import (
    CONSUMERS,
    HALF,
    KEYS_READ,
    LINE_BYTES,
    LOG2_E,
    MINUS_INFINITY,
    SUMS_READY,
    AttendMemory,
    AttendParts,
    AttendReads,
    AttendShare,
    AttendWrites,
)
from ownpath.kernels.dsl import ptx
from ownpath.kernels.dsl.warpgroup import Thread


class AttendResults(AttendParts):
    """Takes sums and statistics from registers."""

    @cute.jit
    def initial_stats(self, inputs: AttendReads, share: AttendShare, thread: Thread) -> cute.Tensor:
        """Returns this thread's (largest score, sum of weights) for rows g and g + 8.

        The whole row's CTA starts as if the sink had been a score: weight 1 in one of a row's four threads.
        """
        stats = cute.make_rmem_tensor(4, Float32)
        for half in cutlass.range_constexpr(2):
            stats[2 * half] = Float32(MINUS_INFINITY)
            stats[2 * half + 1] = Float32(0.0)
            if cutlass.const_expr(not self.cfg.split and not self.cfg.merges):
                head = share.head0 + thread.warp * 16 + thread.row + 8 * half
                if head < inputs.num_heads:
                    stats[2 * half] = attend_ptx.load_float(inputs.sink.toint() + Int64(head) * 4) / inputs.scale
                    if thread.pair == 0:
                        stats[2 * half + 1] = Float32(1.0)
        return stats

    @cute.jit
    def finish_stats(
        self,
        stats: cute.Tensor,
        inputs: AttendReads,
        results: AttendWrites,
        share: AttendShare,
        memory: AttendMemory,
        thread: Thread,
    ) -> None:
        """Adds up the four threads of each row; hands over what sums are divided by, or writes the statistics."""
        for half in cutlass.range_constexpr(2):
            total = stats[2 * half + 1]
            for power in cutlass.range_constexpr(2):
                total = total + cute.arch.shuffle_sync_bfly(total, 1 << power)
            row = thread.warp * 16 + thread.row + 8 * half
            if cutlass.const_expr(self.cfg.split):
                if thread.pair == 0:
                    largest = stats[2 * half] * (inputs.scale * LOG2_E)
                    self.write_stats(results, share, inputs, row, largest, total)
            elif cutlass.const_expr(self.cfg.merges):
                if thread.pair == 0:
                    self.keep_stats(memory, row, stats[2 * half] * (inputs.scale * LOG2_E), total)
            else:
                if thread.pair == 0:
                    attend_ptx.store_shared_float(
                        memory.lines.toint() + 2 * LINE_BYTES + row * 4, ptx.reciprocal(total)
                    )
        cute.arch.sync_warp()
        attend_ptx.barrier_arrive(SUMS_READY, CONSUMERS)

    @cute.jit
    def write_stats(
        self,
        results: AttendWrites,
        share: AttendShare,
        inputs: AttendReads,
        row: Int32,
        largest: Float32,
        total: Float32,
    ) -> None:
        """Writes a head's largest score, as a power of two, and its sum of weights."""
        head = share.head0 + row
        if head < inputs.num_heads:
            line = Int64((share.row * share.num_splits + share.split) * inputs.num_heads + head)
            ptx.store_global_vec2(results.stats.toint() + line * 8, (largest, total))

    @cute.jit
    def keep_stats(self, memory: AttendMemory, row: Int32, largest: Float32, total: Float32) -> None:
        """Keeps a head's largest score, as a power of two, and its sum of weights in shared memory."""
        place = memory.lines.toint() + 2 * LINE_BYTES + row * 4
        attend_ptx.store_shared_float(place, largest)
        attend_ptx.store_shared_float(place + LINE_BYTES, total)

    @cute.jit
    def keep_sums(self, sums: cute.Tensor, memory: AttendMemory, thread: Thread, side: cutlass.Constexpr) -> None:
        """Keeps a side's sums [64, 512] in shared memory instead of the keys, 16-byte units exchanged by the row."""
        attend_ptx.barrier_sync(KEYS_READ, CONSUMERS)
        unit = (thread.pair // 2) ^ thread.row
        for half in cutlass.range_constexpr(2):
            row = thread.warp * 16 + thread.row + 8 * half
            line = memory.keys.toint() + row * (HEAD_DIM * 4) + side * (HALF * 4) + thread.pair % 2 * 8
            for j in cutlass.range_constexpr(HALF // 8):
                address = line + j // 4 * 128 + (unit ^ (2 * j % 8)) * 16
                attend_ptx.store_shared_pair(address, sums[4 * j + 2 * half], sums[4 * j + 2 * half + 1])

    @cute.jit
    def merge(
        self, inputs: AttendReads, results: AttendWrites, share: AttendShare, memory: AttendMemory, thread: Int32
    ) -> None:
        """Merges a cluster's sums and writes the result: a head to a warp, every num_splits-th to this CTA."""
        warp, lane = thread // 32, thread % 32
        first, step = share.split + share.num_splits * warp, share.num_splits * (CONSUMERS // 32)
        for turn in cutlass.range((TILE_HEADS - first + step - 1) // step, unroll=1):
            row = first + turn * step
            if share.head0 + row < inputs.num_heads:
                self.merge_head(inputs, results, share, memory, row, lane)

    @cute.jit
    def merge_head(
        self,
        inputs: AttendReads,
        results: AttendWrites,
        share: AttendShare,
        memory: AttendMemory,
        row: Int32,
        lane: Int32,
    ) -> None:
        """Merges one head: the splits' weights from their statistics, a split to a lane, then 16 channels a lane."""
        head = share.head0 + row
        sink = attend_ptx.load_float(inputs.sink.toint() + Int64(head) * 4) * LOG2_E
        place = memory.lines.toint() + 2 * LINE_BYTES + row * 4
        power, total = Float32(MINUS_INFINITY), Float32(0.0)
        if lane < share.num_splits:
            power = ptx.as_float(ptx.load_cluster(place, lane))
            total = ptx.as_float(ptx.load_cluster(place + LINE_BYTES, lane))
        largest = ptx.maximum(sink, power)
        for bit in cutlass.range_constexpr(5):
            largest = ptx.maximum(largest, cute.arch.shuffle_sync_bfly(largest, 1 << bit))
        weight = ptx.exp2(power - largest)
        total = weight * total
        for bit in cutlass.range_constexpr(5):
            total = total + cute.arch.shuffle_sync_bfly(total, 1 << bit)
        inverse = ptx.reciprocal(total + ptx.exp2(sink - largest))
        merged = cute.make_rmem_tensor(16, Float32)
        merged.fill(0.0)
        line = memory.keys.toint() + row * (HEAD_DIM * 4) + (lane ^ (row % 8)) * 16
        for start in cutlass.range(0, share.num_splits, 4, unroll=1):
            parts = []
            for idx in cutlass.range_constexpr(4):
                split = start + idx
                factor = cute.arch.shuffle_sync(weight, split)
                inside = Int32(0)
                if split < share.num_splits and factor != 0.0:
                    inside = Int32(1)
                rank = cutlass.min(split, share.num_splits - 1)
                words = []
                for turn in cutlass.range_constexpr(4):
                    words += attend_ptx.load_cluster_or_zero(line + turn * 512, rank, inside)
                parts.append((factor, words))
            for factor, words in parts:
                for at in cutlass.range_constexpr(16):
                    merged[at] = attend_ptx.fma(factor, words[at], merged[at])
        # Channels 4 * (lane + 32 * turn) to + 3: the rotary ones are the upper half of the lanes' last turn.
        angles = (Int64(share.row) * (NUM_ROTARY // 2) + lane % 16 * 2) * 4
        x = [merged[at] * inverse for at in range(16)]
        for at in cutlass.range_constexpr(12, 16, 2):
            c, s = Float32(1.0), Float32(0.0)
            if lane >= 16:
                c = attend_ptx.load_float(inputs.cos.toint() + angles + (at - 12) * 2)
                s = attend_ptx.load_float(inputs.sin.toint() + angles + (at - 12) * 2)
            x0, x1 = x[at], x[at + 1]
            x[at], x[at + 1] = attend_ptx.fma(x0, c, x1 * s), attend_ptx.fma(x1, c, -(x0 * s))
        out = results.out.toint() + ((Int64(share.row) * inputs.num_heads + head) * HEAD_DIM + lane * 4) * 2
        for turn in cutlass.range_constexpr(4):
            low = ptx.pack_bf16x2(x[4 * turn], x[4 * turn + 1])
            high = ptx.pack_bf16x2(x[4 * turn + 2], x[4 * turn + 3])
            attend_ptx.store_words2(out + turn * 256, low, high)

    def finish(
        self,
        sums: cute.Tensor,
        inputs: AttendReads,
        results: AttendWrites,
        share: AttendShare,
        memory: AttendMemory,
        thread: Thread,
        side: int,
    ) -> None:
        """Keeps a side's sums for the cluster, or writes them."""
        if self.cfg.merges:
            self.keep_sums(sums, memory, thread, side)
        else:
            self.store(sums, inputs, results, share, memory, thread, side)

    @cute.jit
    def store(
        self,
        sums: cute.Tensor,
        inputs: AttendReads,
        results: AttendWrites,
        share: AttendShare,
        memory: AttendMemory,
        thread: Thread,
        side: int,
    ) -> None:
        """Writes a side's 256 channels: the result, or with ``split`` the sums."""
        if cutlass.const_expr(side == 1 and not self.cfg.split):
            self.rotate_back(sums, inputs, share, thread)
        for half in cutlass.range_constexpr(2):
            row = thread.warp * 16 + thread.row + 8 * half
            head = share.head0 + row
            if cutlass.const_expr(self.cfg.split):
                if head < inputs.num_heads:
                    line = Int64((share.row * share.num_splits + share.split) * inputs.num_heads + head)
                    address = results.sums.toint() + (line * HEAD_DIM + (side * HALF + 2 * thread.pair)) * 4
                    for j in cutlass.range_constexpr(HALF // 8):
                        pair = (sums[4 * j + 2 * half], sums[4 * j + 2 * half + 1])
                        ptx.store_global_vec2(address + j * 32, pair)
            else:
                inverse = attend_ptx.load_shared_float(memory.lines.toint() + 2 * LINE_BYTES + row * 4)
                words = [
                    ptx.pack_bf16x2(sums[4 * j + 2 * half] * inverse, sums[4 * j + 2 * half + 1] * inverse)
                    for j in range(HALF // 8)
                ]
                # Two threads exchange, so that each has four channels in a row, and four threads 32 bytes.
                odd = thread.pair % 2
                place = 2 * thread.pair + odd * 6
                line = Int64(share.row * inputs.num_heads + head) * HEAD_DIM + (side * HALF + place)
                for j in cutlass.range_constexpr(0, HALF // 8, 2):
                    given = attend_ptx.pick(odd, words[j], words[j + 1])
                    kept = attend_ptx.pick(odd, words[j + 1], words[j])
                    got = Uint32(cute.arch.shuffle_sync_bfly(given, 1))
                    low, high = attend_ptx.pick(odd, got, kept), attend_ptx.pick(odd, kept, got)
                    if head < inputs.num_heads:
                        attend_ptx.store_words2(results.out.toint() + (line + 8 * j) * 2, low, high)

    def rotate_back(self, sums: cute.Tensor, inputs: AttendReads, share: AttendShare, thread: Thread) -> None:
        """Rotates the last 64 channels by the negative angles."""
        for j in range((HALF - NUM_ROTARY) // 8, HALF // 8):
            pair = Int64(share.row) * (NUM_ROTARY // 2) + (4 * j - (HALF - NUM_ROTARY) // 2) + thread.pair
            cos = attend_ptx.load_float(inputs.cos.toint() + pair * 4)
            sin = attend_ptx.load_float(inputs.sin.toint() + pair * 4)
            for half in range(2):
                at = 4 * j + 2 * half
                x0, x1 = sums[at], sums[at + 1]
                sums[at] = attend_ptx.fma(x0, cos, x1 * sin)
                sums[at + 1] = attend_ptx.fma(x1, cos, -(x0 * sin))
