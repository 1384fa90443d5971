"""Triton functions of decode attention: one program for a row, a block of its heads and a share of its keys.

Legend: N heads of a program, K keys of a tile, and two halves of 256 channels.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
HEAD_DIM = tl.constexpr(512)
HALF = tl.constexpr(256)
ROTARY = tl.constexpr(64)
RING = tl.constexpr(128)
RING_BITS = tl.constexpr(7)
TILE = tl.constexpr(64)
KEY_DATA = tl.constexpr(576)
KEY_ALL = tl.constexpr(584)
BITS_2_120 = tl.constexpr(0x7B80)  # 2^120 in BF16
MOST_SPLITS = tl.constexpr(128)
LISTED = tl.constexpr(4)


@triton.jit
def _row_tiles(position, num_selected_ptr, most_entries, t, RATIO: tl.constexpr):
    """Returns the keys of the window, the entries, the tiles of the window, and all tiles. Tiles are not mixed."""
    num_window = tl.minimum(position + 1, RING)
    if RATIO == 0:
        num_entries = 0
    elif RATIO == LISTED:
        num_entries = tl.minimum(tl.load(num_selected_ptr + t), most_entries)
    else:
        num_entries = tl.minimum((position + 1) // RATIO, most_entries)
    window_tiles = tl.cdiv(num_window, TILE)
    return num_window, num_entries, window_tiles, window_tiles + tl.cdiv(num_entries, TILE)


@triton.jit
def _ring_place(position, j, SPARE: tl.constexpr):
    """Returns the row of the ring that holds key j of the window: of the position, among the last 128, that is j modulo
    128. So the keys' order does not depend on the length of the ring."""
    place = position % (RING + SPARE) - ((position - j) & (RING - 1))
    return tl.where(place < 0, place + (RING + SPARE), place)


@triton.jit
def _share(num_tiles, splits, chunk):
    """Returns the tiles of a split: ``chunk``, or an equal share of the row's where that is 0."""
    return tl.where(chunk > 0, chunk, tl.cdiv(num_tiles, splits))


@triton.jit
def load_q(q_ptr, n, num_heads, head_stride, START: tl.constexpr):
    """Loads half of the channels of N heads, from START on; zeros for heads that do not exist."""
    c = START + tl.arange(0, HALF)
    return tl.load(q_ptr + n[:, None] * head_stride + c[None, :], mask=(n < num_heads)[:, None], other=0.0)


@triton.jit
def _sum_squares(x):
    wide = x.to(tl.float32)
    return tl.sum(wide * wide, axis=1)


@triton.jit
def norm_factor(x0, x1, eps, STEPWISE: tl.constexpr):
    """Returns 1 / sqrt(mean(x²) + eps), float32. STEPWISE: squares, mean, sum and root each rounded to BF16."""
    if STEPWISE:
        w0, w1 = x0.to(tl.float32), x1.to(tl.float32)
        squares = tl.sum((w0 * w0).to(tl.bfloat16).to(tl.float32), axis=1)
        squares += tl.sum((w1 * w1).to(tl.bfloat16).to(tl.float32), axis=1)
        mean = (squares / HEAD_DIM).to(tl.bfloat16).to(tl.float32)
        return tl.rsqrt((mean + eps).to(tl.bfloat16).to(tl.float32)).to(tl.bfloat16).to(tl.float32)
    return tl.rsqrt((_sum_squares(x0) + _sum_squares(x1)) / HEAD_DIM + eps)


@triton.jit
def normed(x, factor):
    """Multiplies each head by its factor and rounds."""
    return (x.to(tl.float32) * factor[:, None]).to(tl.bfloat16)


