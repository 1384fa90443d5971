"""The kernels around the grouped products: sorting rows by expert, and the weighted sum of expert outputs.

``Align`` (one CTA, a cluster for long prompts, one warp for up to 64 pairs) counts the tokens of every expert, lays
the experts' rows one after another and cuts them into tiles; ``Permute`` copies token rows into that order, for
prompts so long that looking rows up one by one would cost more; ``Combine`` sums each token's expert outputs in the
order of its top-k slots, so that the result is the same bits every time. The order of rows inside an expert is free: a
row's sums do not depend on its place in a tile.

Roofline: bytes of the copied rows. Limits: at most 1024 experts, and ids outside the map count as absent.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
from cutlass import BFloat16, Float32, Int32, Int64, cute

from ownpath.kernels.dsl import ptx
from ownpath.kernels.nvfp4.config import ALIGN_THREADS, COPY_THREADS, AlignConfig, CombineConfig, PermuteConfig
from ownpath.kernels.nvfp4.pairs_sm90 import Pairs, lowest_bit, rank_pairs, warp_sum
from ownpath.kernels.nvfp4.schedule import Schedule, element


@dataclass(frozen=True)
class Share:
    """An expert's part of the schedule: ``count`` sorted rows from ``row_start``, tiles from ``tile_start``."""

    expert: Int32
    count: Int32
    tiles: Int32
    row_start: Int32
    tile_start: Int32

    @cute.jit
    def write_tiles(self, schedule: Schedule, rank: Int32, num_ctas: int) -> None:
        """Writes one expert's tiles, of even size: 192 rows in tiles of at most 128 become twice 96, not 128 and 64."""
        rows = (self.count + cutlass.max(self.tiles, 1) - 1) // cutlass.max(self.tiles, 1)
        for tile in cutlass.range(rank, self.tiles, num_ctas, unroll=1):
            entry = schedule.entry(self.tile_start + tile)
            first = tile * rows
            schedule.write_tile(entry, self.expert, self.row_start + first, cutlass.min(rows, self.count - first))


@dataclass(frozen=True)
class Counters:
    """A CTA's shared memory, and its rank in the cluster. counts: rows of each expert; cursors: each expert's next row;
    partial: sums of warps."""

    rank: Int32
    counts: cute.Pointer
    cursors: cute.Pointer
    partial: cute.Pointer


