"""Gluon functions of the warps that bring keys, in attention over chunks on Hopper: a tile at a time to shared memory.

Both kinds of keys end as BF16 rows of a tile, of which each half of the channels has barriers of its own: rows of
``near`` and of BF16 pools by asynchronous copies, codes of FP8 pages through registers, where they become BF16 exactly.
The rows of a tile are looked up a tile ahead; a half's codes are asked for as soon as those before have become BF16.

Legend: K keys of a tile, B blocks of 64 channels, W words of four codes.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

H = tl.constexpr(512)
HALF = tl.constexpr(256)
R = tl.constexpr(64)
TILE = tl.constexpr(64)
BUFFERS = tl.constexpr(2)
WINDOW = tl.constexpr(128)
LISTED = tl.constexpr(4)
LOOK_UP = tl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
"""One row in a thread, twice over."""
PLACES = tl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
PRODUCERS = tl.constexpr(4)
"""Warps that bring keys."""
CODES = tl.constexpr(gl.BlockedLayout([1, 1, 4], [8, 1, 4], [4, 1, 1], [2, 1, 0]))
"""Eight rows of a block in a warp, 16 codes in a thread: stores of 16 bytes meet in no bank."""
KEY_WORDS = tl.constexpr(144)
"""Words of a key in an FP8 page: 112 of codes, 32 of BF16 channels."""
KEY_BYTES = tl.constexpr(576)
PAGE_BYTES = tl.constexpr(584)
"""Bytes that a page has for each of its keys: those of the key, and 8 of scales behind all keys."""


@gluon.jit
def row_facts(t, positions_ptr, places_ptr, requests_ptr, num_selected_ptr, RATIO: tl.constexpr):
    """Loads what ``row_sizes`` needs of row t: asked for a row ahead, because nothing can begin before it is there."""
    position, own = gl.load(positions_ptr + t), gl.load(places_ptr + t)
    more = position
    if RATIO == LISTED:
        more = gl.load(num_selected_ptr + t)
    elif RATIO > 0:
        more = gl.load(requests_ptr + t)
    return position, own, more


@gluon.jit
def row_sizes(t, facts, blocks_ptr, selected_ptr, num_blocks, num_listed, most_entries, RATIO: tl.constexpr):
    """Returns row t's first near key, how many there are, the tiles that they take, its number of entries, and where
    their list or table is."""
    position, own, more = facts
    num_near = gl.minimum(position + 1, WINDOW)
    num_entries, lists = 0, selected_ptr
    if RATIO == LISTED:
        num_entries = gl.minimum(more, most_entries)
        lists = selected_ptr + t.to(gl.int64) * num_listed
    elif RATIO > 0:
        num_entries = gl.minimum((position + 1) // RATIO, most_entries)
        lists = blocks_ptr + more.to(gl.int64) * num_blocks
    return own + 1 - num_near, num_near, (num_near + TILE - 1) // TILE, num_entries, lists


@gluon.jit
def _entry_rows(e, num_entries, lists, RATIO: tl.constexpr, BLOCK_BITS: tl.constexpr):
    """Returns the pool's rows of entries e; -1 where there is none."""
    valid = (e >= 0) & (e < num_entries)
    if RATIO == LISTED:
        row = gl.load(lists + e, mask=valid, other=-1)
    else:
        block = gl.load(lists + (e >> BLOCK_BITS), mask=valid, other=0)
        row = gl.where(valid, (block << BLOCK_BITS) + (e & ((1 << BLOCK_BITS) - 1)), -1)
    return row


@gluon.jit
def _tile_rows(
    i, near_tiles, first, num_near, num_entries, lists, RATIO: tl.constexpr, BLOCK_BITS: tl.constexpr
):  # fmt: skip
    """Returns the row of each key of tile i, of near or of the pool, one in a thread; -1 where there is none."""
    j = i * TILE + gl.arange(0, TILE, LOOK_UP)
    found = _entry_rows(j - near_tiles * TILE, num_entries, lists, RATIO, BLOCK_BITS)
    return gl.where(i < near_tiles, gl.where(j < num_near, first + j, -1), found)


