"""Gluon function of attention over chunks on Hopper: programs that take rows in turn, 64 of a row's heads at a time.

Written in Gluon, Triton's form with explicit layouts and warps of two kinds. Four warps bring keys, a tile of 64 at a
time, to two buffers (``producer``); two warpgroups multiply, and share every product: of the scores each computes half
of a tile's keys, of the sums over values half of the channels. Barriers in shared memory tell each kind that a tile is
there, or may be replaced. So nobody who multiplies waits for a copy of its own.

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

from ownpath.kernels.chunks.producer import BUFFERS, PRODUCERS, TILE, copy_keys, decode_keys, next_buffer, row_sizes

LOG2E = tl.constexpr(1.4426950408889634)
N = tl.constexpr(64)
H = tl.constexpr(512)
R = tl.constexpr(64)
F = tl.constexpr(32)
COPY = tl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0]))
SMALL = tl.constexpr(gl.BlockedLayout([1, 1], [1, 32], [8, 1], [1, 0]))
SCORES = tl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16]))
SUMS = tl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 256, 16]))
SHARED = tl.constexpr(gl.NVMMASharedLayout(128, 16, 2))


@gluon.jit
def _store_queries(q_row, n, head_stride, num_heads, cos_row, sin_row, eps, q_shared, STEPWISE: tl.constexpr):
    """Norms each head's query, rotates its last channels, and stores both to shared memory, rounded."""
    c = gl.arange(0, H, gl.SliceLayout(0, COPY))
    inside = n < num_heads
    x = gl.load(q_row + n[:, None] * head_stride + c[None, :], mask=inside[:, None], other=0.0).to(gl.float32)
    if STEPWISE:
        squares = gl.sum((x * x).to(gl.bfloat16).to(gl.float32), axis=1)
        mean = (squares / H).to(gl.bfloat16).to(gl.float32)
        factor = gl.rsqrt((mean + eps).to(gl.bfloat16).to(gl.float32)).to(gl.bfloat16).to(gl.float32)
    else:
        factor = gl.rsqrt(gl.sum(x * x, axis=1) / H + eps)
    q_shared.store((x * factor[:, None]).to(gl.bfloat16))
    # The rotary channels again, as pairs.
    small_n = gl.convert_layout(n, gl.SliceLayout(1, SMALL))
    small_factor = gl.convert_layout(factor, gl.SliceLayout(1, SMALL))
    f = gl.arange(0, F, gl.SliceLayout(0, SMALL))
    at = q_row + small_n[:, None] * head_stride + (H - R) + 2 * f[None, :]
    there = (small_n < num_heads)[:, None]
    even = gl.load(at, mask=there, other=0.0).to(gl.float32) * small_factor[:, None]
    odd = gl.load(at + 1, mask=there, other=0.0).to(gl.float32) * small_factor[:, None]
    even, odd = even.to(gl.bfloat16).to(gl.float32), odd.to(gl.bfloat16).to(gl.float32)
    cos, sin = gl.load(cos_row + f)[None, :], gl.load(sin_row + f)[None, :]
    turned = gl.join(even * cos - odd * sin, even * sin + odd * cos)
    gl.thread_barrier()
    q_shared.slice(H - R, R, dim=1).store(gl.reshape(turned, (N, R)).to(gl.bfloat16))


