"""Gluon function of attention over chunks on Hopper: programs that take rows in turn, 64 of a row's heads at a time.

Written in Gluon, Triton's form with explicit layouts and warps of three kinds. Four warps bring keys, a tile of 64 at a
time, to two buffers (``producer``). Four make weights of them: a tile's scores are one instruction's 64 by 64, which
reads its operands from shared memory no slower than it multiplies. Eight sum over values, 256 channels a warpgroup.
So a tile's scores and softmax run beside the sums of the tile before, and a row's queries beside the end of the row
before.

Tiles come and go in halves of the channels: as soon as one half is summed, the bringing warps replace it, and scores
begin with the half that is there first. Barriers in shared memory tell each kind that half a tile, the queries or the
weights are there, or may be replaced. Queries and results are ``halves``.

Without a running maximum. A query's norm is sqrt(H), and of keys the operand knows a bound: where no score is beyond
+-SAFE, in powers of two, weights are 2^score without a maximum that is taken away first. They have float32's
exponents, and BF16's, which are the same, so that nothing overflows or vanishes, and their ratios are those of the
definition. Elsewhere each tile's sums are multiplied by what the maximum has grown.

Legend: N heads at a time, K keys of a tile, H channels, R rotary channels, F pairs of them.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ownpath.kernels.chunks.halves import HALF_SUMS, HEADS, copy_halves, norm_halves, store_halves
from ownpath.kernels.chunks.producer import (
    BUFFERS,
    HALF,
    PLACES,
    PRODUCERS,
    TILE,
    copy_keys,
    copy_near,
    decode_keys,
    next_buffer,
    row_facts,
    row_sizes,
)
from ownpath.kernels.chunks.queries import ANGLES, LOG2E, SHARED, F, N, fetch_queries, fill_angles

SCORES = tl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
ROW_OF_SUMS = tl.constexpr(gl.SliceLayout(1, HALF_SUMS.value))
FACTORS = tl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
PART = tl.constexpr(32)
"""Keys whose weights are passed on together."""
PARTS = tl.constexpr(gl.NVMMASharedLayout(64, 16, 2))
SCORERS = tl.constexpr(4)
"""Warps that make weights."""


@gluon.jit
def _left(i, sizes):
    """Returns how many keys tile i has, or more than a tile has room for."""
    _, num_near, near_tiles, num_entries, _ = sizes
    return gl.where(i < near_tiles, num_near - i * TILE, num_entries - (i - near_tiles) * TILE)


@gluon.jit
def _wait_for(barriers, turn, phase):
    mbarrier.wait(barriers.index(turn), phase)
    fence_async_shared()


@gluon.jit
def _parts(scores):
    """Returns the two halves of a tile's keys."""
    return gl.split(gl.permute(gl.reshape(scores, (N, 2, PART)), (0, 2, 1)))