@triton.jit
def rotated(x, cos_ptr, sin_ptr, SIGN: tl.constexpr):
    """Rotates the last 64 channels of float32 [N, 256] in pairs of neighbours; the others turn by nothing."""
    pair = tl.arange(0, HALF // 2) - (HALF - ROTARY) // 2
    cos = tl.load(cos_ptr + pair, mask=pair >= 0, other=1.0)
    sin = SIGN * tl.load(sin_ptr + pair, mask=pair >= 0, other=0.0)
    even, odd = tl.split(tl.reshape(x, (x.shape[0], HALF // 2, 2)))
    turned = tl.join(even * cos[None, :] - odd * sin[None, :], even * sin[None, :] + odd * cos[None, :])
    return tl.reshape(turned, (x.shape[0], HALF))


@triton.jit
def load_keys(at, valid, START: tl.constexpr):
    """Loads BF16 [K, 256]. Keys that are not the row's are zeros, whatever their memory holds."""
    c = START + tl.arange(0, HALF)
    return tl.load(at[:, None] + c[None, :], mask=valid[:, None], other=0.0)


@triton.jit
def load_page_keys(at, scale_at, valid, START: tl.constexpr):
    """Loads [K, 256] of FP8 pages as BF16, exactly. The last 64 of 512 channels are BF16 there, the others E4M3.

    A code's bits, moved by 4, are a BF16 value of 2^-120 of the code's; the scale is a power of two.
    """
    block, c = tl.arange(0, HALF // 64), tl.arange(0, 64)
    is_code = START // 64 + block < (HEAD_DIM - ROTARY) // 64
    place = START + 64 * block[:, None] + c[None, :]
    mask = valid[:, None, None] & is_code[None, :, None]
    code = tl.load(at[:, None, None] + place[None, :, :], mask=mask, other=0).to(tl.int16)
    scales = scale_at[:, None] + START // 64 + block[None, :]
    scale = tl.load(scales, mask=valid[:, None] & is_code[None, :], other=0).to(tl.int16)
    factor = tl.where(scale == 0, 64, scale << 7).to(tl.bfloat16, bitcast=True)
    bits = ((code & 0x80) << 8) | ((code & 0x7F) << 4)
    up = tl.full((1, 1, 1), BITS_2_120, tl.int16).to(tl.bfloat16, bitcast=True)
    value = bits.to(tl.bfloat16, bitcast=True) * up * factor[:, :, None]
    if START > 0:
        rotary_at = (at + (HEAD_DIM - ROTARY)).to(tl.pointer_type(tl.bfloat16), bitcast=True)
        mask = valid[:, None, None] & (block == HALF // 64 - 1)[None, :, None]
        rotary = tl.load(rotary_at[:, None, None] + (0 * block[:, None] + c[None, :])[None, :, :], mask=mask, other=0.0)
        value = tl.where(is_code[None, :, None], value, rotary)
    return tl.reshape(value, (at.shape[0], HALF))


@triton.jit(do_not_specialize=["num_blocks", "num_listed", "most_entries", "num_heads", "splits", "chunk"])
def attend_kernel(
    q_ptr,
    cos_ptr,
    sin_ptr,
    window_ptr,
    entries_ptr,
    positions_ptr,
    slots_ptr,
    blocks_ptr,
    selected_ptr,
    num_selected_ptr,
    sink_ptr,
    out_ptr,
    sums_ptr,
    stats_ptr,
    row_stride,
    head_stride,
    num_blocks,
    num_listed,
    most_entries,
    num_heads,
    splits,
    chunk,
    score_scale,
    eps,
    N: tl.constexpr,
    RATIO: tl.constexpr,
    BLOCK_BITS: tl.constexpr,
    SPARE: tl.constexpr,
    FP8: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    STEPWISE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Attends with N heads of row t to the keys of split s; writes the result, or sums and (largest, sum) of the split.

    score_scale: softmax scale times log2(e). BLOCK_BITS: log2 of a page's entries. SPARE: rows of a slot's ring beyond
    the window.
    most_entries: that lists or tables have room for.
    """
    n = tl.program_id(0) * N + tl.arange(0, N)
    s, t = tl.program_id(1), tl.program_id(2)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    position = tl.load(positions_ptr + t)
    num_window, num_entries, window_tiles, num_tiles = _row_tiles(position, num_selected_ptr, most_entries, t, RATIO)
    share = _share(num_tiles, splits, chunk)
    first, last = s * share, tl.minimum(s * share + share, num_tiles)
    if first >= num_tiles:
        return
    slot = tl.load(slots_ptr + t)
    ring = slot * (RING + SPARE)
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
    for i in tl.range(first, last, num_stages=STAGES):
        in_window = i < window_tiles
        j = tl.where(in_window, i, i - window_tiles) * TILE + tl.arange(0, TILE)
        valid = j < tl.where(in_window, num_window, num_entries)
        at_ring = j
        if SPARE > 0:
            at_ring = _ring_place(position, j, SPARE)
        row = ring + at_ring
        if RATIO == LISTED:
            listed = tl.load(selected_ptr + t * num_listed + j, mask=valid & (i >= window_tiles), other=0)
            row = tl.where(in_window, row, listed)
        elif RATIO > 0:
            block = tl.load(blocks_ptr + t * num_blocks + (j >> BLOCK_BITS), mask=valid & (i >= window_tiles), other=0)
            row = tl.where(in_window, row, (block << BLOCK_BITS) + (j & ((1 << BLOCK_BITS) - 1)))
        pool = window_ptr
        if RATIO > 0:
            pool = tl.where(in_window, window_ptr, entries_ptr)
        if FP8:
            if SPARE > 0:
                page = tl.where(in_window, slot, row >> BLOCK_BITS)
                place = tl.where(in_window, at_ring, row & ((1 << BLOCK_BITS) - 1))
            else:
                page = row >> tl.where(in_window, RING_BITS, BLOCK_BITS)
                place = row & tl.where(in_window, RING - 1, (1 << BLOCK_BITS) - 1)
            start = page.to(tl.int64) * tl.where(in_window, (RING + SPARE) * KEY_ALL, KEY_ALL << BLOCK_BITS)
            scales = start + tl.where(in_window, (RING + SPARE) * KEY_DATA, KEY_DATA << BLOCK_BITS)
            at = pool + (start + place * KEY_DATA)
            scale_at = pool + (scales + place * (KEY_ALL - KEY_DATA))
            k0 = load_page_keys(at, scale_at, valid, 0)
            k1 = load_page_keys(at, scale_at, valid, HALF)
        else:
            at = pool + row.to(tl.int64) * HEAD_DIM
            k0 = load_keys(at, valid, 0)
            k1 = load_keys(at, valid, HALF)
        scores = tl.dot(q1, tl.trans(k1), tl.dot(q0, tl.trans(k0)))
        scores = tl.where(valid[None, :], scores * score_scale, float("-inf"))
        higher = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        keep = tl.exp2(largest - higher)
        total = total * keep + tl.sum(weights, axis=1)
        p = weights.to(tl.bfloat16)
        o0 = tl.dot(p, k0, o0 * keep[:, None])
        o1 = tl.dot(p, k1, o1 * keep[:, None])
        largest = higher

    inside = n < num_heads
    c, mask = tl.arange(0, HALF), inside[:, None]
    if not IS_SPLIT:
        sink = tl.load(sink_ptr + n, mask=inside, other=0.0) * LOG2E
        factor = (1.0 / (total + tl.exp2(sink - largest)))[:, None]
        at_out = out_ptr + (t.to(tl.int64) * num_heads + n)[:, None] * HEAD_DIM + c[None, :]
        tl.store(at_out, (o0 * factor).to(tl.bfloat16), mask=mask)
        tl.store(at_out + HALF, rotated(o1 * factor, cos_row, sin_row, -1.0).to(tl.bfloat16), mask=mask)
    else:
        split = (t.to(tl.int64) * splits + s) * num_heads + n
        at_sums = sums_ptr + split[:, None] * HEAD_DIM + c[None, :]
        tl.store(at_sums, o0, mask=mask)
        tl.store(at_sums + HALF, o1, mask=mask)
        tl.store(stats_ptr + 2 * split, largest, mask=inside)
        tl.store(stats_ptr + 2 * split + 1, total, mask=inside)


@triton.jit(do_not_specialize=["most_entries", "num_heads", "splits", "chunk"])
def merge_splits_kernel(
    cos_ptr,
    sin_ptr,
    positions_ptr,
    num_selected_ptr,
    sink_ptr,
    sums_ptr,
    stats_ptr,
    out_ptr,
    most_entries,
    num_heads,
    splits,
    chunk,
    RATIO: tl.constexpr,
    PDL: tl.constexpr,
):
    """Merges the splits of one head of one row: weighs their sums, divides, rotates back, rounds."""
    n, t = tl.program_id(0), tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    position = tl.load(positions_ptr + t)
    _, _, _, num_tiles = _row_tiles(position, num_selected_ptr, most_entries, t, RATIO)
    used = tl.cdiv(num_tiles, _share(num_tiles, splits, chunk))
    s = tl.arange(0, MOST_SPLITS)
    first = t.to(tl.int64) * splits * num_heads + n
    split = first + s * num_heads
    largest = tl.load(stats_ptr + 2 * split, mask=s < used, other=float("-inf"))
    total = tl.load(stats_ptr + 2 * split + 1, mask=s < used, other=0.0)
    highest = tl.max(largest, axis=0)
    sink = tl.load(sink_ptr + n) * LOG2E
    divisor = tl.sum(total * tl.exp2(largest - highest), axis=0) + tl.exp2(sink - highest)
    c = tl.arange(0, HALF)
    sums0, sums1 = tl.zeros((HALF,), tl.float32), tl.zeros((HALF,), tl.float32)
    for i in tl.range(0, used, loop_unroll_factor=4):
        at = first + i * num_heads
        weight = tl.exp2(tl.load(stats_ptr + 2 * at) - highest)
        sums0 += weight * tl.load(sums_ptr + at * HEAD_DIM + c)
        sums1 += weight * tl.load(sums_ptr + at * HEAD_DIM + HALF + c)
    factor = 1.0 / divisor
    at_out = out_ptr + (t.to(tl.int64) * num_heads + n) * HEAD_DIM + c
    tl.store(at_out, (sums0 * factor).to(tl.bfloat16))
    cos_row, sin_row = cos_ptr + t * (ROTARY // 2), sin_ptr + t * (ROTARY // 2)
    back = rotated(tl.reshape(sums1 * factor, (1, HALF)), cos_row, sin_row, -1.0)
    tl.store(at_out + HALF, tl.reshape(back, (HALF,)).to(tl.bfloat16))
