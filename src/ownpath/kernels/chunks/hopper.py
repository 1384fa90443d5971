"""Gluon function of attention over chunks on Hopper: programs that take rows in turn, 64 of a row's heads at a time.

Written in Gluon, Triton's form with explicit layouts and warps of two kinds. Four warps bring keys, a tile of 64 at a
time, to two buffers (``producer``); two warpgroups multiply, and share every product: of the scores each computes half
of a tile's keys, of the sums over values half of the channels. Barriers in shared memory tell each kind that a tile is
there, or may be replaced. So nobody who multiplies waits for a copy of its own. Tiles go in pairs, so that weights are
made while a product runs. Queries and results are ``queries``.

Without a running maximum. A query's norm is sqrt(H), and of keys the operand knows a bound: where no score is beyond
+-SAFE, in powers of two, weights are 2^score without a maximum that is taken away first. They have float32's
exponents, and BF16's, which are the same, so that nothing overflows or vanishes, and their ratios are those of the
definition. This saves a round of both warpgroups to agree on a maximum, and the multiplication of all sums by what it
has grown.

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

from ownpath.kernels.chunks.producer import (
    BUFFERS,
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


@gluon.jit
def _add_up(weights):
    """Adds weights [N, TILE] that a thread holds of a row: [N, 2, 8]."""
    return gl.sum(gl.reshape(weights, (N, 2, TILE // 16, 8)), axis=2)


@gluon.jit
def _weigh(scores, left, score_scale, p_shared, o, sums, largest, BOUNDED: tl.constexpr):
    """Stores the weights of a tile of which ``left`` keys are there; returns the sums over values and weights as they
    are to be added to, and the maximum."""
    key = gl.arange(0, TILE, gl.SliceLayout(0, SCORES))
    scores = gl.where((key < left)[None, :], scores * score_scale, float("-inf"))
    if BOUNDED:
        weights = gl.exp2(scores)
        sums += _add_up(weights)
    else:
        higher = gl.maximum(largest, gl.max(scores, axis=1))
        weights = gl.exp2(scores - higher[:, None])
        keep = gl.exp2(largest - higher)
        of_sums: tl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, sums.type.layout))
        sums = sums * gl.convert_layout(keep, of_sums)[:, None][:, :, None] + _add_up(weights)
        largest = higher
        o = o * gl.convert_layout(keep, gl.SliceLayout(1, SUMS))[:, None]
    p_shared.store(weights.to(gl.bfloat16))
    fence_async_shared()
    gl.thread_barrier()
    return o, sums, largest


@gluon.jit
def _left(i, sizes):
    """Returns how many keys tile i has, or more than a tile has room for."""
    _, num_near, near_tiles, num_entries, _ = sizes
    return gl.where(i < near_tiles, num_near - i * TILE, num_entries - (i - near_tiles) * TILE)


@gluon.jit
def _wait_keys(full, turn, phase):
    mbarrier.wait(full.index(turn), phase)
    fence_async_shared()


@gluon.jit
def _multiply(
    sizes, keys, full, empty, q_shared, q_empty, p_shared, score_scale, turn, phase, BOUNDED: tl.constexpr
):  # fmt: skip
    """Attends to a row's tiles: returns the sums over values [N, H], those of weights [N], the maximum [N] that was
    taken away (0 where scores are bounded), the next buffer and its phase.

    Two tiles at a time: weights of the first are made while the second's scores are computed, and weights of the second
    while the first's values are summed.
    """
    largest = gl.full([N], 0.0 if BOUNDED else float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    sums = _add_up(gl.zeros([N, TILE], gl.float32, SCORES))
    o = gl.zeros([N, H], gl.float32, SUMS)
    num_tiles = sizes[2] + (sizes[3] + TILE - 1) // TILE
    for pair in range(num_tiles // 2):
        i = 2 * pair
        then, then_phase = next_buffer(turn, phase)
        _wait_keys(full, turn, phase)
        scores = start_scores(q_shared, keys.index(turn))
        _wait_keys(full, then, then_phase)
        next_scores = start_scores(q_shared, keys.index(then))
        scores = warpgroup_mma_wait(1, deps=(scores,))
        o, sums, largest = _weigh(scores, _left(i, sizes), score_scale, p_shared.index(0), o, sums, largest, BOUNDED)
        o = warpgroup_mma(p_shared.index(0), keys.index(turn), o, is_async=True)
        if BOUNDED:
            next_scores = warpgroup_mma_wait(1, deps=(next_scores,))
        else:
            o, next_scores = warpgroup_mma_wait(0, deps=(o, next_scores))
        left = _left(i + 1, sizes)
        o, sums, largest = _weigh(next_scores, left, score_scale, p_shared.index(1), o, sums, largest, BOUNDED)
        mbarrier.arrive(q_empty, count=1, pred=i + 2 >= num_tiles)
        o = warpgroup_mma(p_shared.index(1), keys.index(then), o, is_async=True)
        o = warpgroup_mma_wait(1, deps=(o,))
        gl.thread_barrier()
        mbarrier.arrive(empty.index(turn), count=1)
        o = warpgroup_mma_wait(0, deps=(o,))
        gl.thread_barrier()
        mbarrier.arrive(empty.index(then), count=1)
        turn, phase = next_buffer(then, then_phase)
    for i in range(num_tiles - num_tiles % 2, num_tiles):
        _wait_keys(full, turn, phase)
        scores = warpgroup_mma_wait(0, deps=(start_scores(q_shared, keys.index(turn)),))
        o, sums, largest = _weigh(scores, _left(i, sizes), score_scale, p_shared.index(0), o, sums, largest, BOUNDED)
        mbarrier.arrive(q_empty, count=1)
        o = warpgroup_mma_wait(0, deps=(warpgroup_mma(p_shared.index(0), keys.index(turn), o, is_async=True),))
        gl.thread_barrier()
        mbarrier.arrive(empty.index(turn), count=1)
        turn, phase = next_buffer(turn, phase)
    total = gl.convert_layout(gl.sum(gl.sum(sums, axis=2), axis=1), gl.SliceLayout(1, SCORES))
    return o, total, largest, turn, phase


@gluon.jit
def _consume(
    keys, full, empty, q_shared, q_full, q_empty, p_shared, angles, sink_ptr, out_ptr,
    positions_ptr, places_ptr, requests_ptr, blocks_ptr, selected_ptr, num_selected_ptr,
    num_blocks, num_listed, most_entries, num_heads, num_parts, score_scale, eps,
    RATIO: tl.constexpr, STEPWISE: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Multiplies: of each row that is this program's, its queries, its tiles and its result."""
    bits = (num_heads - 1) // N
    turn, phase, q_phase = 0, 0, 0
    facts = row_facts(gl.program_id(0) >> bits, positions_ptr, places_ptr, requests_ptr, num_selected_ptr, RATIO)
    for number in range(gl.program_id(0), num_parts, gl.num_programs(0)):
        t, first_head = number >> bits, (number & bits) * N
        sizes = row_sizes(t, facts, blocks_ptr, selected_ptr, num_blocks, num_listed, most_entries, RATIO)
        later = gl.minimum(number + gl.num_programs(0), num_parts - 1) >> bits
        facts = row_facts(later, positions_ptr, places_ptr, requests_ptr, num_selected_ptr, RATIO)
        cos, sin = angles.index(2 * q_phase), angles.index(2 * q_phase + 1)
        mbarrier.wait(q_full, q_phase)
        norm_queries(q_shared, cos, sin, eps, STEPWISE)
        fence_async_shared()
        gl.thread_barrier()
        o, total, largest, turn, phase = _multiply(
            sizes, keys, full, empty, q_shared, q_empty, p_shared, score_scale, turn, phase, BOUNDED
        )
        sink = load_sink(sink_ptr, first_head, num_heads)
        store_row(o, total, largest, sink, cos, sin, t, first_head, num_heads, out_ptr)
        q_phase ^= 1


