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
