"""Gluon function of attention over chunks on Hopper where a row has its window alone, 64 of its heads at a time.

Neighbouring rows' windows have 127 of 128 keys in common. A program takes rows that follow each other and keeps the
window's keys in shared memory, the key of position p at place p mod 128: from row to row one of them is replaced. So a
row costs its queries and its result. Where a row does not continue the one before, all keys are brought. The order of
a row's sums depends on its position alone.

The whole window is there at once and is one tile, so that each warpgroup has 64 keys of the product of scores, which
then is bound by the tensor cores and not by its operands' way from shared memory. Warps of two kinds, and softmax
without a maximum, are those of ``hopper``.

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

from ownpath.kernels.chunks.producer import PRODUCERS, TILE, WINDOW, copy_rows
from ownpath.kernels.chunks.queries import (
    ANGLES,
    SCORES,
    SHARED,
    SUMS,
    F,
    H,
    N,
    copy_queries,
    fill_angles,
    load_sink,
    norm_queries,
    store_row,
)

WINDOW_SCORES = tl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 64, 16]))
GROUP = tl.constexpr(8)
"""Keys that are brought again with one that is replaced."""


@gluon.jit
def _own_parts(num_parts):
    """Returns the first of this program's parts, and the one behind its last."""
    programs = gl.num_programs(0)
    return gl.program_id(0) * num_parts // programs, (gl.program_id(0) + 1) * num_parts // programs


@gluon.jit
def _next_part(t, first_head, num_rows):
    """Returns the row and the first head of the part behind one."""
    is_last = t == num_rows - 1
    return gl.where(is_last, 0, t + 1), gl.where(is_last, first_head + N, first_head)


@gluon.jit
def _multiply(position, keys, q_shared, q_empty, p_shared, score_scale, BOUNDED: tl.constexpr):
    """Attends to the window: returns the sums over values [N, H], still under way, those of weights [N], and the
    maximum [N] that was taken away (0 where scores are bounded)."""
    scores = gl.zeros([N, WINDOW], gl.float32, WINDOW_SCORES)
    scores = warpgroup_mma(q_shared, keys.permute((1, 0)), scores, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    there = ((position - gl.arange(0, WINDOW, gl.SliceLayout(0, WINDOW_SCORES))) & (WINDOW - 1)) <= position
    scores = gl.where(there[None, :], scores * score_scale, float("-inf"))
    largest = gl.zeros([N], gl.float32, gl.SliceLayout(1, WINDOW_SCORES))
    if not BOUNDED:
        largest = gl.max(scores, axis=1)
        scores = scores - largest[:, None]
    weights = gl.exp2(scores)
    p_shared.store(weights.to(gl.bfloat16))
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.arrive(q_empty, count=1)
    o = gl.zeros([N, H], gl.float32, SUMS)
    o = warpgroup_mma(p_shared, keys, o, use_acc=False, is_async=True)
    total = gl.sum(weights, axis=1)
    total = gl.convert_layout(total, gl.SliceLayout(1, SCORES))
    return o, total, gl.convert_layout(largest, gl.SliceLayout(1, SCORES))


@gluon.jit
def _consume(
    keys, full, empty, q_shared, q_full, q_empty, p_shared, angles, sink_ptr, out_ptr, positions_ptr,
    num_heads, num_parts, score_scale, eps, STEPWISE: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Multiplies: of each row that is this program's, its queries, its window and its result."""
    num_rows = num_parts // ((num_heads + N - 1) // N)
    begin, end = _own_parts(num_parts)
    t, first_head, phase = begin % num_rows, begin // num_rows * N, 0
    position = gl.load(positions_ptr + t)
    for _ in range(begin, end):
        later_t, later_head = _next_part(t, first_head, num_rows)
        later_position = gl.load(positions_ptr + later_t)
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
        t, first_head, position = later_t, later_head, later_position
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
        group = (position & (WINDOW - 1)) // GROUP
        for i in gl.static_range(WINDOW // GROUP):
            if group == i:
                _copy_places(position, own, i * GROUP, near_ptr, keys.slice(i * GROUP, GROUP), GROUP)
    else:
        for i in gl.static_range(2):
            _copy_places(position, own, i * TILE, near_ptr, keys.slice(i * TILE, TILE), TILE)
    async_copy.mbarrier_arrive(full, increment_count=False)


@gluon.jit
def _produce(
    keys, full, empty, q_shared, q_full, q_empty, angles, q_ptr, cos_ptr, sin_ptr, near_ptr,
    positions_ptr, places_ptr, row_stride, head_stride, num_heads, num_parts,
):  # fmt: skip
    """Brings queries and keys of each row that is this program's."""
    num_rows = num_parts // ((num_heads + N - 1) // N)
    begin, end = _own_parts(num_parts)
    t, first_head, phase = begin % num_rows, begin // num_rows * N, 0
    position, own = gl.load(positions_ptr + t), gl.load(places_ptr + t)
    expected, expected_own = position - 1, own
    for _ in range(begin, end):
        later_t, later_head = _next_part(t, first_head, num_rows)
        later_position, later_own = gl.load(positions_ptr + later_t), gl.load(places_ptr + later_t)
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
        t, first_head, position, own = later_t, later_head, later_position, later_own
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
    keys = gl.allocate_shared_memory(gl.bfloat16, [WINDOW, H], SHARED)
    q_shared = gl.allocate_shared_memory(gl.bfloat16, [N, H], SHARED)
    p_shared = gl.allocate_shared_memory(gl.bfloat16, [N, WINDOW], SHARED)
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