class Align:
    """Counts, places and tiles the (token, slot) pairs of one call."""

    def __init__(self, config: AlignConfig) -> None:
        self.cfg = config

    @cute.jit
    def __call__(
        self,
        ids: cute.Pointer,
        expert_map: cute.Pointer,
        schedule: cute.Pointer,
        num_tokens: Int32,
        top_k: Int32,
        num_ids: Int32,
        num_experts: Int32,
        tile_rows: Int32,
        index_offset: Int32,
    ) -> None:
        """Host side, used to compile only."""
        ctas = [self.cfg.num_ctas, 1, 1]
        self.kernel(ids, expert_map, schedule, num_tokens, top_k, num_ids, num_experts, tile_rows, index_offset).launch(
            grid=ctas, block=[self.cfg.num_threads, 1, 1], cluster=ctas
        )

    @cute.kernel
    def kernel(
        self,
        ids: cute.Pointer,
        expert_map: cute.Pointer,
        schedule: cute.Pointer,
        num_tokens: Int32,
        top_k: Int32,
        num_ids: Int32,
        num_experts: Int32,
        tile_rows: Int32,
        index_offset: Int32,
    ) -> None:
        """Counts, places and tiles. num_ids: number of expert ids; num_experts: local experts, shared ones last."""
        thread, _, _ = cute.arch.thread_idx()
        counters = None if self.cfg.few else self.counters(thread)
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        slots = top_k + self.cfg.num_shared
        pairs = Pairs(
            self.cfg, ids, expert_map, top_k, num_ids, num_experts, slots, num_tokens * slots, tile_rows, index_offset
        )
        if cutlass.const_expr(counters is None):
            self.align_few(pairs, Schedule(schedule), thread)
        else:
            self.align(pairs, Schedule(schedule), thread, counters)

    @cute.jit
    def counters(self, thread: Int32) -> Counters:
        """Allocates shared memory and sets the counts to zero."""
        rank = Int32(0)
        if cutlass.const_expr(self.cfg.num_ctas > 1):
            rank = cute.arch.block_idx_in_cluster()
        counts = cute.arch.alloc_smem(Int32, ALIGN_THREADS, 16)
        cursors = cute.arch.alloc_smem(Int32, ALIGN_THREADS, 16)
        partial = cute.arch.alloc_smem(Int32, 64, 16)
        element(counts, thread)[0] = Int32(0)
        cute.arch.sync_threads()
        return Counters(rank, counts, cursors, partial)

    @cute.jit
    def align(self, pairs: Pairs, schedule: Schedule, thread: Int32, counters: Counters) -> None:
        """Sorts any number of pairs: counters of all experts in shared memory, a thread for each expert."""
        num_ctas, rank, counts = self.cfg.num_ctas, counters.rank, counters.counts
        # Every CTA of the cluster counts and places its own share of the pairs.
        per_cta = (pairs.total + num_ctas - 1) // num_ctas
        begin = rank * per_cta
        end = cutlass.min(begin + per_cta, pairs.total)
        for idx in cutlass.range(begin + thread, end, ALIGN_THREADS, unroll=4):
            expert = pairs.expert(idx)
            if expert >= 0:
                cute.arch.atomic_add(counts + expert, Int32(1))
        cute.arch.sync_threads()
        count = element(counts, thread)[0]
        before = Int32(0)
        if cutlass.const_expr(num_ctas > 1):
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
            count = Int32(0)
            for other in cutlass.range_constexpr(num_ctas):
                there = ptx.load_cluster((counts + thread).toint(), Int32(other))
                count += there
                if other < rank:
                    before += there
            cute.arch.cluster_arrive()
        tiles = pairs.num_tiles(count)
        row_start = self.prefix(count, thread, counters.partial)
        share = Share(thread, count, tiles, row_start, self.prefix(tiles, thread, counters.partial))
        element(counters.cursors, thread)[0] = row_start + before
        share.write_tiles(schedule, rank, num_ctas)
        if thread == ALIGN_THREADS - 1 and rank == 0:
            schedule.write_head(share.tile_start + share.tiles, pairs.index_offset)
        cute.arch.sync_threads()
        for idx in cutlass.range(begin + thread, end, ALIGN_THREADS, unroll=4):
            expert = pairs.expert(idx)
            row = Int32(-1)
            if expert >= 0:
                row = cute.arch.atomic_add(counters.cursors + expert, Int32(1))
                schedule.write(pairs.index_offset + row, idx // pairs.slots)
            schedule.write(pairs.index_offset + pairs.total + idx, row)
        if cutlass.const_expr(num_ctas > 1):
            # No CTA leaves while another may still read its counts.
            cute.arch.cluster_wait()

    @cute.jit
    def align_few(self, pairs: Pairs, schedule: Schedule, lane: Int32) -> None:
        """Sorts at most 32 pairs, or 64: one warp, a pair or two to a lane, without barriers or counters.

        Experts come in the order in which pairs first name them.
        """
        ranks = rank_pairs(pairs, self.cfg.few, lane)
        row_starts = []
        rows, tiles = Int32(0), Int32(0)
        for half in cutlass.range_constexpr(self.cfg.few):
            low, high = ranks.masks[half]
            own_rows, own_tiles = Int32(0), Int32(0)
            if ranks.experts[half] >= 0 and ranks.earlier[half] == 0:
                own_rows = Int32(cute.arch.popc(low)) + Int32(cute.arch.popc(high))
                own_tiles = pairs.num_tiles(own_rows)
            row_end, tile_end = rows + warp_sum(own_rows, lane), tiles + warp_sum(own_tiles, lane)
            share = Share(ranks.experts[half], own_rows, own_tiles, row_end - own_rows, tile_end - own_tiles)
            share.write_tiles(schedule, Int32(0), 1)
            row_starts.append(share.row_start)
            rows, tiles = cute.arch.shuffle_sync(row_end, 31), cute.arch.shuffle_sync(tile_end, 31)
        for half in cutlass.range_constexpr(self.cfg.few):
            low, high = ranks.masks[half]
            first_row = cute.arch.shuffle_sync(row_starts[0], lowest_bit(low))
            if cutlass.const_expr(self.cfg.few == 2):
                other = cute.arch.shuffle_sync(row_starts[1], lowest_bit(high))
                first_row = first_row if low != 0 else other
            idx = lane + 32 * half
            if idx < pairs.total:
                row = Int32(-1)
                if ranks.experts[half] >= 0:
                    row = first_row + ranks.earlier[half]
                    schedule.write(pairs.index_offset + row, idx // pairs.slots)
                schedule.write(pairs.index_offset + pairs.total + idx, row)
        if lane == 31:
            schedule.write_head(tiles, pairs.index_offset)

    @cute.jit
    def prefix(self, value: Int32, thread: Int32, partial: cute.Pointer) -> Int32:
        """Sums ``value`` over all threads before this one."""
        lane, warp = thread % 32, thread // 32
        running = warp_sum(value, lane)
        if lane == 31:
            element(partial, warp)[0] = running
        cute.arch.sync_threads()
        if warp == 0:
            element(partial, 32 + lane)[0] = warp_sum(element(partial, lane)[0], lane)
        cute.arch.sync_threads()
        before = Int32(0)
        if warp > 0:
            before = element(partial, 31 + warp)[0]
        result = before + running - value
        cute.arch.sync_threads()
        return result


def address(pointer: cute.Pointer, row: Int32, width: Int32, piece: Int32) -> Int64:
    """Returns the byte address of eight BF16 of a row."""
    return pointer.toint() + (Int64(row) * width + piece * 8) * 2


class Permute:
    """sorted[row of (t, k)] = x[t]: each token is read once."""

    @cute.jit
    def __call__(
        self,
        x: cute.Pointer,
        schedule: cute.Pointer,
        out: cute.Pointer,
        num_tokens: Int32,
        slots: Int32,
        width: Int32,
        grid: Int32,
    ) -> None:
        self.kernel(x, schedule, out, num_tokens, slots, width).launch(grid=[grid, 1, 1], block=[COPY_THREADS, 1, 1])

    @cute.kernel
    def kernel(
        self,
        x: cute.Pointer,
        schedule: cute.Pointer,
        out: cute.Pointer,
        num_tokens: Int32,
        slots: Int32,
        width: Int32,
    ) -> None:
        thread, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        place = Schedule(schedule).sorted_rows(num_tokens, slots)
        pieces = width // 8
        unit = cta * COPY_THREADS + thread
        token, piece = unit // pieces, unit % pieces
        if token < num_tokens:
            words = ptx.load_global_vec4(address(x, token, width, piece))
            for slot in cutlass.range(slots, unroll=4):
                row = element(place, token * slots + slot)[0]
                if row >= 0:
                    ptx.store_global_vec4(address(out, row, width, piece), words)


class Combine:
    """y[t] = sum over slots k, in order, of weight[t, k] * rows[row of (t, k)]; shared slots have weight 1."""

    def __init__(self, config: CombineConfig) -> None:
        self.num_shared, self.wide = config.num_shared, config.wide

    @cute.jit
    def __call__(
        self,
        rows: cute.Pointer,
        schedule: cute.Pointer,
        weights: cute.Pointer,
        out: cute.Pointer,
        num_tokens: Int32,
        top_k: Int32,
        width: Int32,
        grid: Int32,
    ) -> None:
        self.kernel(rows, schedule, weights, out, num_tokens, top_k, width).launch(
            grid=[grid, 1, 1], block=[COPY_THREADS, 1, 1]
        )

    @cute.kernel
    def kernel(
        self,
        rows: cute.Pointer,
        schedule: cute.Pointer,
        weights: cute.Pointer,
        out: cute.Pointer,
        num_tokens: Int32,
        top_k: Int32,
        width: Int32,
    ) -> None:
        thread, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        pieces = width // 8
        slots = top_k + self.num_shared
        place = Schedule(schedule).sorted_rows(num_tokens, slots)
        unit = cta * COPY_THREADS + thread
        token, piece = unit // pieces, unit % pieces
        if token < num_tokens:
            total = cute.make_rmem_tensor(cute.make_layout(8), Float32)
            total.fill(0.0)
            for slot in cutlass.range(slots, unroll=4):
                row = element(place, token * slots + slot)[0]
                weight = Float32(1.0)
                if slot < top_k:
                    weight = element(weights, token * top_k + slot)[0]
                # Loads without a branch, so that several are in flight; the values of an absent row are not used.
                values = self.load(rows, cutlass.max(row, 0), width, piece)
                for idx in cutlass.range_constexpr(8):
                    term = weight * values[idx]
                    total[idx] = total[idx] + (term if row >= 0 else Float32(0.0))
            packed = tuple(ptx.pack_bf16x2(total[2 * idx], total[2 * idx + 1]) for idx in range(4))
            ptx.store_global_vec4(address(out, token, width, piece), packed)

    def load(self, rows: cute.Pointer, row: Int32, width: Int32, piece: Int32) -> list[Float32]:
        """Loads eight values of a row."""
        if self.wide:
            start = rows.toint() + (Int64(row) * width + piece * 8) * 4
            return [ptx.as_float(word) for half in (0, 16) for word in ptx.load_global_vec4(start + half)]
        words = ptx.load_global_vec4(address(rows, row, width, piece))
        return [ptx.widen_bf16(words[idx // 2], idx % 2 == 1) for idx in range(8)]


def _pointer(dtype: Any, align: int = 16) -> Any:
    return cute.runtime.make_ptr(dtype, 1024, cute.AddressSpace.gmem, assumed_align=align)


def compile_align(config: AlignConfig) -> Any:
    """Compiles for sm_90a; no GPU is needed."""
    ids = _pointer(Int64 if config.wide_ids else Int32, 4)
    one = Int32(1)
    return cute.compile(Align(config), ids, _pointer(Int32), _pointer(Int32), *[one] * 6)


def compile_permute(_config: PermuteConfig) -> Any:
    """Compiles for sm_90a; no GPU is needed."""
    tensors = (_pointer(BFloat16), _pointer(Int32), _pointer(BFloat16))
    return cute.compile(Permute(), *tensors, *[Int32(1)] * 4)


def compile_combine(config: CombineConfig) -> Any:
    """Compiles for sm_90a; no GPU is needed."""
    args = (_pointer(BFloat16), _pointer(Int32), _pointer(Float32, 4), _pointer(BFloat16))
    return cute.compile(Combine(config), *args, *[Int32(1)] * 4)