@gluon.jit
def copy_rows(row, source, buffer, COPY: tl.constexpr):
    """Starts the copies of a tile; keys that are not there become zeros."""
    c = gl.arange(0, H, gl.SliceLayout(0, COPY))
    at = source + gl.maximum(row, 0).to(gl.int64) * H
    async_copy.async_copy_global_to_shared(buffer, at[:, None] + c[None, :], mask=(row >= 0)[:, None])


@gluon.jit
def next_buffer(turn, phase):
    """Returns the next buffer, and the phase of its barriers."""
    return BUFFERS - 1 - turn, gl.where(turn == BUFFERS - 1, phase ^ 1, phase)


@gluon.jit
def _copy_half(row, source, buffer):
    """Starts the copies of half of a tile's channels, of which ``source`` is the first; keys that are not there become
    zeros."""
    COPY: tl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [PRODUCERS, 1], [1, 0])
    c = gl.arange(0, HALF, gl.SliceLayout(0, COPY))
    at = source + gl.maximum(row, 0).to(gl.int64) * H
    async_copy.async_copy_global_to_shared(buffer, at[:, None] + c[None, :], mask=(row >= 0)[:, None])


@gluon.jit
def copy_near(i, sizes, near_ptr, low, high, full, empty, turn, phase, FP8: tl.constexpr):
    """Brings the i-th tile of near keys; returns the next buffer and its phase."""
    COPY: tl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [PRODUCERS, 1], [1, 0])
    first, num_near, _, _, _ = sizes
    j = i * TILE + gl.arange(0, TILE, gl.SliceLayout(1, COPY))
    row = gl.where(j < num_near, first + j, -1)
    mbarrier.wait(empty.index(2 * turn), phase)
    _copy_half(row, near_ptr, low.index(turn))
    async_copy.mbarrier_arrive(full.index(2 * turn), increment_count=False)
    if FP8:
        mbarrier.arrive(full.index(2 * turn), count=1)
    mbarrier.wait(empty.index(2 * turn + 1), phase)
    _copy_half(row, near_ptr + HALF, high.index(turn))
    async_copy.mbarrier_arrive(full.index(2 * turn + 1), increment_count=False)
    if FP8:
        mbarrier.arrive(full.index(2 * turn + 1), count=1)
    return next_buffer(turn, phase)


@gluon.jit
def copy_keys(
    sizes, near_ptr, entries_ptr, low, high, full, empty, places, turn, phase,
    RATIO: tl.constexpr, BLOCK_BITS: tl.constexpr,
):  # fmt: skip
    """Brings a row's tiles of BF16 keys, from the second on; returns the next buffer and its phase."""
    COPY: tl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [PRODUCERS, 1], [1, 0])
    first, num_near, near_tiles, num_entries, lists = sizes
    row = _tile_rows(1, near_tiles, first, num_near, num_entries, lists, RATIO, BLOCK_BITS)
    for i in range(1, near_tiles + (num_entries + TILE - 1) // TILE):
        places.index(turn).store(row)
        row = _tile_rows(i + 1, near_tiles, first, num_near, num_entries, lists, RATIO, BLOCK_BITS)
        source = entries_ptr
        if i < near_tiles:
            source = near_ptr
        mbarrier.wait(empty.index(2 * turn), phase)
        _copy_half(places.index(turn).load(gl.SliceLayout(1, COPY)), source, low.index(turn))
        async_copy.mbarrier_arrive(full.index(2 * turn), increment_count=False)
        mbarrier.wait(empty.index(2 * turn + 1), phase)
        _copy_half(places.index(turn).load(gl.SliceLayout(1, COPY)), source + HALF, high.index(turn))
        async_copy.mbarrier_arrive(full.index(2 * turn + 1), increment_count=False)
        turn, phase = next_buffer(turn, phase)
    return turn, phase


@gluon.jit
def _load_codes(rows, entries_ptr, FIRST: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_BITS: tl.constexpr):
    """Loads words int32 [K, B, W] of blocks of 64 codes, from block FIRST on, of a tile of entries. Where there is no
    entry they are some other's, of which ``_load_scales`` makes next to nothing."""
    row = rows.load(gl.SliceLayout(1, gl.SliceLayout(2, CODES)))
    row = gl.maximum(row, 0)
    at = (row >> BLOCK_BITS).to(gl.int64) * ((PAGE_BYTES // 4) << BLOCK_BITS) + (
        row & ((1 << BLOCK_BITS) - 1)
    ) * KEY_WORDS
    b = FIRST + gl.arange(0, BLOCKS, gl.SliceLayout(0, gl.SliceLayout(2, CODES)))
    w = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, CODES)))
    at = gl.expand_dims(at[:, None] + (b * 16)[None, :], 2) + gl.expand_dims(w[None, :], 1)
    return gl.load(entries_ptr.to(gl.pointer_type(gl.int32), bitcast=True) + at)


