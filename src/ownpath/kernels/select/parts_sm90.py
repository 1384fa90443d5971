"""Parts that Hopper's selection shares: places in shared memory, a thread's share of a row, sums over a CTA."""

from dataclasses import dataclass

import cutlass
from cutlass import Int32, cute

from ownpath.kernels.dsl.ptx import cluster_barrier
from ownpath.kernels.select import ptx
from ownpath.kernels.select.config_sm90 import MAX_CANDIDATES, MAX_CLUSTER, NUM_BINS

ABSENT, LARGEST = -(2**31), 2**31 - 1
BEST_INFINITE, LEAST_INFINITE = 0x7F800000, -0x7F800000 - 1
SIGN = -(2**31)
# Places in shared memory, in bytes.
BINS = 0
BEST = BINS + 2 * 4 * NUM_BINS
LEAST, BOUND, COUNT, THRESHOLD, ROOM = (BEST + 4 * idx for idx in range(1, 6))
FOUND = BEST + 32
FOUND_OF_RANK = FOUND + 16
WARP_SUMS = FOUND_OF_RANK + 4 * MAX_CLUSTER
OWN_CANDIDATES = WARP_SUMS + 2 * 4 * 32
CANDIDATES = OWN_CANDIDATES + 4 * MAX_CANDIDATES
BLOCKS = CANDIDATES + 4 * MAX_CANDIDATES


@dataclass(frozen=True)
class RowShare:
    """A thread's part of a row. base: of shared memory. rank: of the CTA among ``peers``. chunk, chunks: its warp's
    first one, and how many. first: the CTA's first. visible: entries of the row."""

    base: Int32
    thread: Int32
    warp: Int32
    lane: Int32
    rank: Int32
    peers: Int32
    chunk: Int32
    chunks: Int32
    first: Int32
    visible: Int32


@dataclass(frozen=True)
class SelectCut:
    """The end of the selection. threshold: the k-th best. room: how many of its equals are selected. lower, equals: of
    the CTAs before: scores above it, and equal to it."""

    threshold: Int32
    room: Int32
    lower: Int32
    equals: Int32


@cute.jit
def barrier(cluster: int, share: RowShare) -> None:
    """Waits for all CTAs of the row, of the kernel's ``cluster``; what they wrote is then visible."""
    if cutlass.const_expr(cluster > 1):
        if share.peers > 1:
            cluster_barrier()
        else:
            cute.arch.sync_threads()
    else:
        cute.arch.sync_threads()


@cute.jit
def sum_warps(which: int, share: RowShare) -> Int32:
    """Adds what the warps before this one have left."""
    sums = Int32(0)
    if share.lane < share.warp:
        sums = ptx.load_shared(share.base + WARP_SUMS + 128 * which + share.lane * 4)
    return ptx.sum_warp(sums)


@cute.jit
def sum_before(first: Int32, second: Int32, share: RowShare) -> tuple[Int32, Int32]:
    """Returns the sums of two integers over the threads before this one."""
    sums = []
    for at, own in enumerate((first, second)):
        total = own
        for bit in cutlass.range_constexpr(5):
            total = ptx.add_lower_lane(total, 1 << bit)
        if share.lane == 31:
            ptx.store_shared(share.base + WARP_SUMS + 128 * at + share.warp * 4, total)
        sums.append(total - own)
    cute.arch.sync_threads()
    return sums[0] + sum_warps(0, share), sums[1] + sum_warps(1, share)


def bit_of(idx: int) -> int:
    """Returns a word with one bit, as a signed integer."""
    return SIGN if idx == 31 else 1 << idx
