"""Device code of a decode step's cache writes; ``launch`` explains and launches it.

t row, p its position, h channel, c channels of a slice; H head dim, F rotary pairs, RATIO tokens of an entry, WINDOWS
windows that it averages, SPARE rows of a ring beyond what one row of a request needs, OWN the most rows that a row of
the step may be behind another one of its request and of an entry.
"""

import triton
import triton.language as tl

from ownpath.kernels.entries.pool import average, load_rows

VALUES = tl.constexpr(0)
"""A pool of bfloat16 rows."""
KEY_PAGES = tl.constexpr(1)
"""Pages of R keys: R * 576 bytes, of each key 448 E4M3 and 64 BF16; then R * 8 bytes, 7 E8M0 of each and a pad."""
INDEX_PAGES = tl.constexpr(2)
"""Pages of R keys: R * H bytes of E4M3; then a float32 scale of each."""
FP4_INDEX_PAGES = tl.constexpr(3)
"""Pages of R keys: R * H / 2 bytes of E2M1, two to a byte; then of each H / 32 E8M0 scales."""


@triton.jit
def _power_of_two(amax, LARGEST_BITS: tl.constexpr):
    """Returns the smallest power of two s, at least 2^-126, with amax <= s * largest: its E8M0 byte (255: not finite),
    itself (NaN then), and 1 / s.

    LARGEST_BITS: of the largest value of the format, as a float32.
    """
    bits = amax.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # a NaN may have a sign
    exponent = (bits >> 23) - (LARGEST_BITS >> 23) + 127
    exponent += ((bits & 0x7FFFFF) > (LARGEST_BITS & 0x7FFFFF)).to(tl.int32)
    exponent = tl.where(bits == 0, 127, tl.maximum(exponent, 1))
    # 254 - exponent is 0 for 2^127, which no finite amax reaches.
    reciprocal = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    byte = tl.where(bits < 0x7F800000, exponent, 255)
    return byte, tl.where(byte == 255, float("nan"), (exponent << 23).to(tl.float32, bitcast=True)), reciprocal


@triton.jit
def _largest(blocks):
    """Returns the largest magnitude of each row; NaN where a row has one, which a maximum may pass over."""
    return tl.max(tl.abs(blocks), axis=1) + tl.sum(blocks * 0.0, axis=1)


@triton.jit
def _floored(amax):
    """Returns at least 1e-4, the floor of DeepSeek's FP8 quantiser; NaN stays NaN."""
    return tl.where(amax < 1e-4, 1e-4, amax)