@gluon.jit
def _load_scales(rows, entries_ptr, BLOCK_BITS: tl.constexpr):
    """Loads the eight bytes of an entry's scales, a block of 64 codes each, int64 [K]; zeros where there is none."""
    row = rows.load(gl.SliceLayout(1, gl.SliceLayout(2, CODES)))
    there, row = row >= 0, gl.maximum(row, 0)
    at = (row >> BLOCK_BITS).to(gl.int64) * ((PAGE_BYTES // 8) << BLOCK_BITS) + ((KEY_BYTES // 8) << BLOCK_BITS)
    at += row & ((1 << BLOCK_BITS) - 1)
    return gl.load(entries_ptr.to(gl.pointer_type(gl.int64), bitcast=True) + at, mask=there, other=0)


@gluon.jit
def _store_codes(words, scales, buffer, FIRST: tl.constexpr, BLOCKS: tl.constexpr):
    """Stores blocks of 64 codes as BF16, two to a word. scales: a byte of each block from 0 on, int32 [K].

    A code's bits with its sign in front, moved by 4, are a BF16 number of 2^-120 of its value. The scale is a power of
    two, of which byte 0 is 2^-127; beyond 2^7, which no normed key reaches, keys become infinite.
    """
    b = FIRST + gl.arange(0, BLOCKS, gl.SliceLayout(0, gl.SliceLayout(2, CODES)))
    factor = (scales[:, None] >> (8 * b)[None, :]) & 255
    # 2^120 times the scale, infinite where that is beyond BF16.
    factor = gl.minimum(factor + 120, 255) << 7
    low, high = gl.inline_asm_elementwise(
        """{
        .reg .b32 a, b;
        prmt.b32 a, $2, 0, 0x9180;
        prmt.b32 b, $2, 0, 0xB3A2;
        shl.b32 a, a, 4;
        shl.b32 b, b, 4;
        and.b32 a, a, 0x87F087F0;
        and.b32 b, b, 0x87F087F0;
        mul.rn.bf16x2 $0, a, $3;
        mul.rn.bf16x2 $1, b, $3;
        }""",
        "=&r,=&r,r,r",
        [words, gl.expand_dims(factor | (factor << 16), 2)],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )
    buffer.slice(FIRST * 32, BLOCKS * 32, dim=1).store(gl.reshape(gl.join(low, high), (TILE, BLOCKS * 32)))


@gluon.jit
def _copy_rotary(rows, entries_ptr, buffer, BLOCK_BITS: tl.constexpr):
    """Starts the copies of the BF16 channels of a tile of entries."""
    ROTARY: tl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [PRODUCERS, 1], [1, 0])
    row = rows.load(gl.SliceLayout(1, ROTARY))
    there, row = row >= 0, gl.maximum(row, 0)
    block, place = (row >> BLOCK_BITS).to(gl.int64), row & ((1 << BLOCK_BITS) - 1)
    r = gl.arange(0, R, gl.SliceLayout(0, ROTARY))
    at = block * ((PAGE_BYTES // 2) << BLOCK_BITS) + place * (KEY_BYTES // 2) + (H - R) // 2
    source = entries_ptr.to(gl.pointer_type(gl.bfloat16), bitcast=True) + at
    async_copy.async_copy_global_to_shared(
        buffer.slice(HALF - R, R, dim=1), source[:, None] + r[None, :], mask=there[:, None]
    )


@gluon.jit
def decode_keys(
    sizes, near_ptr, entries_ptr, low, high, full, empty, places, turn, phase,
    RATIO: tl.constexpr, BLOCK_BITS: tl.constexpr,
):  # fmt: skip
    """Brings a row's tiles of near keys, from the second on, and of entries in FP8 pages; returns the next buffer and
    its phase. Rows are looked up two tiles ahead, codes loaded one."""
    WORDS: tl.constexpr = gl.NVMMASharedLayout(128, 32, 2)
    _, _, near_tiles, num_entries, lists = sizes
    for i in range(1, near_tiles):
        turn, phase = copy_near(i, sizes, near_ptr, low, high, full, empty, turn, phase, True)
    e = gl.arange(0, TILE, LOOK_UP)
    rows = places.index(turn)
    rows.store(_entry_rows(e, num_entries, lists, RATIO, BLOCK_BITS))
    ahead = _entry_rows(TILE + e, num_entries, lists, RATIO, BLOCK_BITS)
    scales = _load_scales(rows, entries_ptr, BLOCK_BITS)
    words0 = _load_codes(rows, entries_ptr, 0, 4, BLOCK_BITS)
    words1 = _load_codes(rows, entries_ptr, 4, 2, BLOCK_BITS)
    words2 = _load_codes(rows, entries_ptr, 6, 1, BLOCK_BITS)
    for i in range((num_entries + TILE - 1) // TILE):
        then, then_phase = next_buffer(turn, phase)
        then_rows = places.index(then)
        then_rows.store(ahead)
        mbarrier.wait(empty.index(2 * turn), phase)
        # Half of a tile has no copies of its own here; each thread arrives as if it had.
        async_copy.mbarrier_arrive(full.index(2 * turn), increment_count=False)
        as_words = low.index(turn)._reinterpret(gl.int32, [TILE, HALF // 2], WORDS)
        _store_codes(words0, scales.to(gl.int32), as_words, 0, 4)
        scales_high = (scales >> 32).to(gl.int32)
        gl.thread_barrier()
        mbarrier.arrive(full.index(2 * turn), count=1)
        scales = _load_scales(then_rows, entries_ptr, BLOCK_BITS)
        words0 = _load_codes(then_rows, entries_ptr, 0, 4, BLOCK_BITS)
        mbarrier.wait(empty.index(2 * turn + 1), phase)
        buffer = high.index(turn)
        _copy_rotary(places.index(turn), entries_ptr, buffer, BLOCK_BITS)
        async_copy.mbarrier_arrive(full.index(2 * turn + 1), increment_count=False)
        as_words = buffer._reinterpret(gl.int32, [TILE, HALF // 2], WORDS)
        _store_codes(words1, scales_high, as_words, 0, 2)
        _store_codes(words2, scales_high, as_words, 2, 1)
        gl.thread_barrier()
        mbarrier.arrive(full.index(2 * turn + 1), count=1)
        words1 = _load_codes(then_rows, entries_ptr, 4, 2, BLOCK_BITS)
        words2 = _load_codes(then_rows, entries_ptr, 6, 1, BLOCK_BITS)
        ahead = _entry_rows((i + 2) * TILE + e, num_entries, lists, RATIO, BLOCK_BITS)
        turn, phase = then, then_phase
    return turn, phase