@gluon.jit
def _turn_back(o, cos_row, sin_row):
    """Rotates the last channels of float32 [N, H] back, in pairs; the others turn by nothing."""
    even, odd = gl.split(gl.reshape(o, (N, H // 2, 2)))
    PAIRS: tl.constexpr = gl.SliceLayout(0, even.type.layout)
    pair = gl.arange(0, H // 2, PAIRS) - (H - R) // 2
    cos = gl.load(cos_row + pair, mask=pair >= 0, other=1.0)[None, :]
    sin = gl.load(sin_row + pair, mask=pair >= 0, other=0.0)[None, :]
    turned = gl.join(even * cos + odd * sin, odd * cos - even * sin)
    return gl.reshape(turned, (N, H))


@gluon.jit
def _multiply(sizes, keys, full, empty, q_shared, p_shared, score_scale, turn, phase, BOUNDED: tl.constexpr):
    """Attends to a row's tiles: returns the sums over values [N, H], those of weights [N], the maximum [N] that was
    taken away (0 where scores are bounded), the next buffer and its phase."""
    _, num_near, near_tiles, num_entries, _ = sizes
    largest = gl.full([N], 0.0 if BOUNDED else float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    sums = gl.zeros([N, TILE], gl.float32, SCORES)
    o = gl.zeros([N, H], gl.float32, SUMS)
    key = gl.arange(0, TILE, gl.SliceLayout(0, SCORES))
    for i in range(near_tiles + (num_entries + TILE - 1) // TILE):
        buffer = keys.index(turn)
        mbarrier.wait(full.index(turn), phase)
        fence_async_shared()
        scores = gl.zeros([N, TILE], gl.float32, SCORES)
        scores = warpgroup_mma(q_shared, buffer.permute((1, 0)), scores, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        left = gl.where(i < near_tiles, num_near - i * TILE, num_entries - (i - near_tiles) * TILE)
        scores = gl.where((key < left)[None, :], scores * score_scale, float("-inf"))
        if BOUNDED:
            weights = gl.exp2(scores)
            sums += weights
        else:
            higher = gl.maximum(largest, gl.max(scores, axis=1))
            weights = gl.exp2(scores - higher[:, None])
            keep = gl.exp2(largest - higher)
            sums = sums * keep[:, None] + weights
            largest = higher
            o = o * gl.convert_layout(keep, gl.SliceLayout(1, SUMS))[:, None]
        p_shared.store(weights.to(gl.bfloat16))
        fence_async_shared()
        gl.thread_barrier()
        o = warpgroup_mma(p_shared, buffer, o, is_async=True)
        o = warpgroup_mma_wait(0, deps=(o,))
        gl.thread_barrier()
        mbarrier.arrive(empty.index(turn), count=1)
        turn, phase = next_buffer(turn, phase)
    return o, gl.sum(sums, axis=1), largest, turn, phase


@gluon.jit
def _consume(
    keys, full, empty, q_shared, p_shared, q_ptr, cos_ptr, sin_ptr, sink_ptr, out_ptr,
    positions_ptr, places_ptr, requests_ptr, blocks_ptr, selected_ptr, num_selected_ptr,
    num_blocks, num_listed, most_entries, row_stride, head_stride, num_heads, num_parts, score_scale, eps,
    RATIO: tl.constexpr, STEPWISE: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Multiplies: of each row that is this program's, its queries, its tiles and its result."""
    groups = (num_heads + N - 1) // N
    c = gl.arange(0, H, gl.SliceLayout(0, COPY))
    turn, phase = 0, 0
    for number in range(gl.program_id(0), num_parts, gl.num_programs(0)):
        t, first_head = number // groups, number % groups * N
        # fmt: off
        sizes = row_sizes(
            t, positions_ptr, places_ptr, requests_ptr, blocks_ptr, selected_ptr, num_selected_ptr,
            num_blocks, num_listed, most_entries, RATIO,
        )
        # fmt: on
        q_row = q_ptr + t.to(gl.int64) * row_stride
        cos_row, sin_row = cos_ptr + t * F, sin_ptr + t * F
        n = first_head + gl.arange(0, N, gl.SliceLayout(1, COPY))
        gl.thread_barrier()
        _store_queries(q_row, n, head_stride, num_heads, cos_row, sin_row, eps, q_shared, STEPWISE)
        fence_async_shared()
        gl.thread_barrier()
        o, total, largest, turn, phase = _multiply(
            sizes, keys, full, empty, q_shared, p_shared, score_scale, turn, phase, BOUNDED
        )
        head = first_head + gl.arange(0, N, gl.SliceLayout(1, SCORES))
        sink = gl.load(sink_ptr + head, mask=head < num_heads, other=0.0) * LOG2E
        factor = 1.0 / (total + gl.exp2(sink - largest))
        o = _turn_back(o * gl.convert_layout(factor, gl.SliceLayout(1, SUMS))[:, None], cos_row, sin_row)
        # Through shared memory, so that every thread stores 16 bytes.
        q_shared.store(o.to(gl.bfloat16))
        gl.thread_barrier()
        at_out = out_ptr + (t.to(gl.int64) * num_heads + n)[:, None] * H + c[None, :]
        gl.store(at_out, q_shared.load(COPY), mask=(n < num_heads)[:, None])


@gluon.jit
def _fetch_queries(q_row, head_stride, left):
    """Asks for a later row's queries, to be in the L2 cache when they are loaded."""
    LINES: tl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [PRODUCERS, 1], [1, 0])
    n = gl.arange(0, N, gl.SliceLayout(1, LINES))
    line = gl.arange(0, 8, gl.SliceLayout(0, LINES))
    at = q_row + gl.minimum(n, left - 1)[:, None] * head_stride + line[None, :] * 64
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _produce(
    keys, full, empty, q_ptr, near_ptr, entries_ptr,
    positions_ptr, places_ptr, requests_ptr, blocks_ptr, selected_ptr, num_selected_ptr,
    num_blocks, num_listed, most_entries, row_stride, head_stride, num_heads, num_parts,
    RATIO: tl.constexpr, BLOCK_BITS: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Brings the keys of each row that is this program's."""
    groups = (num_heads + N - 1) // N
    turn, phase = 0, 1
    for number in range(gl.program_id(0), num_parts, gl.num_programs(0)):
        # fmt: off
        sizes = row_sizes(
            number // groups, positions_ptr, places_ptr, requests_ptr, blocks_ptr, selected_ptr, num_selected_ptr,
            num_blocks, num_listed, most_entries, RATIO,
        )
        # fmt: on
        later = number + gl.num_programs(0)
        if later < num_parts:
            first_head = later % groups * N
            q_row = q_ptr + (later // groups).to(gl.int64) * row_stride + first_head * head_stride
            _fetch_queries(q_row, head_stride, num_heads - first_head)
        if FP8:
            turn, phase = decode_keys(sizes, near_ptr, entries_ptr, keys, full, empty, turn, phase, RATIO, BLOCK_BITS)
        else:
            turn, phase = copy_keys(sizes, near_ptr, entries_ptr, keys, full, empty, turn, phase, RATIO, BLOCK_BITS)


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
    p_shared = gl.allocate_shared_memory(gl.bfloat16, [N, TILE], SHARED)
    full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(BUFFERS):
        # Every thread's copies, and once more for codes that went through registers.
        mbarrier.init(full.index(i), count=32 * PRODUCERS + (1 if FP8 else 0))
        mbarrier.init(empty.index(i), count=1)
    # fmt: off
    gl.warp_specialize(
        [
            (_consume, (
                keys, full, empty, q_shared, p_shared, q_ptr, cos_ptr, sin_ptr, sink_ptr, out_ptr,
                positions_ptr, places_ptr, requests_ptr, blocks_ptr, selected_ptr, num_selected_ptr,
                num_blocks, num_listed, most_entries, row_stride, head_stride, num_heads, num_parts, score_scale, eps,
                RATIO, STEPWISE, BOUNDED,
            )),
            (_produce, (
                keys, full, empty, q_ptr, near_ptr, entries_ptr,
                positions_ptr, places_ptr, requests_ptr, blocks_ptr, selected_ptr, num_selected_ptr,
                num_blocks, num_listed, most_entries, row_stride, head_stride, num_heads, num_parts,
                RATIO, BLOCK_BITS, FP8,
            )),
        ],
        [PRODUCERS],
        [REGISTERS],
    )
    # fmt: on
