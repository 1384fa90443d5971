"""Gluon function of attention over chunks on Hopper: one program for a row and 64 of its heads.

Written in Gluon, Triton's form with explicit layouts, so that the two warpgroups share every product: of the scores
each computes half of a tile's keys, of the sums over values half of the channels. Triton's own layouts would compute
all scores in both.

Legend: N heads of a program, K keys of a tile, H channels, R rotary channels, F pairs of them.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LOG2E = tl.constexpr(1.4426950408889634)
N = tl.constexpr(64)
H = tl.constexpr(512)
R = tl.constexpr(64)
F = tl.constexpr(32)
TILE = tl.constexpr(64)
BUFFERS = tl.constexpr(2)
WINDOW = tl.constexpr(128)
LISTED = tl.constexpr(4)


@gluon.jit
def _copy_tile(
    i,
    tiles,
    near_tiles,
    first,
    num_near,
    num_entries,
    near_ptr,
    entries_ptr,
    places_ptr,
    buffer,
    RATIO: tl.constexpr,
    BLOCK_BITS: tl.constexpr,
    COPY: tl.constexpr,
):
    """Starts the copies of tile i, or an empty group behind the last one. Keys that are not the row's become zeros."""
    if i < tiles:
        key = gl.arange(0, TILE, gl.SliceLayout(1, COPY))
        c = gl.arange(0, H, gl.SliceLayout(0, COPY))
        if i < near_tiles:
            j = i * TILE + key
            valid = j < num_near
            at = near_ptr + (first + j).to(gl.int64) * H
            async_copy.async_copy_global_to_shared(buffer, at[:, None] + c[None, :], mask=valid[:, None])
        elif RATIO > 0:
            j = (i - near_tiles) * TILE + key
            valid = j < num_entries
            if RATIO == LISTED:
                row = gl.load(places_ptr + j, mask=valid, other=0)
            else:
                block = gl.load(places_ptr + (j >> BLOCK_BITS), mask=valid, other=0)
                row = (block << BLOCK_BITS) + (j & ((1 << BLOCK_BITS) - 1))
            at = entries_ptr + row.to(gl.int64) * H
            async_copy.async_copy_global_to_shared(buffer, at[:, None] + c[None, :], mask=valid[:, None])
    async_copy.commit_group()


@gluon.jit
def _store_queries(
    q_row, n, head_stride, num_heads, cos_row, sin_row, eps, q_shared,
    COPY: tl.constexpr, SMALL: tl.constexpr, STEPWISE: tl.constexpr,
):  # fmt: skip
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


@gluon.jit(do_not_specialize=["num_blocks", "num_listed", "most_entries", "num_heads"])
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
    score_scale,
    eps,
    RATIO: tl.constexpr,
    BLOCK_BITS: tl.constexpr,
    STEPWISE: tl.constexpr,
):
    """Attends with 64 heads of row t: to its window in ``near``, in the order of positions, then to its entries.

    score_scale: softmax scale times log2(e). BLOCK_BITS: log2 of a page's entries. most_entries: that lists or tables
    have room for.
    """
    COPY: tl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0])
    SMALL: tl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [8, 1], [1, 0])
    SHARED: tl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    SCORES: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16])
    SUMS: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 256, 16])
    groups = (num_heads + N - 1) // N
    t = gl.program_id(0) // groups
    first_head = gl.program_id(0) % groups * N
    position = gl.load(positions_ptr + t)
    own = gl.load(places_ptr + t)
    num_near = gl.minimum(position + 1, WINDOW)
    first = own + 1 - num_near
    near_tiles = (num_near + TILE - 1) // TILE
    num_entries = 0
    lists = selected_ptr
    if RATIO == LISTED:
        num_entries = gl.minimum(gl.load(num_selected_ptr + t), most_entries)
        lists = selected_ptr + t.to(gl.int64) * num_listed
    elif RATIO > 0:
        num_entries = gl.minimum((position + 1) // RATIO, most_entries)
        lists = blocks_ptr + gl.load(requests_ptr + t).to(gl.int64) * num_blocks
    tiles = near_tiles + (num_entries + TILE - 1) // TILE

    keys = gl.allocate_shared_memory(gl.bfloat16, [BUFFERS, TILE, H], SHARED)
    q_shared = gl.allocate_shared_memory(gl.bfloat16, [N, H], SHARED)
    p_shared = gl.allocate_shared_memory(gl.bfloat16, [N, TILE], SHARED)
    for i in gl.static_range(BUFFERS):
        # fmt: off
        _copy_tile(
            i, tiles, near_tiles, first, num_near, num_entries, near_ptr, entries_ptr, lists, keys.index(i),
            RATIO, BLOCK_BITS, COPY,
        )
        # fmt: on
    q_row = q_ptr + t.to(gl.int64) * row_stride
    cos_row, sin_row = cos_ptr + t * F, sin_ptr + t * F
    n = first_head + gl.arange(0, N, gl.SliceLayout(1, COPY))
    _store_queries(q_row, n, head_stride, num_heads, cos_row, sin_row, eps, q_shared, COPY, SMALL, STEPWISE)

    largest = gl.full([N], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    total = gl.zeros([N], gl.float32, gl.SliceLayout(1, SCORES))
    o = gl.zeros([N, H], gl.float32, SUMS)
    key = gl.arange(0, TILE, gl.SliceLayout(0, SCORES))
    turn = 0
    for i in range(tiles):
        buffer = keys.index(turn)
        turn = BUFFERS - 1 - turn
        async_copy.wait_group(BUFFERS - 1)
        fence_async_shared()
        scores = gl.zeros([N, TILE], gl.float32, SCORES)
        scores = warpgroup_mma(q_shared, buffer.permute((1, 0)), scores, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        left = gl.where(i < near_tiles, num_near - i * TILE, num_entries - (i - near_tiles) * TILE)
        scores = gl.where((key < left)[None, :], scores * score_scale, float("-inf"))
        higher = gl.maximum(largest, gl.max(scores, axis=1))
        weights = gl.exp2(scores - higher[:, None])
        keep = gl.exp2(largest - higher)
        total = total * keep + gl.sum(weights, axis=1)
        largest = higher
        p_shared.store(weights.to(gl.bfloat16))
        fence_async_shared()
        o = o * gl.convert_layout(keep, gl.SliceLayout(1, SUMS))[:, None]
        o = warpgroup_mma(p_shared, buffer, o, is_async=True)
        o = warpgroup_mma_wait(0, deps=(o,))
        # fmt: off
        _copy_tile(
            i + BUFFERS, tiles, near_tiles, first, num_near, num_entries, near_ptr, entries_ptr, lists, buffer,
            RATIO, BLOCK_BITS, COPY,
        )
        # fmt: on

    head = first_head + gl.arange(0, N, gl.SliceLayout(1, SCORES))
    sink = gl.load(sink_ptr + head, mask=head < num_heads, other=0.0) * LOG2E
    factor = 1.0 / (total + gl.exp2(sink - largest))
    o = _turn_back(o * gl.convert_layout(factor, gl.SliceLayout(1, SUMS))[:, None], cos_row, sin_row)
    # Through shared memory, so that every thread stores 16 bytes.
    q_shared.store(o.to(gl.bfloat16))
    gl.thread_barrier()
    c = gl.arange(0, H, gl.SliceLayout(0, COPY))
    at_out = out_ptr + (t.to(gl.int64) * num_heads + n)[:, None] * H + c[None, :]
    gl.store(at_out, q_shared.load(COPY), mask=(n < num_heads)[:, None])
