"""Gluon function of attention over chunks on Hopper where a row has its window alone, 64 of its heads at a time.

Neighbouring rows' windows have 127 of 128 keys in common. A program takes rows that follow each other and keeps the
window's keys in shared memory, the key of position p at place p mod 128: from row to row one of them is replaced. So a
row costs its queries and its result. Where a row does not continue the one before, all keys are brought. The order of
a row's sums depends on its position alone.

Both halves of the window are there at once, so the second product of scores runs while the first half's weights are
made, and its weights are made while the first half is summed over values. Warps of two kinds, softmax without a maximum
and layouts are those of ``hopper``.

Legend: N heads at a time, H channels, F pairs of rotary channels.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ownpath.kernels.chunks.producer import BUFFERS, PRODUCERS, TILE, WINDOW, copy_rows
from ownpath.kernels.chunks.queries import (
    ANGLES,
    SCORES,
    SHARED,
    SUMS,
    F,
    H,
    N,
    copy_queries,
    fetch_queries,
    fill_angles,
    load_sink,
    norm_queries,
    start_scores,
    store_row,
)

GROUP = tl.constexpr(8)
"""Keys that are brought again with one that is replaced."""


@gluon.jit
def _own_parts(num_parts):
    """Returns the first of this program's parts, and the one behind its last."""
    programs = gl.num_programs(0)
    return gl.program_id(0) * num_parts // programs, (gl.program_id(0) + 1) * num_parts // programs


@gluon.jit
def _scaled(scores, number: tl.constexpr, position, score_scale):
    """Returns the scores of half ``number`` of the window, -inf where a place has no key yet."""
    place = number * TILE + gl.arange(0, TILE, gl.SliceLayout(0, SCORES))
    there = ((position - place) & (WINDOW - 1)) <= position
    return gl.where(there[None, :], scores * score_scale, float("-inf"))


@gluon.jit
def _multiply(position, keys, q_shared, q_empty, p_shared, score_scale, BOUNDED: tl.constexpr):
    """Attends to the window: returns the sums over values [N, H], still under way, those of weights [N], and the maximum
    [N] that was taken away (0 where scores are bounded)."""
    first, second = start_scores(q_shared, keys.index(0)), start_scores(q_shared, keys.index(1))
    largest = gl.zeros([N], gl.float32, gl.SliceLayout(1, SCORES))
    if BOUNDED:
        first = warpgroup_mma_wait(1, deps=(first,))
        first = gl.exp2(_scaled(first, 0, position, score_scale))
    else:
        first, second = warpgroup_mma_wait(0, deps=(first, second))
        first, second = _scaled(first, 0, position, score_scale), _scaled(second, 1, position, score_scale)
        largest = gl.max(gl.maximum(first, second), axis=1)
        first, second = gl.exp2(first - largest[:, None]), gl.exp2(second - largest[:, None])
    p_shared.index(0).store(first.to(gl.bfloat16))
    fence_async_shared()
    gl.thread_barrier()
    o = gl.zeros([N, H], gl.float32, SUMS)
    o = warpgroup_mma(p_shared.index(0), keys.index(0), o, use_acc=False, is_async=True)
    if BOUNDED:
        second = warpgroup_mma_wait(1, deps=(second,))
        second = gl.exp2(_scaled(second, 1, position, score_scale))
    p_shared.index(1).store(second.to(gl.bfloat16))
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.arrive(q_empty, count=1)
    o = warpgroup_mma(p_shared.index(1), keys.index(1), o, is_async=True)
    return o, gl.sum(first + second, axis=1), largest


@gluon.jit
def _consume(
    keys, full, empty, q_shared, q_full, q_empty, p_shared, angles, sink_ptr, out_ptr, positions_ptr,
    num_heads, num_parts, score_scale, eps, STEPWISE: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Multiplies: of each row that is this program's, its queries, its window and its result."""
    num_rows = num_parts // ((num_heads + N - 1) // N)
    begin, end = _own_parts(num_parts)
    phase = 0
    position = gl.load(positions_ptr + begin % num_rows)
    for number in range(begin, end):
        t, first_head = number % num_rows, number // num_rows * N
        later_position = gl.load(positions_ptr + (number + 1) % num_rows)
        sink = load_sink(sink_ptr, first_head, num_heads)
        cos, sin = angles.index(2 * phase), angles.index(2 * phase + 1)
        mbarrier.wait(q_full, phase)
        norm_queries(q_shared, cos, sin, eps, STEPWISE)
        mbarrier.wait(full, phase)
        fence_async_shared()
        gl.thread_barrier()
        o, total, largest = _multiply(position, keys, q_shared, q_empty, p_shared, score_scale, BOUNDED)
        o = warpgroup_mma_wait(0, deps=(o,))
        gl.thread_barrier()
        mbarrier.arrive(empty, count=1)
        store_row(o, total, largest, sink, cos, sin, t, first_head, num_heads, out_ptr)
        position = later_position
        phase ^= 1


@gluon.jit
def _copy_places(position, own, place, near_ptr, buffer, NUM: tl.constexpr):
    """Brings the keys of NUM places that follow each other."""
    COPY: tl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [PRODUCERS, 1], [1, 0])
    age = (position - place - gl.arange(0, NUM, gl.SliceLayout(1, COPY))) & (WINDOW - 1)
    copy_rows(gl.where(age <= position, own - age, -1), near_ptr, buffer, COPY)


