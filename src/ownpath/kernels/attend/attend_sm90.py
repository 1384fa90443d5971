"""Decode attention on Hopper: one CTA attends from 64 heads of one row to the row's keys, which are the values too.

How it works. Tiles of 64 keys. Three warpgroups: one gathers keys into shared memory, 16 bytes a thread and copy,
swizzled as the tensor cores read them; two multiply. A row of 512 values does not fit the registers of one warpgroup,
so each multiplies by 256 channels. The left one also multiplies queries by keys and computes the softmax, in
registers; it hands each tile's weights to the right one through shared memory, rounded to BF16, with the factors by
which the sums so far shrink. Shared memory: queries 64 KiB; keys 4 stages of 32 KiB, half of a tile's channels each, so
that a half is loaded anew as soon as its warpgroup has read it; weights twice 8 KiB.

The queries come as the projection leaves them: while the first keys are on their way, both multiplying warpgroups norm
and rotate them into shared memory, a head to a warp.

A row's keys are numbered: first its window's (a ring whose rows 0 to min(position, 127) it sees), then its entries.
Only the last tile can have keys that are not there; they are zeros with score minus infinity, and their memory is not
read. With ``split`` a row's tiles are shared by CTAs, each of which leaves its sums and, per head, their largest score
and sum of weights; ``combine_sm90`` merges them. Otherwise the sums start with the sink, and the epilogue divides,
rotates back and rounds.

Roofline. 1 KiB a key at 4.41 TB/s; 2048 cycles of the tensor cores a tile. Limits: sm_90a; 512 channels, 64 rotary.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
from cutlass import BFloat16, Float32, Int32, Int64, Uint8, Uint32, cute
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup
from cutlass.utils.hopper_helpers import make_trivial_tiled_mma

from ownpath.kernels.attend import ptx as attend_ptx
from ownpath.kernels.attend.config_sm90 import (
    BLOCK_TOKENS,
    HEAD_DIM,
    NUM_ROTARY,
    REGISTERS,
    TILE_HEADS,
    TILE_KEYS,
    WG,
    AttendConfig,
)
from ownpath.kernels.dsl import ptx
from ownpath.kernels.dsl.pipeline import Pipeline
from ownpath.kernels.dsl.warpgroup import Thread, shared_operand, wgmma

WINDOW = 128
HALF = HEAD_DIM // 2
CHUNK = 64
"""Channels of a swizzled line of 128 bytes."""
CHUNK_BYTES = TILE_KEYS * CHUNK * 2
STAGE_BYTES = TILE_KEYS * HALF * 2
CONSUMERS = 2 * WG
P_FULL, P_EMPTY, SUMS_READY, Q_READY = 1, 3, 5, 6
"""Named barriers; the first two have one for each buffer of weights."""
P_BYTES = TILE_HEADS * TILE_KEYS * 2
LINE_BYTES = TILE_HEADS * 4
LOG2_E = 1.4426950408889634
MINUS_INFINITY = float("-inf")


@dataclass(frozen=True)
class Inputs:
    """The kernel's arguments. q_row, q_head: elements from row to row and from head to head of q. table: the
    rows' blocks or selected rows, ``width`` to a row."""

    q: cute.Pointer
    cos: cute.Pointer
    sin: cute.Pointer
    window: cute.Pointer
    entries: cute.Pointer
    positions: cute.Pointer
    slots: cute.Pointer
    table: cute.Pointer
    counts: cute.Pointer
    sink: cute.Pointer
    num_heads: Int32
    q_row: Int32
    q_head: Int32
    width: Int32
    scale: Float32
    eps: Float32


@dataclass(frozen=True)
class Results:
    """What the kernel writes: the result, or sums [row, split, head, 512] and statistics [row, split, head, 2]."""

    out: cute.Pointer
    sums: cute.Pointer
    stats: cute.Pointer


@dataclass(frozen=True)
class Memory:
    """A CTA's shared memory. lines: float32 [3, 64], factors of each buffer of weights, and what the sums are divided
    by."""

    q: cute.Pointer
    keys: cute.Pointer
    p: cute.Pointer
    lines: cute.Pointer
    pipeline: Pipeline


@dataclass(frozen=True)
class Share:
    """A CTA's place: a row, 64 heads from ``head0`` on, and ``num_tiles`` tiles from ``first_tile`` on of the row's
    ``num_keys`` keys, of which ``num_window`` are the window's."""

    row: Int32
    head0: Int32
    split: Int32
    num_splits: Int32
    slot: Int32
    num_window: Int32
    num_keys: Int32
    first_tile: Int32
    num_tiles: Int32


