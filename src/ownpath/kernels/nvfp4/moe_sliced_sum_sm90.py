"""Sums what the slices of ``moe_sliced_sm90`` add to each pair's output, and the pairs of each token, by their weights.

How it works. A CTA takes 32 columns of a token: each of 32 groups of eight lanes takes every 32nd slice and adds the
token's pairs, the sums of a warp's groups meet by shuffles and those of the warps in shared memory, in the same order
every time. Loads of six pairs have no branch between them, so that they are in flight together, and the routing is read
before the wait. Roofline: the bytes of the sums, which are in L2. Limits: hidden a multiple of 32.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
from cutlass import BFloat16, Float32, Int32, Int64, Uint32, cute

from ownpath.kernels.dsl import ptx
from ownpath.kernels.nvfp4.config import AlignConfig
from ownpath.kernels.nvfp4.moe_sliced_config import SUM_COLUMNS, SUM_THREADS, WARP, WIDTH, SlicedSumConfig
from ownpath.kernels.nvfp4.schedule import element

LANES = SUM_COLUMNS // 4
GROUPS = SUM_THREADS // LANES
WARPS = SUM_THREADS // WARP
SLOTS_AT_ONCE = 6


@dataclass(frozen=True)
class RoutedSlots:
    """The routing of a token, whose first pair of an id and a weight is ``first``."""

    cfg: AlignConfig
    ids: cute.Pointer
    expert_map: cute.Pointer
    weights: cute.Pointer
    first: Int32
    top_k: Int32
    num_ids: Int32

    def read(self, begin: Int32, factors: cute.Tensor, known: cute.Tensor) -> None:
        """Reads the weights of six slots from ``begin``; ``known`` is negative where a slot has no expert here."""
        for idx in range(SLOTS_AT_ONCE):
            factors[idx], known[idx] = self.slot(begin + idx)

    @cute.jit
    def slot(self, slot: Int32) -> tuple[Float32, Int32]:
        """Returns a slot's weight, and whether it has an expert. No branches: loads of several slots are in flight."""
        pair = self.first + cutlass.min(slot, self.top_k - 1)
        named = Int32(element(self.ids, pair)[0])
        # Unsigned, a negative id is a large one.
        routed = Int32(0) if Uint32(named) < Uint32(self.num_ids) else Int32(-1)
        if cutlass.const_expr(self.cfg.mapped):
            routed = routed | element(self.expert_map, cutlass.min(cutlass.max(named, 0), self.num_ids - 1))[0]
        weight = element(self.weights, pair)[0]
        shared = Int32(0) if slot < self.top_k + self.cfg.num_shared else Int32(-1)
        return (weight if slot < self.top_k else Float32(1.0)), (routed if slot < self.top_k else shared)