@gluon.jit
def _copy_window(position, own, goes_on, near_ptr, keys, full, empty, phase):
    """Brings the key that the window of a row has and that of the row before had not; all, where it does not go on."""
    mbarrier.wait(empty, phase ^ 1)
    if goes_on:
        place = position & (WINDOW - 1)
        buffer = keys.index(place // TILE)
        for i in gl.static_range(TILE // GROUP):
            if place % TILE // GROUP == i:
                _copy_places(position, own, place // GROUP * GROUP, near_ptr, buffer.slice(i * GROUP, GROUP), GROUP)
    else:
        for i in gl.static_range(BUFFERS):
            _copy_places(position, own, i * TILE, near_ptr, keys.index(i), TILE)
    async_copy.mbarrier_arrive(full, increment_count=False)


@gluon.jit
def _produce(
    keys, full, empty, q_shared, q_full, q_empty, angles, q_ptr, cos_ptr, sin_ptr, near_ptr,
    positions_ptr, places_ptr, row_stride, head_stride, num_heads, num_parts,
):  # fmt: skip
    """Brings queries and keys of each row that is this program's."""
    num_rows = num_parts // ((num_heads + N - 1) // N)
    begin, end = _own_parts(num_parts)
    phase = 0
    position, own = gl.load(positions_ptr + begin % num_rows), gl.load(places_ptr + begin % num_rows)
    expected, expected_own = position - 1, own
    for number in range(begin, end):
        t, first_head = number % num_rows, number // num_rows * N
        later_t = (number + 1) % num_rows
        later_position, later_own = gl.load(positions_ptr + later_t), gl.load(places_ptr + later_t)
        if number + 1 < end:
            later_head = (number + 1) // num_rows * N
            later_row = q_ptr + later_t.to(gl.int64) * row_stride + later_head * head_stride
            fetch_queries(later_row, head_stride, num_heads - later_head)
        q_row = q_ptr + t.to(gl.int64) * row_stride + first_head * head_stride
        cos_row, sin_row = cos_ptr + t * F, sin_ptr + t * F
        # fmt: off
        copy_queries(
            q_row, head_stride, num_heads - first_head, cos_row, sin_row, q_shared, q_full, q_empty, angles, phase
        )
        # fmt: on
        goes_on = (position == expected) & (own == expected_own)
        _copy_window(position, own, goes_on, near_ptr, keys, full, empty, phase)
        expected, expected_own = position + 1, own + 1
        position, own = later_position, later_own
        phase ^= 1


@gluon.jit(do_not_specialize=["num_blocks", "num_listed", "most_entries", "num_heads", "num_parts"])
def attend_chunk_window_kernel(
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
    STEPWISE: tl.constexpr,
    BOUNDED: tl.constexpr,
    REGISTERS: tl.constexpr,
):
    """Attends with 64 heads of rows, each to its window in ``near``. Arguments as of ``attend_chunk_hopper_kernel``.

    num_parts: rows times blocks of 64 heads; a program has neighbouring rows of one block of heads after another.
    """
    keys = gl.allocate_shared_memory(gl.bfloat16, [BUFFERS, TILE, H], SHARED)
    q_shared = gl.allocate_shared_memory(gl.bfloat16, [N, H], SHARED)
    p_shared = gl.allocate_shared_memory(gl.bfloat16, [BUFFERS, N, TILE], SHARED)
    angles = gl.allocate_shared_memory(gl.float32, [4, 2, F], ANGLES)
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    fill_angles(angles)
    mbarrier.init(full, count=32 * PRODUCERS)
    mbarrier.init(empty, count=1)
    mbarrier.init(q_full, count=32 * PRODUCERS + 1)
    mbarrier.init(q_empty, count=1)
    # fmt: off
    gl.warp_specialize(
        [
            (_consume, (
                keys, full, empty, q_shared, q_full, q_empty, p_shared, angles, sink_ptr, out_ptr, positions_ptr,
                num_heads, num_parts, score_scale, eps, STEPWISE, BOUNDED,
            )),
            (_produce, (
                keys, full, empty, q_shared, q_full, q_empty, angles, q_ptr, cos_ptr, sin_ptr, near_ptr,
                positions_ptr, places_ptr, row_stride, head_stride, num_heads, num_parts,
            )),
        ],
        [PRODUCERS],
        [REGISTERS],
    )
    # fmt: on
