"""Device code of a decode step's cache writes; ``launch`` explains and launches it.

t row, p its position, h channel, c channels of a slice, i raw row of an entry (the newest is last); H head dim,
F rotary pairs, RATIO tokens of an entry, WINDOWS windows that it averages.
"""

import triton
import triton.language as tl


@triton.jit
def _power_of_two(amax, LARGEST_BITS: tl.constexpr):
    """Returns the smallest power of two s, at least 2^-126, with amax <= s * largest, and 1 / s; NaN unless finite.

    LARGEST_BITS: of the largest value of the format, as a float32.
    """
    bits = amax.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - (LARGEST_BITS >> 23) + 127
    exponent += ((bits & 0x7FFFFF) > (LARGEST_BITS & 0x7FFFFF)).to(tl.int32)
    exponent = tl.where(bits == 0, 127, tl.maximum(exponent, 1))
    is_finite = bits < 0x7F800000
    scale = tl.where(is_finite, (exponent << 23).to(tl.float32, bitcast=True), float("nan"))
    # 254 - exponent is 0 for 2^127, which no finite amax reaches.
    return scale, ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _round_fp8(x, H: tl.constexpr, F: tl.constexpr):
    """Rounds all but the last 2F channels to E4M3 in blocks of 64 and reads them back: float32 [H]."""
    blocks = tl.reshape(x, (H // 64, 64))
    amax = tl.max(tl.abs(blocks), axis=1)
    # A maximum may pass over a NaN; a sum does not, and zero times an infinity is one.
    poison = tl.sum(blocks * 0.0, axis=1)
    scale, reciprocal = _power_of_two(tl.maximum(amax, 1e-4), 0x43E00000)
    scale += poison
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
def _round_fp4(x, H: tl.constexpr, LOG_H: tl.constexpr):
    """Turns by the Hadamard matrix, rounds to E2M1 in blocks of 32 and reads back: float32 [H]."""
    turned = _hadamard(x, H, LOG_H) * (H**-0.5)
    blocks = tl.reshape(turned.to(tl.bfloat16).to(tl.float32), (H // 32, 32))
    size = tl.abs(blocks)
    poison = tl.sum(blocks * 0.0, axis=1)
    scale, reciprocal = _power_of_two(tl.max(size, axis=1), 0x40C00000)
    scale += poison
    size = size * reciprocal[:, None]
    # One step per midpoint; a tie goes to the even code.
    halves = (size > 0.25).to(tl.float32) + (size >= 0.75).to(tl.float32)
    halves += (size > 1.25).to(tl.float32) + (size >= 1.75).to(tl.float32)
    ones = (size > 2.5).to(tl.float32) + (size >= 3.5).to(tl.float32)
    rounded = (0.5 * halves + ones + 2.0 * (size > 5.0).to(tl.float32)) * scale[:, None]
    # The sign bit, so that -0 stays.
    sign = blocks.to(tl.int32, bitcast=True) & -2147483648
    return tl.reshape((rounded.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True), (H,))


@triton.jit
def _rotate(x, cos_ptr, sin_ptr, H: tl.constexpr, F: tl.constexpr):
    """Rotates the last 2F channels of float32 [H] in pairs; F floats of cos and sin at the pointers."""
    pair = tl.arange(0, H // 2)
    turned = pair >= H // 2 - F
    cos = tl.load(cos_ptr + pair - (H // 2 - F), mask=turned, other=1.0)
    sin = tl.load(sin_ptr + pair - (H // 2 - F), mask=turned, other=0.0)
    even, odd = tl.split(tl.reshape(x, (H // 2, 2)))
    new_even = tl.where(turned, even * cos - odd * sin, even)
    new_odd = tl.where(turned, even * sin + odd * cos, odd)
    return tl.reshape(tl.join(new_even, new_odd), (H,))


@triton.jit
def _write_key(
    x,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    key_ptr,
    eps,
    H: tl.constexpr,
    LOG_H: tl.constexpr,
    F: tl.constexpr,
    ROUNDING: tl.constexpr,
):
    """Norms, rotates, rounds and writes one key [H], rounded to bfloat16 after each."""
    h = tl.arange(0, H)
    x = x.to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, axis=0) / H + eps)
    x = x * tl.load(weight_ptr + h).to(tl.float32)
    x = _rotate(x.to(tl.bfloat16).to(tl.float32), cos_ptr, sin_ptr, H, F)
    if ROUNDING == "fp8":
        x = _round_fp8(x.to(tl.bfloat16).to(tl.float32), H, F)
    if ROUNDING == "fp4":
        x = _round_fp4(x.to(tl.bfloat16).to(tl.float32), H, LOG_H)
    tl.store(key_ptr + h, x.to(tl.bfloat16))


@triton.jit
def _pool(
    raw_ptr,
    ring_ptr,
    ape_ptr,
    p,
    c,
    H: tl.constexpr,
    RATIO: tl.constexpr,
    WINDOWS: tl.constexpr,
):
    """Averages the raw rows of the entry that ends at p, gated, in the channels c of a slice.

    The row of p itself comes from the step, the older ones from the slot's ring; this launch replaces the ring's row
    of p - RATIO * WINDOWS, which is not among them. Rows before position 0 do not exist.
    """
    ROWS: tl.constexpr = RATIO * WINDOWS
    P: tl.constexpr = H * WINDOWS
    i = tl.arange(0, ROWS)
    age = ROWS - 1 - i
    is_old = (age > 0) & (age <= p)
    row = (p - age + ROWS) % ROWS
    # Where windows overlap, the window before gives its first half of the channels, the own one its second.
    column = (i // RATIO)[:, None] * H + c[None, :]
    at = ring_ptr + row[:, None] * (2 * P) + column
    kv = tl.load(at, mask=is_old[:, None], other=0.0)
    score = tl.load(at + P, mask=is_old[:, None], other=float("-inf"))
    own_ptr = raw_ptr + (WINDOWS - 1) * H + c
    is_own = (age == 0)[:, None]
    kv = tl.where(is_own, tl.load(own_ptr)[None, :], kv)
    score = tl.where(is_own, tl.load(own_ptr + P)[None, :], score)
    score += tl.load(ape_ptr + (i % RATIO)[:, None] * P + column)
    gate = tl.exp(score - tl.max(score, axis=0)[None, :])
    return tl.sum(kv * gate, axis=0) / tl.sum(gate, axis=0)


@triton.jit
def _write_entry(
    raw_ptr,
    ring_ptr,
    ape_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    arrivals_ptr,
    p,
    role,
    eps,
    H: tl.constexpr,
    LOG_H: tl.constexpr,
    F: tl.constexpr,
    RATIO: tl.constexpr,
    WINDOWS: tl.constexpr,
    SLICE: tl.constexpr,
    PARTS: tl.constexpr,
    ROUNDING: tl.constexpr,
):
    """Averages an entry and writes it to out. Of several parts each leaves its slices there, and the last to arrive
    finishes the entry and clears the counter."""
    if SLICE == H:
        pooled = _pool(raw_ptr, ring_ptr, ape_ptr, p, tl.arange(0, H), H, RATIO, WINDOWS).to(tl.bfloat16)
        _write_key(pooled, weight_ptr, cos_ptr, sin_ptr, out_ptr, eps, H, LOG_H, F, ROUNDING)
    else:
        for turn in range(H // SLICE // PARTS):
            c = (turn * PARTS + role) * SLICE + tl.arange(0, SLICE)
            piece = _pool(raw_ptr, ring_ptr, ape_ptr, p, c, H, RATIO, WINDOWS)
            tl.store(out_ptr + c, piece.to(tl.bfloat16))
        # All threads' slices are written before one thread announces them.
        tl.debug_barrier()
        arrived = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel", scope="gpu")
        if arrived == PARTS - 1:
            # Other programs wrote it: not from this one's cache.
            whole = tl.load(out_ptr + tl.arange(0, H), cache_modifier=".cg")
            tl.store(arrivals_ptr, 0)
            _write_key(whole, weight_ptr, cos_ptr, sin_ptr, out_ptr, eps, H, LOG_H, F, ROUNDING)


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
    RATIO: tl.constexpr,
    WINDOWS: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    SLICE: tl.constexpr,
    PARTS: tl.constexpr,
    KEYS: tl.constexpr,
    INDEX_KEYS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Plays one of a row's roles: PARTS parts of its main entry, its index entry, and last its key and raw rows.

    RATIO is 0 in a layer without compressors. Several parts leave their pooled slices in the entry's row; the one that
    arrives last finishes it.
    """
    role, t = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    p = tl.load(positions_ptr + t)
    slot = tl.load(slots_ptr + t).to(tl.int64)
    ROWS: tl.constexpr = RATIO * WINDOWS
    if role == tl.num_programs(0) - 1:
        h = tl.arange(0, H)
        key = tl.load(kv_ptr + t * kv_stride + h)
        if RATIO > 0:
            m = tl.arange(0, 2 * WINDOWS * H)
            main = tl.load(main_ptr + t * main_stride + m)
        if HAS_INDEX:
            n = tl.arange(0, 2 * WINDOWS * HI)
            index = tl.load(index_ptr + t * index_stride + n)
        if RATIO > 0:
            row = slot * ROWS + p % ROWS
            tl.store(main_state_ptr + row * (2 * WINDOWS * H) + m, main)
            if HAS_INDEX:
                tl.store(index_state_ptr + row * (2 * WINDOWS * HI) + n, index)
        key_ptr = window_ptr + (slot * WINDOW + p % WINDOW) * H
        _write_key(key, kv_weight_ptr, cos_ptr + t * F, sin_ptr + t * F, key_ptr, kv_eps, H, LOG_H, F, KEYS)
    elif RATIO > 0:  # noqa: SIM102 (decided at compile time: there is no ratio to divide by)
        if (p + 1) % RATIO == 0:
            entry = p // RATIO
            number = entry // PER_BLOCK
            # A row's table holds all its blocks; beyond it is nobody's block.
            block = tl.load(blocks_ptr + t * num_blocks + number, mask=number < num_blocks, other=0).to(tl.int64)
            row = block * PER_BLOCK + entry % PER_BLOCK
            cos_at, sin_at = first_cos_ptr + t * F, first_sin_ptr + t * F
            if role < PARTS:
                raw = main_ptr + t * main_stride
                ring = main_state_ptr + slot * (ROWS * 2 * WINDOWS * H)
                out = main_entries_ptr + row * H
                _write_entry(
                    raw,
                    ring,
                    main_ape_ptr,
                    main_weight_ptr,
                    cos_at,
                    sin_at,
                    out,
                    arrivals_ptr + t,
                    p,
                    role,
                    main_eps,
                    H,
                    LOG_H,
                    F,
                    RATIO,
                    WINDOWS,
                    SLICE,
                    PARTS,
                    KEYS,
                )
            elif HAS_INDEX:
                raw = index_ptr + t * index_stride
                ring = index_state_ptr + slot * (ROWS * 2 * WINDOWS * HI)
                out = index_entries_ptr + row * HI
                _write_entry(
                    raw,
                    ring,
                    index_ape_ptr,
                    index_weight_ptr,
                    cos_at,
                    sin_at,
                    out,
                    arrivals_ptr,
                    p,
                    0,
                    index_eps,
                    HI,
                    LOG_HI,
                    F,
                    RATIO,
                    WINDOWS,
                    HI,
                    1,
                    INDEX_KEYS,
                )
