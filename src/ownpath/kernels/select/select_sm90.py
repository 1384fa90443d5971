"""Exact top-k of long rows on Hopper: a cluster of CTAs holds a row's scores in registers, read once.

How it works. Scores become integers of the same order. A warp has a run of chunks of 128 scores, the CTAs of a cluster
follow each other, so entries are in the order of CTA, warp, chunk, thread. The scores are cut into at least K groups:
the least of the groups' best is a lower bound of the k-th best, which leaves a tenth to a fifth of random scores. These
are counted in 1,024 bins, equal steps of value between that bound and the best; every CTA adds the cluster's bins and
finds the one of the k-th best. The few scores there are gathered by every CTA and compared with each other, which
gives the threshold and how many of its equals are selected. If they are many (outliers stretch the bins; scores are
tied), they are counted again by the bits of their integers, ten at a time, at most four times. Counts of warps and
lower CTAs then give each selected entry its place. Rows that fit a CTA are its own: the others leave at once.

Roofline. 4 bytes a score; the time is the latency of three barriers of the cluster and of the launch. Limits: sm_90a;
K up to 1,024; pages of 32, 64 or 128 entries a block. The result is exact, so a row's bits depend on nothing else.
Positions and block tables must not be written by launches that may start early.
"""

from typing import Any

import cutlass
from cutlass import Int32, Int64, cute

from ownpath.kernels.select import ptx
from ownpath.kernels.select.config_sm90 import CHUNK, NUM_BINS, SelectConfig
from ownpath.kernels.select.parts_sm90 import (
    ABSENT,
    BEST,
    BINS,
    BLOCKS,
    BOUND,
    COUNT,
    LARGEST,
    LEAST,
    RowShare,
    SelectCut,
)
from ownpath.kernels.select.search_sm90 import SelectSearch
from ownpath.kernels.select.write_sm90 import SelectWriter


