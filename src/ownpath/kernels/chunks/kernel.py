"""Triton function of attention over chunks: one program for a row and a block of its heads.

Legend: N heads of a program, K keys of a tile, and two halves of 256 channels.
"""

import triton
import triton.language as tl

from ownpath.kernels.attend.triton_attend import (
    load_keys,
    load_page_keys,
    load_q,
    norm_factor,
    normed,
    rotated,
)

LOG2E = tl.constexpr(1.4426950408889634)
HEAD_DIM = tl.constexpr(512)
HALF = tl.constexpr(256)
ROTARY = tl.constexpr(64)
WINDOW = tl.constexpr(128)
KEY_DATA = tl.constexpr(576)
KEY_ALL = tl.constexpr(584)
LISTED = tl.constexpr(4)


@triton.jit
def _weigh(q0, q1, k0, k1, valid, score_scale, largest, total, o0, o1):
    """Adds a tile's keys to the running softmax."""
    scores = tl.dot(q1, tl.trans(k1), tl.dot(q0, tl.trans(k0)))
    scores = tl.where(valid[None, :], scores * score_scale, float("-inf"))
    higher = tl.maximum(largest, tl.max(scores, axis=1))
    weights = tl.exp2(scores - higher[:, None])
    keep = tl.exp2(largest - higher)
    total = total * keep + tl.sum(weights, axis=1)
    p = weights.to(tl.bfloat16)
    o0 = tl.dot(p, k0, o0 * keep[:, None])
    o1 = tl.dot(p, k1, o1 * keep[:, None])
    return higher, total, o0, o1


@triton.jit(do_not_specialize=["num_blocks", "num_listed", "most_entries", "num_heads"])
def attend_chunk_kernel(
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
    N: tl.constexpr,
    FP8: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attends with N heads of row t: to its window in ``near``, in the order of positions, then to its entries.

    score_scale: softmax scale times log2(e). BLOCK_BITS: log2 of a page's entries. most_entries: that lists or tables
    have room for.
    """
    groups = tl.cdiv(num_heads, N)
    t = tl.program_id(0) // groups
    n = tl.program_id(0) % groups * N + tl.arange(0, N)
    position = tl.load(positions_ptr + t)
    own = tl.load(places_ptr + t)
    q_row = q_ptr + t.to(tl.int64) * row_stride
    cos_row, sin_row = cos_ptr + t * (ROTARY // 2), sin_ptr + t * (ROTARY // 2)
    x0 = load_q(q_row, n, num_heads, head_stride, 0)
    x1 = load_q(q_row, n, num_heads, head_stride, HALF)
    factor = norm_factor(x0, x1, eps, STEPWISE)
    q0 = normed(x0, factor)
    q1 = rotated(normed(x1, factor).to(tl.float32), cos_row, sin_row, 1.0).to(tl.bfloat16)

    largest = tl.full((N,), float("-inf"), tl.float32)
    total = tl.zeros((N,), tl.float32)
    o0, o1 = tl.zeros((N, HALF), tl.float32), tl.zeros((N, HALF), tl.float32)
    num_near = tl.minimum(position + 1, WINDOW)
    first = own + 1 - num_near
    for i in tl.range(0, tl.cdiv(num_near, TILE), num_stages=STAGES):
        j = i * TILE + tl.arange(0, TILE)
        valid = j < num_near
        at = near_ptr + (first + j).to(tl.int64) * HEAD_DIM
        k0 = load_keys(at, valid, 0)
        k1 = load_keys(at, valid, HALF)
        largest, total, o0, o1 = _weigh(q0, q1, k0, k1, valid, score_scale, largest, total, o0, o1)

    if RATIO > 0:
        if RATIO == LISTED:
            num_entries = tl.minimum(tl.load(num_selected_ptr + t), most_entries)
            places = selected_ptr + t.to(tl.int64) * num_listed
        else:
            num_entries = tl.minimum((position + 1) // RATIO, most_entries)
            places = blocks_ptr + tl.load(requests_ptr + t).to(tl.int64) * num_blocks
        for i in tl.range(0, tl.cdiv(num_entries, TILE), num_stages=STAGES):
            j = i * TILE + tl.arange(0, TILE)
            valid = j < num_entries
            if RATIO == LISTED:
                row = tl.load(places + j, mask=valid, other=0)
            else:
                block = tl.load(places + (j >> BLOCK_BITS), mask=valid, other=0)
                row = (block << BLOCK_BITS) + (j & ((1 << BLOCK_BITS) - 1))
            if FP8:
                start = (row >> BLOCK_BITS).to(tl.int64) * (KEY_ALL << BLOCK_BITS)
                place = row & ((1 << BLOCK_BITS) - 1)
                at = entries_ptr + (start + place * KEY_DATA)
                scale_at = entries_ptr + (start + (KEY_DATA << BLOCK_BITS) + place * (KEY_ALL - KEY_DATA))
                k0 = load_page_keys(at, scale_at, valid, 0)
                k1 = load_page_keys(at, scale_at, valid, HALF)
            else:
                at = entries_ptr + row.to(tl.int64) * HEAD_DIM
                k0 = load_keys(at, valid, 0)
                k1 = load_keys(at, valid, HALF)
            largest, total, o0, o1 = _weigh(q0, q1, k0, k1, valid, score_scale, largest, total, o0, o1)

    inside = n < num_heads
    c, mask = tl.arange(0, HALF), inside[:, None]
    sink = tl.load(sink_ptr + n, mask=inside, other=0.0) * LOG2E
    factor = (1.0 / (total + tl.exp2(sink - largest)))[:, None]
    at_out = out_ptr + (t.to(tl.int64) * num_heads + n)[:, None] * HEAD_DIM + c[None, :]
    tl.store(at_out, (o0 * factor).to(tl.bfloat16), mask=mask)
    tl.store(at_out + HALF, rotated(o1 * factor, cos_row, sin_row, -1.0).to(tl.bfloat16), mask=mask)
