"""Writes what a row selects, in the order of its entries."""

import cutlass
from cutlass import Int32, Int64, cute

from ownpath.kernels.select import ptx
from ownpath.kernels.select.config_sm90 import CHUNK, SelectConfig
from ownpath.kernels.select.parts_sm90 import (
    BEST_INFINITE,
    BLOCKS,
    LEAST_INFINITE,
    WARP_SUMS,
    RowShare,
    SelectCut,
    sum_warps,
)


class SelectWriter:
    """Builds the end of the kernel of one ``SelectConfig``."""

    def __init__(self, config: SelectConfig) -> None:
        self.cfg = config
        self.vectors = config.keys // 4

    @cute.jit
    def write(self, keys: cute.Tensor, cut: SelectCut, rows: Int64, share: RowShare) -> None:
        """Writes the rows of what is above the threshold, and of its first equals, in the order of the entries."""
        above, equals = Int32(0), Int32(0)
        for idx in cutlass.range_constexpr(self.cfg.keys):
            if keys[idx] > cut.threshold:
                above += 1
            if keys[idx] == cut.threshold:
                equals += 1
        above, equals = ptx.sum_warp(above), ptx.sum_warp(equals)
        if share.lane == 0:
            ptx.store_shared(share.base + WARP_SUMS + share.warp * 4, above)
            ptx.store_shared(share.base + WARP_SUMS + 128 + share.warp * 4, equals)
        cute.arch.sync_threads()
        above_before, equals_before = sum_warps(0, share), cut.equals + sum_warps(1, share)
        place = cut.lower + above_before + cutlass.min(equals_before, cut.room)
        room = cutlass.min(cutlass.max(cut.room - equals_before, 0), equals)
        limit = cut.threshold
        if room > 0:
            limit = cut.threshold - 1
        if above + room > 0:
            if room == 0 or room == equals:
                self.write_above(keys, limit, place, rows, share)
            else:
                self.write_some_equals(keys, cut.threshold, room, place, rows, share)

    @cute.jit
    def write_above(self, keys: cute.Tensor, limit: Int32, place: Int32, rows: Int64, share: RowShare) -> None:
        """Writes the rows of a warp's keys above ``limit``."""
        for j in cutlass.range_constexpr(self.vectors):
            if j < share.chunks:
                chosen = [Int32(keys[4 * j + i] > limit) for i in range(4)]
                place = self.write_chunk(chosen, j, place, rows, share)

    @cute.jit
    def write_some_equals(
        self, keys: cute.Tensor, threshold: Int32, room: Int32, place: Int32, rows: Int64, share: RowShare
    ) -> None:
        """Writes the rows of a warp's keys above the threshold, and of the first ``room`` that equal it."""
        for j in cutlass.range_constexpr(self.vectors):
            if j < share.chunks:
                equal = [Int32(keys[4 * j + i] == threshold) for i in range(4)]
                rank, number = _places(equal)
                chosen = []
                for i in cutlass.range_constexpr(4):
                    takes = Int32(keys[4 * j + i] > threshold)
                    if equal[i] != 0 and rank < room:
                        takes = Int32(1)
                    rank += equal[i]
                    chosen.append(takes)
                room = cutlass.max(room - number, 0)
                place = self.write_chunk(chosen, j, place, rows, share)

    @cute.jit
    def write_chunk(self, chosen: list[Int32], j: int, place: Int32, rows: Int64, share: RowShare) -> Int32:
        """Writes the rows of a chunk's chosen entries from ``place`` on; returns the next place."""
        mine, number = _places(chosen)
        if number > 0:
            mine += place
            inside = (share.chunk - share.first + j) * CHUNK + share.lane * 4
            if chosen[0] + chosen[1] + chosen[2] + chosen[3] > 0:
                block = ptx.load_shared(share.base + BLOCKS + inside // self.cfg.per_block * 4)
                row = block * self.cfg.per_block + inside % self.cfg.per_block
                for i in cutlass.range_constexpr(4):
                    if chosen[i] != 0:
                        ptx.store_global(rows + Int64(mine) * 4, row + i)
                    mine += chosen[i]
        return place + number

    @cute.jit
    def finish(
        self, rows: Int64, num: Int64, flags: Int64, best: Int32, least: Int32, topk: Int32, share: RowShare
    ) -> None:
        """Writes a row's number of entries and its flag, and zeros after its last entry."""
        for place in cutlass.range(share.visible + share.thread, topk, self.cfg.threads, unroll=1):
            ptx.store_global(rows + Int64(place) * 4, Int32(0))
        if share.thread == 0:
            flag = Int32(0)
            if share.visible > 0 and (least <= LEAST_INFINITE or best >= BEST_INFINITE):
                flag = Int32(1)
            ptx.store_global(num, cutlass.min(share.visible, topk))
            ptx.store_global(flags, flag)


def _places(chosen: list[Int32]) -> tuple[Int32, Int32]:
    """Returns how many of a chunk's entries before this thread's are chosen, and how many in all."""
    ballots, below = [ptx.ballot(one) for one in chosen], ptx.lanes_below()
    before = [ptx.count_bits(lanes & below) for lanes in ballots]
    number = [ptx.count_bits(lanes) for lanes in ballots]
    return before[0] + before[1] + before[2] + before[3], number[0] + number[1] + number[2] + number[3]