class Attend:
    """Builds the kernel of one ``AttendConfig``."""

    def __init__(self, config: AttendConfig) -> None:
        self.cfg = config

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
            grid=[groups, num_splits, num_rows],
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
        inputs = Inputs(
            q, cos, sin, window, entries, positions, slots, table, counts, sink,
            num_heads, q_row, q_head, width, scale, eps,
        )  # fmt: skip
        results = Results(out, sums, stats)
        thread, _, _ = cute.arch.thread_idx()
        warp_group = cute.arch.make_warp_uniform(thread // WG)
        memory = self.allocate()
        if thread == 0:
            memory.pipeline.init(WG, 4)
        cute.arch.sync_threads()
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()
        share = self.share(inputs)
        if warp_group == 2:
            cute.arch.setmaxregister_decrease(REGISTERS[0])
            self.load_keys(inputs, share, memory, thread % WG)
        else:
            cute.arch.setmaxregister_increase(REGISTERS[1])
            self.load_queries(inputs, share, memory, thread)
            place = Thread(thread % WG, warp_group)
            if share.num_tiles > 0:
                if warp_group == 0:
                    cute.arch.setmaxregister_increase(REGISTERS[2])
                    self.multiply_left(inputs, results, share, memory, place)
                else:
                    self.multiply_right(inputs, results, share, memory, place)
            else:
                if cutlass.const_expr(self.cfg.split):
                    if thread < TILE_HEADS:
                        self.write_stats(results, share, inputs, thread, Float32(MINUS_INFINITY), Float32(0.0))

    def allocate(self) -> Memory:
        """Allocates all of a CTA's shared memory."""
        q = cute.arch.alloc_smem(BFloat16, TILE_HEADS * HEAD_DIM, 1024)
        keys = cute.arch.alloc_smem(BFloat16, 4 * TILE_KEYS * HALF, 1024)
        p = cute.arch.alloc_smem(BFloat16, 2 * TILE_HEADS * TILE_KEYS, 1024)
        lines = cute.arch.alloc_smem(Float32, 3 * TILE_HEADS, 16)
        return Memory(q, keys, p, lines, Pipeline.allocate(4))

    @cute.jit
    def share(self, inputs: Inputs) -> Share:
        """Returns this CTA's share."""
        cfg = self.cfg
        group, split, row = cute.arch.block_idx()
        _, num_splits, _ = cute.arch.grid_dim()
        end = attend_ptx.load_word(inputs.positions.toint() + Int64(row) * 4) + 1
        slot = attend_ptx.load_word(inputs.slots.toint() + Int64(row) * 4)
        num_window = cutlass.min(end, WINDOW)
        num_keys = num_window
        if cutlass.const_expr(cfg.selected):
            count = attend_ptx.load_word(inputs.counts.toint() + Int64(row) * 4)
            num_keys = num_window + cutlass.min(count, inputs.width)
        elif cutlass.const_expr(cfg.per_block):
            count = end // (BLOCK_TOKENS // cfg.per_block)
            num_keys = num_window + cutlass.min(count, inputs.width * cfg.per_block)
        tiles = (num_keys + TILE_KEYS - 1) // TILE_KEYS
        first, num_tiles = Int32(0), tiles
        if cutlass.const_expr(cfg.split):
            each = (tiles + num_splits - 1) // num_splits
            first = cutlass.min(split * each, tiles)
            num_tiles = cutlass.min(each, tiles - first)
        return Share(row, group * TILE_HEADS, split, num_splits, slot, num_window, num_keys, first, num_tiles)

    @cute.jit
    def key_address(self, inputs: Inputs, share: Share, key: Int32) -> Int64:
        """Returns the address of a key; of the window's first for one that is not there."""
        cfg = self.cfg
        width = HEAD_DIM * 2
        window = inputs.window.toint() + Int64(share.slot) * (WINDOW * width)
        address = window
        if key < share.num_window:
            address = window + key * width
        if cutlass.const_expr(cfg.per_block):
            if key >= share.num_window and key < share.num_keys:
                entry = key - share.num_window
                line = inputs.table.toint() + Int64(share.row) * inputs.width * 4
                row = Int32(0)
                if cutlass.const_expr(cfg.selected):
                    row = attend_ptx.load_word(line + entry * 4)
                else:
                    block = attend_ptx.load_word(line + entry // cfg.per_block * 4)
                    row = block * cfg.per_block + entry % cfg.per_block
                address = inputs.entries.toint() + Int64(row) * width
        return address

    @cute.jit
    def load_keys(self, inputs: Inputs, share: Share, memory: Memory, idx: Int32) -> None:
        """Gathers the keys of every tile, the left half of the channels first. A warp has 16 keys, one to a copy."""
        warp, lane = idx // 32, idx % 32
        # Lane l copies 16-byte unit l of a half: unit l % 8 of chunk l // 8, exchanged within a line by the key.
        base = memory.keys.toint() + lane // 8 * CHUNK_BYTES + warp * (16 * 128)
        for i in cutlass.range(share.num_tiles, unroll=1):
            key0 = (share.first_tile + i) * TILE_KEYS + warp * 16
            mine = self.key_address(inputs, share, key0 + lane % 16)
            phase = ((i >> 1) & 1) ^ 1
            for half in cutlass.range_constexpr(2):
                stage = (i & 1) * 2 + half
                cute.arch.mbarrier_wait(memory.pipeline.empty + stage, phase)
                for j in cutlass.range_constexpr(16):
                    source = Int64(cute.arch.shuffle_sync(mine, j)) + (half * (HALF * 2) + lane * 16)
                    num_bytes = Int32(0)
                    if key0 + j < share.num_keys:
                        num_bytes = Int32(16)
                    target = base + stage * STAGE_BYTES + j * 128 + ((lane % 8) ^ (j % 8)) * 16
                    attend_ptx.copy16(target, source, num_bytes)
                attend_ptx.arrive_after_copies(memory.pipeline.full + stage)

    @cute.jit
    def load_queries(self, inputs: Inputs, share: Share, memory: Memory, thread: Int32) -> None:
        """Norms and rotates the queries into shared memory: a head to a warp, 8 heads one after the other."""
        warp, lane = thread // 32, thread % 32
        head0 = share.head0 + warp * 8
        line = inputs.q.toint() + (Int64(share.row) * inputs.q_row + head0 * inputs.q_head) * 2 + lane * 16
        words = []
        for h in cutlass.range_constexpr(8):
            inside = Int32(0)
            if head0 + h < inputs.num_heads:
                inside = Int32(1)
            address = line + h * inputs.q_head * 2
            words.append(
                (
                    *attend_ptx.load_words_or_zero(address, inside),
                    *attend_ptx.load_words_or_zero(address + HALF * 2, inside),
                )
            )
        # The last 8 lanes' second units have the rotary channels: four pairs each. Others read what they do not use.
        angles = (Int64(share.row) * (NUM_ROTARY // 2) + lane % 8 * 4) * 4
        cos = [ptx.as_float(word) for word in ptx.load_global_vec4(inputs.cos.toint() + angles)]
        sin = [ptx.as_float(word) for word in ptx.load_global_vec4(inputs.sin.toint() + angles)]
        rotates = Int32(0)
        if lane >= 24:
            rotates = Int32(1)
        base = memory.q.toint() + lane // 8 * CHUNK_BYTES + warp * 8 * 128
        for h in cutlass.range_constexpr(8):
            total = Float32(0.0)
            for word in words[h]:
                low, high = ptx.widen_bf16(word, False), ptx.widen_bf16(word, True)
                total = attend_ptx.fma(high, high, attend_ptx.fma(low, low, total))
            for power in cutlass.range_constexpr(5):
                total = total + cute.arch.shuffle_sync_bfly(total, 1 << power)
            factor = attend_ptx.rsqrt(attend_ptx.fma(total, 1.0 / HEAD_DIM, inputs.eps))
            normed = [
                ptx.pack_bf16x2(ptx.widen_bf16(word, False) * factor, ptx.widen_bf16(word, True) * factor)
                for word in words[h]
            ]
            for idx in cutlass.range_constexpr(4):
                x0, x1 = ptx.widen_bf16(normed[4 + idx], False), ptx.widen_bf16(normed[4 + idx], True)
                turned = ptx.pack_bf16x2(
                    attend_ptx.fma(x0, cos[idx], -(x1 * sin[idx])), attend_ptx.fma(x0, sin[idx], x1 * cos[idx])
                )
                normed[4 + idx] = attend_ptx.pick(rotates, turned, normed[4 + idx])
            address = base + h * 128 + ((lane % 8) ^ h) * 16
            attend_ptx.store_shared_words(address, tuple(normed[:4]))
            attend_ptx.store_shared_words(address + 4 * CHUNK_BYTES, tuple(normed[4:]))
        attend_ptx.fence_async()
        attend_ptx.barrier_sync(Q_READY, CONSUMERS)

    def values_operand(self, memory: Memory) -> cute.Tensor:
        """Makes the keys' stages as values, [256 channels, 64 keys, stages]: channels are contiguous."""
        outer = cute.make_layout(
            ((CHUNK, HALF // CHUNK), (8, TILE_KEYS // 8), 4),
            stride=((1, CHUNK * TILE_KEYS), (CHUNK, 8 * CHUNK), TILE_KEYS * HALF),
        )
        layout = cute.make_composed_layout(cute.make_swizzle(3, 4, 3), 0, outer)
        return cute.make_tensor(cute.recast_ptr(memory.keys, layout.inner, BFloat16), layout.outer)

    @cute.jit
    def multiply_left(self, inputs: Inputs, results: Results, share: Share, memory: Memory, thread: Thread) -> None:
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
        self.issue_scores(qk, q, k, scores, memory, Int32(0))
        warpgroup.wait_group(0)
        last = share.num_tiles - 1
        for i in cutlass.range(last, unroll=1):
            self.soften(scores, weights, sums, stats, inputs.scale * LOG2_E, memory, thread, i, None)
            warpgroup.fence()
            self.issue_values(pv, weights, values, sums, (i & 1) * 2)
            self.issue_scores(qk, q, k, scores, memory, i + 1)
            warpgroup.wait_group(2)
            self.release(memory, (i & 1) * 2, thread)
            warpgroup.wait_group(0)
        limit = share.num_keys - (share.first_tile + last) * TILE_KEYS
        self.soften(scores, weights, sums, stats, inputs.scale * LOG2_E, memory, thread, last, limit)
        warpgroup.fence()
        self.issue_values(pv, weights, values, sums, (last & 1) * 2)
        self.finish_stats(stats, inputs, results, share, memory, thread)
        warpgroup.wait_group(0)
        self.store(sums, inputs, results, share, memory, thread, 0)

    @cute.jit
    def multiply_right(self, inputs: Inputs, results: Results, share: Share, memory: Memory, thread: Thread) -> None:
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
        self.store(sums, inputs, results, share, memory, thread, 1)

    @cute.jit
    def initial_stats(self, inputs: Inputs, share: Share, thread: Thread) -> cute.Tensor:
        """Returns this thread's (largest score, sum of weights) for rows g and g + 8.

        The whole row's CTA starts as if the sink had been a score: weight 1 in one of a row's four threads.
        """
        stats = cute.make_rmem_tensor(4, Float32)
        for half in cutlass.range_constexpr(2):
            stats[2 * half] = Float32(MINUS_INFINITY)
            stats[2 * half + 1] = Float32(0.0)
            if cutlass.const_expr(not self.cfg.split):
                head = share.head0 + thread.warp * 16 + thread.row + 8 * half
                if head < inputs.num_heads:
                    stats[2 * half] = attend_ptx.load_float(inputs.sink.toint() + Int64(head) * 4) / inputs.scale
                    if thread.pair == 0:
                        stats[2 * half + 1] = Float32(1.0)
        return stats

    @cute.jit
    def issue_scores(
        self, qk: cute.TiledMma, q: cute.Tensor, k: cute.Tensor, scores: cute.Tensor, memory: Memory, i: Int32
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
        scores: cute.Tensor,
        weights: cute.Tensor,
        sums: cute.Tensor,
        stats: cute.Tensor,
        scale: Float32,
        memory: Memory,
        thread: Thread,
        i: Int32,
        limit: Int32 | None,
    ) -> None:
        """Turns tile i's scores into weights relative to the largest score so far, hands them over, shrinks the sums.

        scale: turns scores into powers of two. limit: the tile's number of keys, where it may have fewer than 64.
        """
        words = cute.recast_tensor(weights, Uint32)
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

    def release(self, memory: Memory, stage: Int32, thread: Thread) -> None:
        """Releases a stage, which this warpgroup was the last to read."""
        memory.pipeline.consumer().release(stage, thread.idx)

    @cute.jit
    def finish_stats(
        self, stats: cute.Tensor, inputs: Inputs, results: Results, share: Share, memory: Memory, thread: Thread
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
            else:
                if thread.pair == 0:
                    attend_ptx.store_shared_float(
                        memory.lines.toint() + 2 * LINE_BYTES + row * 4, ptx.reciprocal(total)
                    )
        cute.arch.sync_warp()
        attend_ptx.barrier_arrive(SUMS_READY, CONSUMERS)

    @cute.jit
    def write_stats(
        self, results: Results, share: Share, inputs: Inputs, row: Int32, largest: Float32, total: Float32
    ) -> None:
        """Writes a head's largest score, as a power of two, and its sum of weights."""
        head = share.head0 + row
        if head < inputs.num_heads:
            line = Int64((share.row * share.num_splits + share.split) * inputs.num_heads + head)
            ptx.store_global_vec2(results.stats.toint() + line * 8, (largest, total))

    @cute.jit
    def store(
        self,
        sums: cute.Tensor,
        inputs: Inputs,
        results: Results,
        share: Share,
        memory: Memory,
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

    def rotate_back(self, sums: cute.Tensor, inputs: Inputs, share: Share, thread: Thread) -> None:
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
