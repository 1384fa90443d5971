"""The search for the k-th best key of a row in a cluster's registers."""

import cutlass
from cutlass import Float32, Int32, cute

from ownpath.kernels.select import ptx
from ownpath.kernels.select.config_sm90 import MAX_CANDIDATES, NUM_BINS, SelectConfig
from ownpath.kernels.select.parts_sm90 import (
    ABSENT,
    BEST,
    BINS,
    BOUND,
    CANDIDATES,
    COUNT,
    FOUND,
    FOUND_OF_RANK,
    LARGEST,
    LEAST,
    OWN_CANDIDATES,
    ROOM,
    SIGN,
    THRESHOLD,
    RowShare,
    SelectCut,
    barrier,
    bit_of,
    sum_before,
)

FULL_BINS = float(NUM_BINS - 1)
VALUES, HIGH_BITS, MIDDLE_BITS, LOW_BITS, LAST_BITS = -1, 22, 12, 2, 0
"""A round counts by values, or by ten bits from this one on."""
MASK = NUM_BINS - 1


class SelectSearch:
    """Builds the search of one ``SelectConfig``."""

    def __init__(self, config: SelectConfig) -> None:
        self.cfg = config
        self.vectors = config.keys // 4
        self.bins = NUM_BINS // config.threads

    @cute.jit
    def extremes(self, keys: cute.Tensor, topk: Int32, share: RowShare) -> tuple[Int32, Int32, Int32]:
        """Returns the row's best and least key, and a lower bound of the k-th best: the least of the best keys of
        topk groups of scores or more. A group is two to 32 lanes of a warp, one lane, or half of one."""
        least, even, odd = Int32(LARGEST), Int32(ABSENT), Int32(ABSENT)
        for idx in cutlass.range_constexpr(self.cfg.keys):
            key = keys[idx]
            if cutlass.const_expr(idx % 2):
                odd = cutlass.max(odd, key)
            else:
                even = cutlass.max(even, key)
            if key == ABSENT:
                key = Int32(LARGEST)
            least = cutlass.min(least, key)
        best = cutlass.max(even, odd)
        lanes = share.peers * self.cfg.threads
        bound = best
        for bit in cutlass.range_constexpr(5):
            if lanes >= topk * (2 << bit):
                bound = ptx.max_of_pair(bound, 1 << bit)
        if lanes < topk:
            bound = cutlass.min(even, odd)
            if 2 * lanes < topk:
                bound = Int32(ABSENT)
        best, least, bound = ptx.max_warp(best), ptx.min_warp(least), ptx.min_warp(bound)
        if share.lane == 0:
            ptx.merge_max(share.base + BEST, best)
            ptx.merge_min(share.base + LEAST, least)
            ptx.merge_min(share.base + BOUND, bound)
        barrier(self.cfg.cluster, share)
        best, least, bound = Int32(ABSENT), Int32(LARGEST), Int32(LARGEST)
        if share.lane < share.peers:
            best, least, bound, _ = ptx.load_peer(share.base + BEST, share.lane, 4)
        return ptx.max_warp(best), ptx.min_warp(least), ptx.min_warp(bound)

    @cute.jit
    def search(self, keys: cute.Tensor, best: Int32, low: Int32, topk: Int32, share: RowShare) -> SelectCut:
        """Searches the k-th best key, which lies between ``low`` and ``best``."""
        alive = Int32(0)
        for idx in cutlass.range_constexpr(self.cfg.keys):
            if keys[idx] >= low:
                alive = alive | Int32(bit_of(idx))
        top = ptx.value_of(best)
        scale = Float32(FULL_BINS) / (top - ptx.value_of(low))
        shift, buffer, need, lower = Int32(VALUES), Int32(BINS), topk, Int32(0)
        if low == best:
            shift = Int32(LAST_BITS)
        threshold, count, searches = best ^ SIGN, Int32(0), Int32(1)
        while searches != 0:
            counts = share.base + buffer
            if shift == VALUES:
                self.count_values(keys, alive, top, scale, counts, share)
            else:
                self.count_bits(keys, alive, shift, counts)
            barrier(self.cfg.cluster, share)
            self.find(counts, need, share)
            buffer = buffer ^ (4 * NUM_BINS)
            for idx in cutlass.range_constexpr(self.bins):
                ptx.store_shared(share.base + buffer + (share.thread + idx * self.cfg.threads) * 4, Int32(0))
            cute.arch.sync_threads()
            chosen, need, above, count = (ptx.load_shared(share.base + FOUND + 4 * idx) for idx in range(4))
            lower += above
            if shift == VALUES:
                alive = self.keep_values(keys, alive, top, scale, chosen)
            else:
                alive = self.keep_bits(keys, alive, shift, chosen)
                threshold = (threshold & ~(Int32(MASK) << shift)) | ((MASK - chosen) << shift)
            searches = Int32(0)
            if shift != LAST_BITS and count > MAX_CANDIDATES:
                searches = Int32(1)
                shift = self.next_bits(shift)
        threshold = threshold ^ SIGN
        room, equals = need, Int32(0)
        if shift == LAST_BITS:
            for rank in cutlass.range_constexpr(self.cfg.cluster):
                if rank < share.rank:
                    equals += ptx.load_shared(share.base + FOUND_OF_RANK + 4 * rank)
        else:
            self.gather(keys, alive, share)
            self.compare(need, count, share)
            cute.arch.sync_threads()
            threshold, room = ptx.load_shared(share.base + THRESHOLD), ptx.load_shared(share.base + ROOM)
            above, equals = self.before(threshold, share)
            lower += above
        return SelectCut(threshold, room, lower, equals)

    @cute.jit
    def next_bits(self, shift: Int32) -> Int32:
        """Returns the bits to count by after those from ``shift`` on, or after values."""
        following = Int32(HIGH_BITS)
        if shift == HIGH_BITS:
            following = Int32(MIDDLE_BITS)
        if shift == MIDDLE_BITS:
            following = Int32(LOW_BITS)
        if shift == LOW_BITS:
            following = Int32(LAST_BITS)
        return following

    @cute.jit
    def count_values(
        self, keys: cute.Tensor, alive: Int32, top: Float32, scale: Float32, counts: Int32, share: RowShare
    ) -> None:
        """Counts the keys by value."""
        for j in cutlass.range_constexpr(self.vectors):
            if j < share.chunks:
                for i in cutlass.range_constexpr(4):
                    idx = 4 * j + i
                    if alive & Int32(bit_of(idx)) != 0:
                        ptx.merge_sum(counts + ptx.value_bin(keys[idx], top, scale, NUM_BINS) * 4, Int32(1))

    @cute.jit
    def count_bits(self, keys: cute.Tensor, alive: Int32, shift: Int32, counts: Int32) -> None:
        """Counts the keys by ten of their bits: the first lane's bin at once, as most of a warp may have it."""
        for idx in cutlass.range_constexpr(self.cfg.keys):
            mine = alive & Int32(bit_of(idx))
            lanes = ptx.ballot(mine)
            if lanes != 0:
                place = _bits_bin(keys[idx], shift)
                first = ptx.broadcast_lane(place, ptx.lowest_bit(lanes))
                is_same = Int32(0)
                if mine != 0 and place == first:
                    is_same = Int32(1)
                same = ptx.ballot(is_same)
                if is_same == 1 and (same & ptx.lanes_below()) == 0:
                    ptx.merge_sum(counts + place * 4, ptx.count_bits(same))
                if mine != 0 and is_same == 0:
                    ptx.merge_sum(counts + place * 4, Int32(1))

    @cute.jit
    def keep_values(self, keys: cute.Tensor, alive: Int32, top: Float32, scale: Float32, chosen: Int32) -> Int32:
        """Returns which keys are in a bin of values."""
        kept = Int32(0)
        for idx in cutlass.range_constexpr(self.cfg.keys):
            if ptx.value_bin(keys[idx], top, scale, NUM_BINS) == chosen:
                kept = kept | Int32(bit_of(idx))
        return kept & alive

    @cute.jit
    def keep_bits(self, keys: cute.Tensor, alive: Int32, shift: Int32, chosen: Int32) -> Int32:
        """Returns which keys are in a bin of bits."""
        kept = Int32(0)
        for idx in cutlass.range_constexpr(self.cfg.keys):
            if _bits_bin(keys[idx], shift) == chosen:
                kept = kept | Int32(bit_of(idx))
        return kept & alive

    @cute.jit
    def find(self, counts: Int32, need: Int32, share: RowShare) -> None:
        """Adds the cluster's bins, best first, and tells the CTA: the bin in which ``need`` keys are reached, how many
        of it are needed, how many the CTAs before have above it, and how many it has: all in all and in each CTA."""
        ranks, bins = self.cfg.cluster, self.bins
        of_rank = self.load_bins(counts + share.thread * (4 * bins), share)
        totals, befores = [], []
        for idx in cutlass.range_constexpr(bins):
            total, before = Int32(0), Int32(0)
            for rank in cutlass.range_constexpr(ranks):
                total += of_rank[rank][idx]
                if rank < share.rank:
                    before += of_rank[rank][idx]
            totals.append(total)
            befores.append(before)
        total, before = sum(totals[1:], totals[0]), sum(befores[1:], befores[0])
        above = sum_before(total, before, share)
        reached, lower = above[0], above[1]
        for idx in cutlass.range_constexpr(bins):
            after = reached + totals[idx]
            if reached < need and after >= need:
                found = (share.thread * bins + idx, need - reached, lower, totals[idx])
                for at in cutlass.range_constexpr(4):
                    ptx.store_shared(share.base + FOUND + 4 * at, found[at])
                for rank in cutlass.range_constexpr(ranks):
                    ptx.store_shared(share.base + FOUND_OF_RANK + 4 * rank, of_rank[rank][idx])
            reached = after
            lower += befores[idx]

    @cute.jit
    def load_bins(self, address: Int32, share: RowShare) -> list[list[Int32]]:
        """Loads a thread's bins of every CTA, which are zero where the row needs one alone."""
        ranks, bins = self.cfg.cluster, self.bins
        words = cute.make_rmem_tensor(ranks * bins, Int32)
        words.fill(0)
        if share.peers == ranks:
            for rank in cutlass.range_constexpr(ranks):
                parts = ptx.load_peer(address, Int32(rank), bins)
                for idx in cutlass.range_constexpr(bins):
                    words[rank * bins + idx] = parts[idx]
        else:
            parts = ptx.load_peer(address, Int32(0), bins)
            for idx in cutlass.range_constexpr(bins):
                words[idx] = parts[idx]
        return [[words[rank * bins + idx] for idx in range(bins)] for rank in range(ranks)]

    @cute.jit
    def gather(self, keys: cute.Tensor, alive: Int32, share: RowShare) -> None:
        """Brings the keys of the last bin into every CTA, those of lower CTAs first."""
        if alive != 0:
            place = ptx.fetch_add(share.base + COUNT, ptx.count_bits(alive))
            for idx in cutlass.range_constexpr(self.cfg.keys):
                if alive & Int32(bit_of(idx)) != 0:
                    ptx.store_shared(share.base + OWN_CANDIDATES + place * 4, keys[idx])
                    place += 1
        barrier(self.cfg.cluster, share)
        if share.warp < share.peers:
            before = Int32(0)
            if share.lane < share.warp:
                before = ptx.load_shared(share.base + FOUND_OF_RANK + 4 * share.lane)
            goal = share.base + CANDIDATES + ptx.sum_warp(before) * 4
            number = ptx.load_shared(share.base + FOUND_OF_RANK + 4 * share.warp)
            for idx in cutlass.range(share.lane, number, 32, unroll=1):
                key = ptx.load_peer(share.base + OWN_CANDIDATES + idx * 4, share.warp, 1)[0]
                ptx.store_shared(goal + idx * 4, key)
        cute.arch.sync_threads()

    @cute.jit
    def compare(self, need: Int32, count: Int32, share: RowShare) -> None:
        """Compares the candidates with each other: whoever is the ``need``-th best says so."""
        if share.thread < count:
            mine = ptx.load_shared(share.base + CANDIDATES + share.thread * 4)
            above, reached = Int32(0), Int32(0)
            for idx in cutlass.range(count, unroll=4):
                other = ptx.load_shared(share.base + CANDIDATES + idx * 4)
                if other > mine:
                    above += 1
                if other >= mine:
                    reached += 1
            if above < need and need <= reached:
                ptx.store_shared(share.base + THRESHOLD, mine)
                ptx.store_shared(share.base + ROOM, need - above)

    @cute.jit
    def before(self, threshold: Int32, share: RowShare) -> tuple[Int32, Int32]:
        """Counts the candidates of lower CTAs that are above the threshold, and that equal it."""
        above, equals = Int32(0), Int32(0)
        if cutlass.const_expr(self.cfg.cluster > 1):
            end = Int32(0)
            for rank in cutlass.range_constexpr(self.cfg.cluster):
                if rank < share.rank:
                    end += ptx.load_shared(share.base + FOUND_OF_RANK + 4 * rank)
            for idx in cutlass.range(share.lane, end, 32, unroll=1):
                key = ptx.load_shared(share.base + CANDIDATES + idx * 4)
                if key > threshold:
                    above += 1
                if key == threshold:
                    equals += 1
            above, equals = ptx.sum_warp(above), ptx.sum_warp(equals)
        return above, equals


def _bits_bin(key: Int32, shift: Int32) -> Int32:
    """Returns the bin of ten bits of a key, the best first."""
    return MASK - (((key ^ SIGN) >> shift) & MASK)
