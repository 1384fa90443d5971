"""The (token, slot) pairs of a call as kernels read them: which local expert each goes to.

One load of an id, and one of the expert map where there is one. Roofline: these loads' latency. Limits: at most 1024
experts; ids outside the experts, or that the map sends away, are -1.
"""

from dataclasses import dataclass

import cutlass
from cutlass import Int32, cute

from ownpath.kernels.nvfp4.config import AlignConfig
from ownpath.kernels.nvfp4.schedule import element


@dataclass(frozen=True)
class Pairs:
    """The (token, slot) pairs of one call: ``slots`` to a token, the last of which are the shared experts'.

    num_ids: number of expert ids; num_experts: local experts, shared ones included and last. tile_rows: most rows of a
    tile. index_offset: offset of the schedule's index.
    """

    cfg: AlignConfig
    ids: cute.Pointer
    expert_map: cute.Pointer
    top_k: Int32
    num_ids: Int32
    num_experts: Int32
    slots: Int32
    total: Int32
    tile_rows: Int32
    index_offset: Int32

    def num_tiles(self, count: Int32) -> Int32:
        """Returns the number of tiles of an expert with ``count`` rows."""
        return (count + self.tile_rows - 1) // self.tile_rows

    @cute.jit
    def expert(self, idx: Int32) -> Int32:
        """Returns the local expert of a pair, or -1."""
        expert = Int32(-1)
        if cutlass.const_expr(self.cfg.num_shared == 0):
            expert = self.routed(idx)
        else:
            slot = idx % self.slots
            if slot < self.top_k:
                expert = self.routed(idx // self.slots * self.top_k + slot)
            else:
                expert = self.num_experts - self.cfg.num_shared + slot - self.top_k
        return expert

    @cute.jit
    def routed(self, idx: Int32) -> Int32:
        """Returns the local expert of an id, or -1."""
        expert = Int32(-1)
        named = Int32(element(self.ids, idx)[0])
        if named >= 0 and named < self.num_ids:
            expert = named
            if cutlass.const_expr(self.cfg.mapped):
                expert = element(self.expert_map, named)[0]
        return expert


@cute.jit
def warp_sum(value: Int32, lane: Int32) -> Int32:
    """Sums ``value`` over the lanes up to this one."""
    running = value
    for power in cutlass.range_constexpr(5):
        other = cute.arch.shuffle_sync_up(running, offset=1 << power, mask_and_clamp=0)
        if lane >= 1 << power:
            running += other
    return running


@cute.jit
def count_below(mask: Int32, lane: Int32) -> Int32:
    """Returns the number of set bits below this lane's."""
    return Int32(cute.arch.popc(mask & ((Int32(1) << lane) - 1)))


def lowest_bit(mask: Int32) -> Int32:
    """Returns the place of the lowest set bit."""
    return Int32(cute.arch.popc((mask & -mask) - 1))


@cute.jit
def lanes_with(value: Int32, mine: Int32) -> Int32:
    """Returns the lanes whose ``value`` equals this lane's ``mine``, a bit each."""
    found = Int32(0)
    for lane in cutlass.range_constexpr(32):
        bit = Int32((1 << lane) - (1 << 32 if lane == 31 else 0))
        found = found | (bit if cute.arch.shuffle_sync(value, lane) == mine else Int32(0))
    return found


@cute.jit
def named(pairs: Pairs, idx: Int32) -> Int32:
    """Returns a pair's expert, or -1, also beyond the last pair."""
    expert = Int32(-1)
    if idx < pairs.total:
        expert = pairs.expert(idx)
    return expert


@dataclass(frozen=True)
class PairRanks:
    """A lane's pair of each half: its expert, the pairs of the same expert (masks of both halves), those before it."""

    experts: list[Int32]
    masks: list[tuple[Int32, Int32]]
    earlier: list[Int32]


def rank_pairs(pairs: Pairs, halves: int, lane: Int32) -> PairRanks:
    """Compares up to 32 pairs (``halves`` is 1), or 64, with each other. One warp: a lane has one of each half."""
    experts = [named(pairs, lane + 32 * half) for half in range(halves)]
    own = [Int32(cute.arch.match_sync(0xFFFFFFFF, expert)) for expert in experts]
    if halves == 1:
        return PairRanks(experts, [(own[0], Int32(0))], [count_below(own[0], lane)])
    later, former = lanes_with(experts[1], experts[0]), lanes_with(experts[0], experts[1])
    ahead = Int32(cute.arch.popc(former)) + count_below(own[1], lane)
    return PairRanks(experts, [(own[0], later), (former, own[1])], [count_below(own[0], lane), ahead])