class SlicedSum:
    """y[t] = sum over slots k of weight[t, k] * sum over slices of their outputs; shared slots have weight 1."""

    def __init__(self, config: SlicedSumConfig) -> None:
        self.cfg = config

    @cute.jit
    def __call__(
        self,
        sums: cute.Pointer,
        ids: cute.Pointer,
        expert_map: cute.Pointer,
        weights: cute.Pointer,
        out: cute.Pointer,
        num_tokens: Int32,
        top_k: Int32,
        num_ids: Int32,
        hidden: Int32,
        inter: Int32,
        grid: Int32,
    ) -> None:
        """Host side, used to compile only."""
        counts = (num_tokens, top_k, num_ids, hidden, inter)
        self.kernel(sums, ids, expert_map, weights, out, *counts).launch(
            grid=[grid, 1, 1], block=[SUM_THREADS, 1, 1], min_blocks_per_mp=4, preferred_smem_carveout=100
        )

    @cute.kernel
    def kernel(
        self,
        sums: cute.Pointer,
        ids: cute.Pointer,
        expert_map: cute.Pointer,
        weights: cute.Pointer,
        out: cute.Pointer,
        num_tokens: Int32,
        top_k: Int32,
        num_ids: Int32,
        hidden: Int32,
        inter: Int32,
    ) -> None:
        """Sums 32 columns of a token. Grid: num_tokens * hidden / 32."""
        thread, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        slots, num_slices = top_k + self.cfg.num_shared, inter // WIDTH
        token, column = cta // (hidden // SUM_COLUMNS), cta % (hidden // SUM_COLUMNS) * SUM_COLUMNS
        total = cute.make_rmem_tensor(cute.make_layout(4), Float32)
        total.fill(0.0)
        factors = cute.make_rmem_tensor(cute.make_layout(SLOTS_AT_ONCE), Float32)
        known = cute.make_rmem_tensor(cute.make_layout(SLOTS_AT_ONCE), Int32)
        routing = RoutedSlots(self.cfg.routing, ids, expert_map, weights, token * top_k, top_k, num_ids)
        # Whatever wrote the routing was over before the predecessor let this kernel start.
        routing.read(Int32(0), factors, known)
        start = sums.toint() + (Int64(token) * slots * num_slices * hidden + column + thread % LANES * 4) * 4
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        for begin in cutlass.range(0, slots, SLOTS_AT_ONCE, unroll=1):
            if begin > 0:
                routing.read(begin, factors, known)
            for piece in cutlass.range(thread // LANES, num_slices, GROUPS, unroll=1):
                words = []
                for idx in cutlass.range_constexpr(SLOTS_AT_ONCE):
                    row = cutlass.min(begin + idx, slots - 1) * num_slices + piece
                    words.append(ptx.load_global_vec4(start + Int64(row) * hidden * 4))
                for idx in cutlass.range_constexpr(SLOTS_AT_ONCE):
                    for at in cutlass.range_constexpr(4):
                        # Nobody writes the outputs of a pair without an expert.
                        term = factors[idx] * ptx.as_float(words[idx][at])
                        total[at] = total[at] + (term if known[idx] >= 0 else Float32(0.0))
        self.finish(total, out, Int64(token) * hidden + column, thread)

    @cute.jit
    def finish(self, total: cute.Tensor, out: cute.Pointer, first: Int64, thread: Int32) -> None:
        """Adds the groups' sums and stores them. first: element of the CTA's first column."""
        memory = cute.arch.alloc_smem(Float32, WARPS * SUM_COLUMNS, 16)
        for idx in cutlass.range_constexpr(4):
            for distance in (LANES, 2 * LANES):
                total[idx] = total[idx] + cute.arch.shuffle_sync_bfly(total[idx], offset=distance)
        if thread % WARP < LANES:
            place = memory.toint() + thread // WARP * (SUM_COLUMNS * 4) + thread % WARP * 16
            ptx.store_shared_vec4(place, tuple(total[idx] for idx in range(4)))
        cute.arch.sync_threads()
        if thread < SUM_COLUMNS // 2:
            low, high = Float32(0.0), Float32(0.0)
            for warp in cutlass.range_constexpr(WARPS):
                low = low + element(memory, warp * SUM_COLUMNS + 2 * thread)[0]
                high = high + element(memory, warp * SUM_COLUMNS + 2 * thread + 1)[0]
            ptx.store_global(out.toint() + (first + 2 * thread) * 2, ptx.pack_bf16x2(low, high))


def compile_sliced_sum(config: SlicedSumConfig) -> Any:
    """Compiles for sm_90a; no GPU is needed."""

    def pointer(dtype: Any, align: int) -> Any:
        return cute.runtime.make_ptr(dtype, 1024, cute.AddressSpace.gmem, assumed_align=align)

    ids = pointer(Int64 if config.wide_ids else Int32, 4)
    pointers = (pointer(Float32, 16), ids, pointer(Int32, 4), pointer(Float32, 4), pointer(BFloat16, 16))
    return cute.compile(SlicedSum(config), *pointers, *[Int32(1)] * 6)