@triton.jit
def round_fp8(x, H: tl.constexpr, F: tl.constexpr):
    """Rounds all but the last 2F channels to E4M3 in blocks of 64 and reads them back: float32 [H]."""
    blocks = tl.reshape(x, (H // 64, 64))
    _, scale, reciprocal = _power_of_two(_floored(_largest(blocks)), 0x43E00000)
    rounded = (blocks * reciprocal[:, None]).to(tl.float8e4nv).to(tl.float32) * scale[:, None]
    is_plain = tl.arange(0, H // 64) < (H - 2 * F) // 64
    return tl.reshape(tl.where(is_plain[:, None], rounded, blocks), (H,))


@triton.jit
def _hadamard(x, H: tl.constexpr, LOG_H: tl.constexpr):
    """Multiplies float32 [H] by the H x H Hadamard matrix. Each stage adds and subtracts by the lowest bit of the
    index and moves that bit to the top, so that after all of them the order is the first one's."""
    for _ in tl.static_range(LOG_H):
        even, odd = tl.split(tl.reshape(x, (H // 2, 2)))
        x = tl.reshape(tl.trans(tl.join(even + odd, even - odd)), (H,))
    return x


@triton.jit
def _count_fp4_steps(size):
    """Counts the middles between neighbouring E2M1 magnitudes that a size has passed, by the step behind them: of 0.5,
    of 1 and of 2. A tie goes to the even code, which is the sum of all."""
    halves = (size > 0.25).to(tl.float32) + (size >= 0.75).to(tl.float32)
    halves += (size > 1.25).to(tl.float32) + (size >= 1.75).to(tl.float32)
    ones = (size > 2.5).to(tl.float32) + (size >= 3.5).to(tl.float32)
    return halves, ones, (size > 5.0).to(tl.float32)


@triton.jit
def _round_fp4(x, H: tl.constexpr, LOG_H: tl.constexpr):
    """Turns by the Hadamard matrix, rounds to E2M1 in blocks of 32 and reads back: float32 [H]."""
    turned = _hadamard(x, H, LOG_H) * (H**-0.5)
    blocks = tl.reshape(turned.to(tl.bfloat16).to(tl.float32), (H // 32, 32))
    _, scale, reciprocal = _power_of_two(_largest(blocks), 0x40C00000)
    size = tl.abs(blocks) * reciprocal[:, None]
    halves, ones, twos = _count_fp4_steps(size)
    rounded = (0.5 * halves + ones + 2.0 * twos) * scale[:, None]
    # The sign bit, so that -0 stays.
    sign = blocks.to(tl.int32, bitcast=True) & -2147483648
    return tl.reshape((rounded.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True), (H,))


@triton.jit
def _load_turn(cos_ptr, sin_ptr, H: tl.constexpr, F: tl.constexpr):
    """Loads cos and sin [H / 2] of the pairs of a key; 1 and 0 for those that are not rotated."""
    pair = tl.arange(0, H // 2)
    turned = pair >= H // 2 - F
    cos = tl.load(cos_ptr + pair - (H // 2 - F), mask=turned, other=1.0)
    return cos, tl.load(sin_ptr + pair - (H // 2 - F), mask=turned, other=0.0)


@triton.jit
def _rotate(x, cos, sin, H: tl.constexpr, F: tl.constexpr):
    """Rotates the last 2F channels of float32 [H] in pairs."""
    turned = tl.arange(0, H // 2) >= H // 2 - F
    even, odd = tl.split(tl.reshape(x, (H // 2, 2)))
    new_even = tl.where(turned, even * cos - odd * sin, even)
    new_odd = tl.where(turned, even * sin + odd * cos, odd)
    return tl.reshape(tl.join(new_even, new_odd), (H,))


@triton.jit
def store_key_page(x, page_ptr, row, H: tl.constexpr, F: tl.constexpr, R: tl.constexpr):
    """Writes a key to its row of a page of R keys: blocks of 64 channels in E4M3 with a power-of-two scale, the last
    2F channels in bfloat16."""
    PLAIN: tl.constexpr = H - 2 * F
    WIDTH: tl.constexpr = PLAIN + 4 * F
    b, j = tl.arange(0, H // 64), tl.arange(0, 64)
    blocks = tl.reshape(x, (H // 64, 64))
    byte, _, reciprocal = _power_of_two(_floored(_largest(blocks)), 0x43E00000)
    codes = (blocks * reciprocal[:, None]).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    is_plain = b < PLAIN // 64
    channel = b[:, None] * 64 + j[None, :]
    key_ptr = page_ptr + row * WIDTH
    tl.store(key_ptr + channel, codes, mask=is_plain[:, None])
    rotary_ptr = (key_ptr + PLAIN).to(tl.pointer_type(tl.bfloat16), bitcast=True)
    tl.store(rotary_ptr + (channel - PLAIN), blocks.to(tl.bfloat16), mask=~is_plain[:, None])
    tl.store(page_ptr + R * WIDTH + row * 8 + b, tl.where(is_plain, byte, 0).to(tl.uint8))


@triton.jit
def _store_index_page(x, page_ptr, row, H: tl.constexpr, R: tl.constexpr):
    """Writes an index key to its row of a page of R keys: E4M3 with one power-of-two scale. Exact for a key that was
    rounded to E2M1, unless the scales of its blocks span more than 2^14."""
    h = tl.arange(0, H)
    _, scale, reciprocal = _power_of_two(_largest(x[None, :]), 0x43E00000)
    codes = (x[None, :] * reciprocal[:, None]).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    tl.store(page_ptr + row * H + h[None, :], codes)
    scale_ptr = (page_ptr + R * H).to(tl.pointer_type(tl.float32), bitcast=True)
    tl.store(scale_ptr + row + tl.arange(0, 1), scale)


@triton.jit
def _store_fp4_index_page(x, page_ptr, row, H: tl.constexpr, R: tl.constexpr):
    """Writes an index key to its row of a page of R keys: E2M1 in blocks of 32 channels with a power-of-two scale, an
    even channel in the low half of a byte. Exact for a key that was rounded so."""
    blocks = tl.reshape(x, (H // 32, 32))
    byte, _, reciprocal = _power_of_two(_largest(blocks), 0x40C00000)
    halves, ones, twos = _count_fp4_steps(tl.abs(blocks) * reciprocal[:, None])
    sign = (blocks.to(tl.int32, bitcast=True) >> 28) & 8
    codes = (halves + ones + twos).to(tl.int32) | sign
    even, odd = tl.split(tl.reshape(codes, (H // 2, 2)))
    tl.store(page_ptr + row * (H // 2) + tl.arange(0, H // 2), (even | (odd << 4)).to(tl.uint8))
    scale_ptr = page_ptr + R * (H // 2) + row * (H // 32)
    tl.store(scale_ptr + tl.arange(0, H // 32), byte.to(tl.uint8))


@triton.jit
def _write_key(
    x,
    weight,
    cos,
    sin,
    pool_ptr,
    page,
    row,
    eps,
    H: tl.constexpr,
    LOG_H: tl.constexpr,
    F: tl.constexpr,
    R: tl.constexpr,
    FORM: tl.constexpr,
    ROUNDING: tl.constexpr,
):
    """Norms, rotates and rounds one key [H], to bfloat16 after each, and writes it to its row of a page of R keys."""
    h = tl.arange(0, H)
    x = x.to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, axis=0) / H + eps) * weight.to(tl.float32)
    x = _rotate(x.to(tl.bfloat16).to(tl.float32), cos, sin, H, F).to(tl.bfloat16).to(tl.float32)
    if ROUNDING == "fp4":
        x = _round_fp4(x, H, LOG_H)
    if FORM == KEY_PAGES:
        store_key_page(x, pool_ptr + page * (R * (H + 2 * F + 8)), row, H, F, R)
    elif FORM == INDEX_PAGES:
        _store_index_page(x, pool_ptr + page * (R * (H + 4)), row, H, R)
    elif FORM == FP4_INDEX_PAGES:
        _store_fp4_index_page(x, pool_ptr + page * (R * (H // 2 + H // 32)), row, H, R)
    else:
        if ROUNDING == "fp8":
            x = round_fp8(x, H, F)
        tl.store(pool_ptr + (page * R + row) * H + h, x.to(tl.bfloat16))


@triton.jit
def write_entry(
    raw_ptr,
    raw_stride,
    ring_ptr,
    ape_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    slots_ptr,
    pool_ptr,
    pooled_ptr,
    arrivals_ptr,
    t,
    p,
    page,
    row,
    role,
    eps,
    H: tl.constexpr,
    LOG_H: tl.constexpr,
    F: tl.constexpr,
    RATIO: tl.constexpr,
    WINDOWS: tl.constexpr,
    SPARE: tl.constexpr,
    OWN: tl.constexpr,
    SLICE: tl.constexpr,
    PARTS: tl.constexpr,
    R: tl.constexpr,
    FORM: tl.constexpr,
    ROUNDING: tl.constexpr,
):
    """Averages an entry and writes it to its row of a page of R. Of several parts each leaves its slices in pooled; the
    last to arrive finishes the entry and clears the counter."""
    h = tl.arange(0, H)
    if SLICE == H:
        # All loads are in flight before the first sum waits for one.
        # fmt: off
        kv, score = load_rows(
            raw_ptr, raw_stride, ring_ptr, ape_ptr, positions_ptr, slots_ptr, t, p, h, H, RATIO, WINDOWS, SPARE,
            OWN,
        )
        # fmt: on
        weight = tl.load(weight_ptr + h)
        cos, sin = _load_turn(cos_ptr, sin_ptr, H, F)
        pooled = average(kv, score).to(tl.bfloat16)
        _write_key(pooled, weight, cos, sin, pool_ptr, page, row, eps, H, LOG_H, F, R, FORM, ROUNDING)
    else:
        weight = tl.load(weight_ptr + h)
        cos, sin = _load_turn(cos_ptr, sin_ptr, H, F)
        for turn in range(H // SLICE // PARTS):
            c = (turn * PARTS + role) * SLICE + tl.arange(0, SLICE)
            # fmt: off
            kv, score = load_rows(
                raw_ptr, raw_stride, ring_ptr, ape_ptr, positions_ptr, slots_ptr, t, p, c, H, RATIO, WINDOWS, SPARE,
                OWN,
            )
            # fmt: on
            tl.store(pooled_ptr + c, average(kv, score).to(tl.bfloat16))
        # All threads' slices are written before one thread announces them.
        tl.debug_barrier()
        arrived = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel", scope="gpu")
        if arrived == PARTS - 1:
            # Other programs wrote it: not from this one's cache.
            whole = tl.load(pooled_ptr + h, cache_modifier=".cg")
            tl.store(arrivals_ptr, 0)
            _write_key(whole, weight, cos, sin, pool_ptr, page, row, eps, H, LOG_H, F, R, FORM, ROUNDING)


@triton.jit
def entries_kernel(
    kv_ptr,
    main_ptr,
    index_ptr,
    cos_ptr,
    sin_ptr,
    first_cos_ptr,
    first_sin_ptr,
    positions_ptr,
    slots_ptr,
    blocks_ptr,
    window_ptr,
    main_state_ptr,
    main_entries_ptr,
    index_state_ptr,
    index_entries_ptr,
    kv_weight_ptr,
    main_weight_ptr,
    main_ape_ptr,
    index_weight_ptr,
    index_ape_ptr,
    pooled_ptr,
    arrivals_ptr,
    kv_stride,
    main_stride,
    index_stride,
    num_blocks,
    kv_eps,
    main_eps,
    index_eps,
    H: tl.constexpr,
    LOG_H: tl.constexpr,
    HI: tl.constexpr,
    LOG_HI: tl.constexpr,
    F: tl.constexpr,
    WINDOW: tl.constexpr,
    SPARE: tl.constexpr,
    RATIO: tl.constexpr,
    WINDOWS: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    SLICE: tl.constexpr,
    PARTS: tl.constexpr,
    FORM: tl.constexpr,
    KEYS: tl.constexpr,
    INDEX_FORM: tl.constexpr,
    INDEX_KEYS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Plays one of a row's roles: PARTS parts of its main entry, its index entry, and last its key and raw rows.

    WINDOW: rows of a slot's ring of keys, SPARE of them beyond the window. RATIO is 0 in a layer without compressors.
    """
    role, t = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    p = tl.load(positions_ptr + t)
    slot = tl.load(slots_ptr + t).to(tl.int64)
    ROWS: tl.constexpr = RATIO * WINDOWS + SPARE
    if role == tl.num_programs(0) - 1:
        h = tl.arange(0, H)
        key = tl.load(kv_ptr + t * kv_stride + h)
        weight = tl.load(kv_weight_ptr + h)
        cos, sin = _load_turn(cos_ptr + t * F, sin_ptr + t * F, H, F)
        if RATIO > 0:
            m = tl.arange(0, 2 * WINDOWS * H)
            main = tl.load(main_ptr + t * main_stride + m)
        if HAS_INDEX:
            n = tl.arange(0, 2 * WINDOWS * HI)
            index = tl.load(index_ptr + t * index_stride + n)
        if RATIO > 0:
            at = slot * ROWS + p % ROWS
            tl.store(main_state_ptr + at * (2 * WINDOWS * H) + m, main)
            if HAS_INDEX:
                tl.store(index_state_ptr + at * (2 * WINDOWS * HI) + n, index)
        ring_row = p % WINDOW
        _write_key(key, weight, cos, sin, window_ptr, slot, ring_row, kv_eps, H, LOG_H, F, WINDOW, FORM, KEYS)
    elif RATIO > 0:  # noqa: SIM102 (decided at compile time: there is no ratio to divide by)
        if (p + 1) % RATIO == 0:
            entry = p // RATIO
            number, row = entry // PER_BLOCK, entry % PER_BLOCK
            # A row's table holds all its blocks; beyond it is nobody's block.
            block = tl.load(blocks_ptr + t * num_blocks + number, mask=number < num_blocks, other=0).to(tl.int64)
            cos_first, sin_first = first_cos_ptr + t * F, first_sin_ptr + t * F
            if role < PARTS:
                raw = main_ptr + t * main_stride
                ring = main_state_ptr + slot * (ROWS * 2 * WINDOWS * H)
                # fmt: off
                write_entry(
                    raw, main_stride, ring, main_ape_ptr, main_weight_ptr, cos_first, sin_first, positions_ptr,
                    slots_ptr, main_entries_ptr, pooled_ptr + t * H, arrivals_ptr + t, t, p, block, row, role, main_eps,
                    H, LOG_H, F, RATIO, WINDOWS, SPARE, SPARE, SLICE, PARTS, PER_BLOCK, FORM, KEYS,
                )
                # fmt: on
            elif HAS_INDEX:
                raw = index_ptr + t * index_stride
                ring = index_state_ptr + slot * (ROWS * 2 * WINDOWS * HI)
                # fmt: off
                write_entry(
                    raw, index_stride, ring, index_ape_ptr, index_weight_ptr, cos_first, sin_first, positions_ptr,
                    slots_ptr, index_entries_ptr, pooled_ptr, arrivals_ptr, t, p, block, row, role, index_eps,
                    HI, LOG_HI, F, RATIO, WINDOWS, SPARE, SPARE, HI, 1, PER_BLOCK, INDEX_FORM, INDEX_KEYS,
                )
                # fmt: on