@gluon.jit
def _add_up(weights):
    """Adds weights [N, PART] that a thread holds of a row: [N, 8]."""
    return gl.sum(gl.reshape(weights, (N, PART // 8, 8)), axis=1)


@gluon.jit
def _score(
    low, high, full, q_low, q_high, q_full, q_empty, p_shared, p_full, factors, keeps, angles, sink_ptr,
    positions_ptr, places_ptr, requests_ptr, blocks_ptr, selected_ptr, num_selected_ptr,
    num_blocks, num_listed, most_entries, num_heads, num_parts, score_scale, eps,
    RATIO: tl.constexpr, STEPWISE: tl.constexpr, BOUNDED: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Makes weights: of each row that is this program's, its queries, its tiles' scores and what they add up to.

    Those who sum have a fence of their own between weights and products. A second one here costs FP8 pages 3%, and BF16
    was no faster without it.
    """
    bits = (num_heads - 1) // N
    turn, phase, q_phase = 0, 0, 0
    facts = row_facts(gl.program_id(0) >> bits, positions_ptr, places_ptr, requests_ptr, num_selected_ptr, RATIO)
    key = gl.arange(0, TILE, gl.SliceLayout(0, SCORES))
    for number in range(gl.program_id(0), num_parts, gl.num_programs(0)):
        t, first_head = number >> bits, (number & bits) * N
        sizes = row_sizes(t, facts, blocks_ptr, selected_ptr, num_blocks, num_listed, most_entries, RATIO)
        later = gl.minimum(number + gl.num_programs(0), num_parts - 1) >> bits
        facts = row_facts(later, positions_ptr, places_ptr, requests_ptr, num_selected_ptr, RATIO)
        norm_halves(
            q_low.index(0),
            q_high.index(0),
            q_full,
            q_phase,
            angles.index(2 * q_phase),
            angles.index(2 * q_phase + 1),
            eps,
            STEPWISE,
        )
        fence_async_shared()
        gl.thread_barrier()
        largest = gl.full([N], 0.0 if BOUNDED else float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
        sums = _add_up(_parts(gl.zeros([N, TILE], gl.float32, SCORES))[0])
        head = first_head + gl.arange(0, N, gl.SliceLayout(1, SCORES))
        sink = gl.load(sink_ptr + head, mask=head < num_heads, other=0.0) * LOG2E
        num_tiles = sizes[2] + (sizes[3] + TILE - 1) // TILE
        for i in range(num_tiles):
            is_last = i == num_tiles - 1
            scores = gl.zeros([N, TILE], gl.float32, SCORES)
            # The addresses of queries are not kept over the loop over tiles, for which there are no registers.
            only = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [i * 0], dtype=gl.int32, is_pure=False, pack=1)
            _wait_for(full, 2 * turn, phase)
            scores = warpgroup_mma(
                q_low.index(only), low.index(turn).permute((1, 0)), scores, use_acc=False, is_async=True
            )
            _wait_for(full, 2 * turn + 1, phase)
            scores = warpgroup_mma(q_high.index(only), high.index(turn).permute((1, 0)), scores, is_async=True)
            scores = warpgroup_mma_wait(0, deps=(scores,))
            if is_last:
                gl.thread_barrier()
                mbarrier.arrive(q_empty, count=1)
            scores = scores * score_scale
            left = _left(i, sizes)
            if left < TILE:
                scores = gl.where((key < left)[None, :], scores, float("-inf"))
            if not BOUNDED:
                higher = gl.maximum(largest, gl.max(scores, axis=1))
                keep = gl.exp2(largest - higher)
                keeps.index(turn).store(keep)
                sums = sums * gl.convert_layout(keep, gl.SliceLayout(1, sums.type.layout))[:, None]
                scores = scores - higher[:, None]
                largest = higher
            # The tile's keys are there, so those two tiles before were done with, and so were their weights.
            first, second = _parts(scores)
            weights = gl.exp2(first)
            p_shared.index(2 * turn).store(weights.to(gl.bfloat16))
            if not FP8:
                fence_async_shared()
            gl.thread_barrier()
            mbarrier.arrive(p_full.index(2 * turn), count=1)
            sums += _add_up(weights)
            weights = gl.exp2(second)
            sums += _add_up(weights)
            p_shared.index(2 * turn + 1).store(weights.to(gl.bfloat16))
            if is_last:
                total = gl.convert_layout(gl.sum(sums, axis=1), gl.SliceLayout(1, SCORES))
                factors.index(turn).store(1.0 / (total + gl.exp2(sink - largest)))
            if not FP8:
                fence_async_shared()
            gl.thread_barrier()
            mbarrier.arrive(p_full.index(2 * turn + 1), count=1)
            turn, phase = next_buffer(turn, phase)
        q_phase ^= 1


@gluon.jit
def _sum(
    low, high, full, empty, p_shared, p_full, factors, keeps, cos_ptr, sin_ptr, out_ptr,
    positions_ptr, places_ptr, requests_ptr, blocks_ptr, selected_ptr, num_selected_ptr,
    num_blocks, num_listed, most_entries, num_heads, num_parts, RATIO: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Sums over values: of each row that is this program's, its tiles and its result."""
    bits = (num_heads - 1) // N
    turn, phase = 0, 0
    for number in range(gl.program_id(0), num_parts, gl.num_programs(0)):
        t, first_head = number >> bits, (number & bits) * N
        # Not asked for a row ahead: Triton 3.6 takes facts carried by this loop for the first row's.
        facts = row_facts(t, positions_ptr, places_ptr, requests_ptr, num_selected_ptr, RATIO)
        sizes = row_sizes(t, facts, blocks_ptr, selected_ptr, num_blocks, num_listed, most_entries, RATIO)
        o_low = gl.zeros([N, HALF], gl.float32, HALF_SUMS)
        o_high = gl.zeros([N, HALF], gl.float32, HALF_SUMS)
        factor = gl.zeros([N], gl.float32, ROW_OF_SUMS)
        for _ in range(sizes[2] + (sizes[3] + TILE - 1) // TILE):
            mbarrier.wait(full.index(2 * turn), phase)
            mbarrier.wait(full.index(2 * turn + 1), phase)
            _wait_for(p_full, 2 * turn, phase)
            if not BOUNDED:
                keep = keeps.index(turn).load(ROW_OF_SUMS)[:, None]
                o_low, o_high = o_low * keep, o_high * keep
            p, of_low, of_high = p_shared.index(2 * turn), low.index(turn), high.index(turn)
            o_low = warpgroup_mma(p, of_low.slice(0, PART), o_low, is_async=True)
            o_high = warpgroup_mma(p, of_high.slice(0, PART), o_high, is_async=True)
            _wait_for(p_full, 2 * turn + 1, phase)
            # Of use behind the last tile, whose room is given away only then, as of the tile's weights.
            factor = factors.index(turn).load(ROW_OF_SUMS)
            p = p_shared.index(2 * turn + 1)
            o_low = warpgroup_mma(p, of_low.slice(PART, PART), o_low, is_async=True)
            o_high = warpgroup_mma(p, of_high.slice(PART, PART), o_high, is_async=True)
            o_low, o_high = warpgroup_mma_wait(1, deps=(o_low, o_high))
            gl.thread_barrier()
            mbarrier.arrive(empty.index(2 * turn), count=1)
            o_low, o_high = warpgroup_mma_wait(0, deps=(o_low, o_high))
            gl.thread_barrier()
            mbarrier.arrive(empty.index(2 * turn + 1), count=1)
            turn, phase = next_buffer(turn, phase)
        factor = factor[:, None]
        store_halves(
            o_low * factor, o_high * factor, cos_ptr + t * F, sin_ptr + t * F, t, first_head, num_heads, out_ptr
        )


@gluon.jit
def _produce(
    low, high, full, empty, places, q_low, q_high, q_full, q_empty, angles,
    q_ptr, cos_ptr, sin_ptr, near_ptr, entries_ptr,
    positions_ptr, places_ptr, requests_ptr, blocks_ptr, selected_ptr, num_selected_ptr,
    num_blocks, num_listed, most_entries, row_stride, head_stride, num_heads, num_parts,
    RATIO: tl.constexpr, BLOCK_BITS: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Brings the first keys, the queries and the other keys of each row that is this program's."""
    bits = (num_heads - 1) // N
    turn, phase, q_phase = 0, 1, 0
    facts = row_facts(gl.program_id(0) >> bits, positions_ptr, places_ptr, requests_ptr, num_selected_ptr, RATIO)
    for number in range(gl.program_id(0), num_parts, gl.num_programs(0)):
        t, first_head = number >> bits, (number & bits) * N
        sizes = row_sizes(t, facts, blocks_ptr, selected_ptr, num_blocks, num_listed, most_entries, RATIO)
        later = number + gl.num_programs(0)
        later_t = gl.minimum(later, num_parts - 1) >> bits
        facts = row_facts(later_t, positions_ptr, places_ptr, requests_ptr, num_selected_ptr, RATIO)
        turn, phase = copy_near(0, sizes, near_ptr, low, high, full, empty, turn, phase, FP8)
        q_row = q_ptr + t.to(gl.int64) * row_stride + first_head * head_stride
        cos_row, sin_row = cos_ptr + t * F, sin_ptr + t * F
        # fmt: off
        copy_halves(
            q_row, head_stride, num_heads - first_head, cos_row, sin_row,
            q_low.index(0), q_high.index(0), q_full, q_empty, angles, q_phase,
        )
        # fmt: on
        q_phase ^= 1
        if later < num_parts:
            later_head = (later & bits) * N
            later_row = q_ptr + later_t.to(gl.int64) * row_stride + later_head * head_stride
            fetch_queries(later_row, head_stride, num_heads - later_head)
        if FP8:
            turn, phase = decode_keys(
                sizes, near_ptr, entries_ptr, low, high, full, empty, places, turn, phase, RATIO, BLOCK_BITS
            )
        else:
            turn, phase = copy_keys(
                sizes, near_ptr, entries_ptr, low, high, full, empty, places, turn, phase, RATIO, BLOCK_BITS
            )


@gluon.jit(do_not_specialize=["num_blocks", "num_listed", "most_entries", "num_heads", "num_parts"])
def attend_chunk_hopper_kernel(
    q_ptr,
    cos_ptr,
    sin_ptr,
    near_ptr,
    entries_ptr,
    positions_ptr,
    places_ptr,
    requests_ptr,
    blocks_ptr,
    selected_ptr,
    num_selected_ptr,
    sink_ptr,
    out_ptr,
    row_stride,
    head_stride,
    num_blocks,
    num_listed,
    most_entries,
    num_heads,
    num_parts,
    score_scale,
    eps,
    RATIO: tl.constexpr,
    BLOCK_BITS: tl.constexpr,
    STEPWISE: tl.constexpr,
    BOUNDED: tl.constexpr,
    REGISTERS: tl.constexpr,
    FP8: tl.constexpr,
    SCORE_REGISTERS: tl.constexpr,
):
    """Attends with 64 heads of rows: each to its window in ``near``, in the order of positions, then to its entries.

    num_parts: rows times blocks of 64 heads, which programs take in turn. score_scale: softmax scale times log2(e).
    BLOCK_BITS: log2 of a page's entries. most_entries: that lists or tables have room for. BOUNDED: no score is beyond
    +-SAFE. REGISTERS, SCORE_REGISTERS: of a thread that brings keys, that makes weights.
    """
    low = gl.allocate_shared_memory(gl.bfloat16, [BUFFERS, TILE, HALF], SHARED)
    high = gl.allocate_shared_memory(gl.bfloat16, [BUFFERS, TILE, HALF], SHARED)
    q_low = gl.allocate_shared_memory(gl.bfloat16, [1, N, HALF], SHARED)
    q_high = gl.allocate_shared_memory(gl.bfloat16, [1, N, HALF], SHARED)
    p_shared = gl.allocate_shared_memory(gl.bfloat16, [2 * BUFFERS, N, PART], PARTS)
    angles = gl.allocate_shared_memory(gl.float32, [4, 2, F], ANGLES)
    places = gl.allocate_shared_memory(gl.int32, [BUFFERS, TILE], PLACES)
    factors = gl.allocate_shared_memory(gl.float32, [BUFFERS, N], FACTORS)
    keeps = gl.allocate_shared_memory(gl.float32, [BUFFERS, N], FACTORS)
    p_full = gl.allocate_shared_memory(gl.int64, [2 * BUFFERS, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [2 * BUFFERS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2 * BUFFERS, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [N // HEADS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(N // HEADS):
        mbarrier.init(q_full.index(i), count=32 * PRODUCERS + (1 if i == N // HEADS - 1 else 0))
    mbarrier.init(q_empty, count=1)
    fill_angles(angles)
    for i in gl.static_range(2 * BUFFERS):
        # Every thread's copies, and once more for codes that went through registers.
        mbarrier.init(full.index(i), count=32 * PRODUCERS + (1 if FP8 else 0))
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(2 * BUFFERS):
        mbarrier.init(p_full.index(i), count=1)
    # fmt: off
    gl.warp_specialize(
        [
            (_sum, (
                low, high, full, empty, p_shared, p_full, factors, keeps, cos_ptr, sin_ptr, out_ptr,
                positions_ptr, places_ptr, requests_ptr, blocks_ptr, selected_ptr, num_selected_ptr,
                num_blocks, num_listed, most_entries, num_heads, num_parts, RATIO, BOUNDED,
            )),
            (_score, (
                low, high, full, q_low, q_high, q_full, q_empty, p_shared, p_full, factors, keeps, angles, sink_ptr,
                positions_ptr, places_ptr, requests_ptr, blocks_ptr, selected_ptr, num_selected_ptr,
                num_blocks, num_listed, most_entries, num_heads, num_parts, score_scale, eps,
                RATIO, STEPWISE, BOUNDED, FP8,
            )),
            (_produce, (
                low, high, full, empty, places, q_low, q_high, q_full, q_empty, angles,
                q_ptr, cos_ptr, sin_ptr, near_ptr, entries_ptr,
                positions_ptr, places_ptr, requests_ptr, blocks_ptr, selected_ptr, num_selected_ptr,
                num_blocks, num_listed, most_entries, row_stride, head_stride, num_heads, num_parts,
                RATIO, BLOCK_BITS, FP8,
            )),
        ],
        [SCORERS, PRODUCERS],
        [SCORE_REGISTERS, REGISTERS],
    )
    # fmt: on