class ClusterSelect:
    """Builds the kernel of one ``SelectConfig``."""

    def __init__(self, config: SelectConfig) -> None:
        self.cfg = config
        self.warps = config.threads // 32
        self.vectors = config.keys // 4
        self.blocks_of_chunk = CHUNK // config.per_block
        self.bins = NUM_BINS // config.threads
        self.words = BLOCKS // 4 + self.warps * self.vectors * self.blocks_of_chunk
        self.searcher, self.writer = SelectSearch(config), SelectWriter(config)

    @cute.jit
    def __call__(
        self,
        scores: cute.Pointer,
        positions: cute.Pointer,
        blocks: cute.Pointer,
        rows: cute.Pointer,
        num: cute.Pointer,
        flags: cute.Pointer,
        table_blocks: Int32,
        topk: Int32,
        num_rows: Int32,
    ) -> None:
        """Host side, used to compile only."""
        cfg = self.cfg
        self.kernel(scores, positions, blocks, rows, num, flags, table_blocks, topk).launch(
            grid=[cfg.cluster, num_rows, 1],
            block=[cfg.threads, 1, 1],
            cluster=[cfg.cluster, 1, 1],
            min_blocks_per_mp=1024 // cfg.threads,
            preferred_smem_carveout=100,
        )

    @cute.kernel
    def kernel(
        self,
        scores: cute.Pointer,
        positions: cute.Pointer,
        blocks: cute.Pointer,
        rows: cute.Pointer,
        num: cute.Pointer,
        flags: cute.Pointer,
        table_blocks: Int32,
        topk: Int32,
    ) -> None:
        """Selects among a row's scores in as many CTAs as it needs."""
        cfg = self.cfg
        thread, _, _ = cute.arch.thread_idx()
        rank, row, _ = cute.arch.block_idx()
        cute.arch.griddepcontrol_launch_dependents()
        base = cute.arch.alloc_smem(Int32, self.words, 16).toint()
        position = ptx.load_global(positions.toint() + Int64(row) * 4)
        for idx in cutlass.range_constexpr(2 * self.bins):
            ptx.store_shared(base + BINS + (thread + idx * cfg.threads) * 4, Int32(0))
        if thread == 0:
            ptx.store_shared(base + BEST, Int32(ABSENT))
            ptx.store_shared(base + LEAST, Int32(LARGEST))
            ptx.store_shared(base + BOUND, Int32(LARGEST))
            ptx.store_shared(base + COUNT, Int32(0))
        visible = cutlass.min((position + 1) // cfg.ratio, table_blocks * cfg.per_block)
        peers = Int32(1)
        if visible > cfg.threads * cfg.keys:
            peers = Int32(cfg.cluster)
        if rank < peers:
            share = self.share(base, thread, rank, peers, visible)
            self.load_blocks(blocks.toint() + Int64(row) * table_blocks * 4, table_blocks, share)
            cute.arch.griddepcontrol_wait()
            cute.arch.sync_threads()
            line = scores.toint() + Int64(row) * table_blocks * (cfg.per_block * 4)
            self.select_row(
                line,
                rows.toint() + Int64(row) * topk * 4,
                num.toint() + Int64(row) * 4,
                flags.toint() + Int64(row) * 4,
                topk,
                share,
            )

    @cute.jit
    def share(self, base: Int32, thread: Int32, rank: Int32, peers: Int32, visible: Int32) -> RowShare:
        """Deals a row's chunks out evenly among the warps of its CTAs."""
        warp = cute.arch.make_warp_uniform(thread // 32)
        warps, chunks = peers * self.warps, (visible + CHUNK - 1) // CHUNK
        each, rest = chunks // warps, chunks % warps
        place = rank * self.warps + warp
        mine = each
        if place < rest:
            mine = each + 1
        first = rank * self.warps
        return RowShare(
            base, thread, warp, thread % 32, rank, peers,
            place * each + cutlass.min(place, rest), mine, first * each + cutlass.min(first, rest), visible,
        )  # fmt: skip

    @cute.jit
    def load_blocks(self, table: Int64, table_blocks: Int32, share: RowShare) -> None:
        """Copies the block numbers of the CTA's chunks to shared memory."""
        per_warp = self.vectors * self.blocks_of_chunk
        for turn in cutlass.range_constexpr((self.warps * per_warp + self.cfg.threads - 1) // self.cfg.threads):
            idx = share.thread + turn * self.cfg.threads
            block = share.first * self.blocks_of_chunk + idx
            if idx < self.warps * per_warp and block < table_blocks and block * self.cfg.per_block < share.visible:
                ptx.store_shared(share.base + BLOCKS + idx * 4, ptx.load_global(table + Int64(block) * 4))

    @cute.jit
    def select_row(self, scores: Int64, rows: Int64, num: Int64, flags: Int64, topk: Int32, share: RowShare) -> None:
        """Selects a row's best entries and writes them."""
        keys = self.load_keys(scores, share)
        best, least, bound = self.searcher.extremes(keys, topk, share)
        threshold, room, lower, equals = Int32(ABSENT), Int32(0), Int32(0), Int32(0)
        if share.visible > topk:
            cut = self.searcher.search(keys, best, cutlass.max(bound, least), topk, share)
            threshold, room, lower, equals = cut.threshold, cut.room, cut.lower, cut.equals
        if cutlass.const_expr(self.cfg.cluster > 1):
            if share.peers > 1:
                ptx.arrive_cluster()
        self.writer.write(keys, SelectCut(threshold, room, lower, equals), rows, share)
        if share.rank == 0:
            self.writer.finish(rows, num, flags, best, least, topk, share)
        if cutlass.const_expr(self.cfg.cluster > 1):
            if share.peers > 1:
                ptx.wait_cluster()

    @cute.jit
    def load_keys(self, scores: Int64, share: RowShare) -> cute.Tensor:
        """Loads a thread's scores as keys; ABSENT where the row sees none."""
        keys = cute.make_rmem_tensor(self.cfg.keys, Int32)
        for j in cutlass.range_constexpr(self.vectors):
            entry = (share.chunk + j) * CHUNK + share.lane * 4
            inside = Int32(0)
            if j < share.chunks and entry < share.visible:
                inside = Int32(1)
            words = ptx.load_scores_or_nan(scores + Int64(entry) * 4, inside)
            for i in cutlass.range_constexpr(4):
                keys[4 * j + i] = words[i]
        for j in cutlass.range_constexpr(self.vectors):
            end = share.visible - (share.chunk + j) * CHUNK - share.lane * 4
            if j >= share.chunks:
                end = Int32(0)
            for i in cutlass.range_constexpr(4):
                key = ptx.ordered_key(keys[4 * j + i])
                if i >= end:
                    key = Int32(ABSENT)
                keys[4 * j + i] = key
        return keys


def compile_select(config: SelectConfig) -> Any:
    """Compiles for sm_90a; no GPU is needed."""
    space = cute.AddressSpace.gmem

    def pointer(align: int) -> cute.Pointer:
        return cute.runtime.make_ptr(Int32, 1024, space, assumed_align=align)

    count = Int32(1)
    return cute.compile(
        ClusterSelect(config),
        pointer(16),
        pointer(4),
        pointer(4),
        pointer(4),
        pointer(4),
        pointer(4),
        count,
        count,
        count,
    )
