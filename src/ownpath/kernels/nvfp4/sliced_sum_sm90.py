"""Sums what the slices of ``sliced_sm90`` add to each pair's output, and the pairs of each token, by their weights.

How it works. A CTA takes 32 columns of a token: each of 32 groups of eight lanes adds every 32nd of the token's slices,
the sums of a warp's groups meet by shuffles and those of the warps in shared memory, in the same order every time.
Roofline: the bytes of the sums, which are in L2. Limits: hidden a multiple of 32.
"""

from typing import Any

import cutlass
from cutlass import BFloat16, Float32, Int32, Int64, cute

from ownpath.kernels.dsl import ptx
from ownpath.kernels.nvfp4.pairs_sm90 import Pairs
from ownpath.kernels.nvfp4.schedule import Schedule, element
from ownpath.kernels.nvfp4.sliced_config import SUM_COLUMNS, SUM_THREADS, WARP, SlicedSumConfig

LANES = SUM_COLUMNS // 4
GROUPS = SUM_THREADS // LANES
WARPS = SUM_THREADS // WARP


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
        schedule: cute.Pointer,
        weights: cute.Pointer,
        out: cute.Pointer,
        num_tokens: Int32,
        top_k: Int32,
        num_ids: Int32,
        num_experts: Int32,
        num_slices: Int32,
        hidden: Int32,
        grid: Int32,
    ) -> None:
        """Host side, used to compile only."""
        counts = (num_tokens, top_k, num_ids, num_experts, num_slices, hidden)
        self.kernel(sums, ids, expert_map, schedule, weights, out, *counts).launch(
            grid=[grid, 1, 1], block=[SUM_THREADS, 1, 1]
        )

    @cute.kernel
    def kernel(
        self,
        sums: cute.Pointer,
        ids: cute.Pointer,
        expert_map: cute.Pointer,
        schedule: cute.Pointer,
        weights: cute.Pointer,
        out: cute.Pointer,
        num_tokens: Int32,
        top_k: Int32,
        num_ids: Int32,
        num_experts: Int32,
        num_slices: Int32,
        hidden: Int32,
    ) -> None:
        """Sums 32 columns of a token. Grid: num_tokens * hidden / 32."""
        thread, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        slots = top_k + self.cfg.num_shared
        pairs = Pairs(
            self.cfg.routing, ids, expert_map, top_k, num_ids, num_experts, slots, num_tokens * slots, Int32(1),
            Int32(0),
        )  # fmt: skip
        token, column = cta // (hidden // SUM_COLUMNS), cta % (hidden // SUM_COLUMNS) * SUM_COLUMNS
        total = cute.make_rmem_tensor(cute.make_layout(4), Float32)
        total.fill(0.0)
        start = sums.toint() + Int64(column + thread % LANES * 4) * 4
        for row in cutlass.range(thread // LANES, slots * num_slices, GROUPS, unroll=6):
            slot = row // num_slices
            pair = token * slots + slot
            if cutlass.const_expr(self.cfg.scheduled):
                place = element(Schedule(schedule).sorted_rows(num_tokens, slots), pair)[0]
                known = place
            else:
                place = pair
                known = pairs.expert(pair)
            # Loads without a branch, so that several are in flight.
            first = (Int64(cutlass.max(place, 0)) * num_slices + row % num_slices) * hidden
            words = ptx.load_global_vec4(start + first * 4)
            weight = Float32(1.0)
            if slot < top_k:
                weight = element(weights, token * top_k + slot)[0]
            for idx in cutlass.range_constexpr(4):
                # Nobody writes the outputs of a pair without an expert.
                term = weight * ptx.as_float(words[idx])
                total[idx] = total[idx] + (term if known >= 0 else Float32(0.0))
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
    routing = (ids, pointer(Int32, 4), pointer(Int32, 16), pointer(Float32, 4))
    pointers = (pointer(Float32, 16), *routing, pointer(BFloat16, 16))
    return cute.compile(SlicedSum(config), *pointers, *[Int32(1)] * 7)