@gluon.jit
def _produce(
    keys, full, empty, places, q_shared, q_full, q_empty, angles, q_ptr, cos_ptr, sin_ptr, near_ptr, entries_ptr,
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
        turn, phase = copy_near(0, sizes, near_ptr, keys, full, empty, turn, phase, FP8)
        q_row = q_ptr + t.to(gl.int64) * row_stride + first_head * head_stride
        cos_row, sin_row = cos_ptr + t * F, sin_ptr + t * F
        # fmt: off
        copy_queries(
            q_row, head_stride, num_heads - first_head, cos_row, sin_row, q_shared, q_full, q_empty, angles, q_phase
        )
        # fmt: on
        q_phase ^= 1
        if later < num_parts:
            later_head = (later & bits) * N
            later_row = q_ptr + later_t.to(gl.int64) * row_stride + later_head * head_stride
            fetch_queries(later_row, head_stride, num_heads - later_head)
        if FP8:
            turn, phase = decode_keys(
                sizes, near_ptr, entries_ptr, keys, full, empty, places, turn, phase, RATIO, BLOCK_BITS
            )
        else:
            turn, phase = copy_keys(
                sizes, near_ptr, entries_ptr, keys, full, empty, places, turn, phase, RATIO, BLOCK_BITS
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
    FP8: tl.constexpr,
    BOUNDED: tl.constexpr,
    REGISTERS: tl.constexpr,
):
    """Attends with 64 heads of rows: each to its window in ``near``, in the order of positions, then to its entries.

    num_parts: rows times blocks of 64 heads, which programs take in turn. score_scale: softmax scale times log2(e).
    BLOCK_BITS: log2 of a page's entries. most_entries: that lists or tables have room for. BOUNDED: no score is beyond
    +-SAFE. REGISTERS: of a thread that brings keys.
    """
    keys = gl.allocate_shared_memory(gl.bfloat16, [BUFFERS, TILE, H], SHARED)
    q_shared = gl.allocate_shared_memory(gl.bfloat16, [N, H], SHARED)
    p_shared = gl.allocate_shared_memory(gl.bfloat16, [BUFFERS, N, TILE], SHARED)
    angles = gl.allocate_shared_memory(gl.float32, [4, 2, F], ANGLES)
    places = gl.allocate_shared_memory(gl.int32, [BUFFERS, TILE], PLACES)
    full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=32 * PRODUCERS + 1)
    mbarrier.init(q_empty, count=1)
    fill_angles(angles)
    for i in gl.static_range(BUFFERS):
        # Every thread's copies, and once more for codes that went through registers.
        mbarrier.init(full.index(i), count=32 * PRODUCERS + (1 if FP8 else 0))
        mbarrier.init(empty.index(i), count=1)
    # fmt: off
    gl.warp_specialize(
        [
            (_consume, (
                keys, full, empty, q_shared, q_full, q_empty, p_shared, angles, sink_ptr, out_ptr,
                positions_ptr, places_ptr, requests_ptr, blocks_ptr, selected_ptr, num_selected_ptr,
                num_blocks, num_listed, most_entries, num_heads, num_parts, score_scale, eps,
                RATIO, STEPWISE, BOUNDED,
            )),
            (_produce, (
                keys, full, empty, places, q_shared, q_full, q_empty, angles,
                q_ptr, cos_ptr, sin_ptr, near_ptr, entries_ptr,
                positions_ptr, places_ptr, requests_ptr, blocks_ptr, selected_ptr, num_selected_ptr,
                num_blocks, num_listed, most_entries, row_stride, head_stride, num_heads, num_parts,
                RATIO, BLOCK_BITS, FP8,
            )),
        ],
        [PRODUCERS],
        [REGISTERS],
    )
    # fmt: on
