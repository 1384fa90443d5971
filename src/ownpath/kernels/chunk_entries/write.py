"""Device code of what a step with chunks writes before it attends; ``launch`` explains and launches it.

e row that ends a window, t row, p its position, w near key, h channel; H head dim, F rotary pairs, RATIO tokens of an
entry, WINDOWS windows that it averages, SPARE rows of a ring beyond what one row of a request needs.
"""

import triton
import triton.language as tl

from ownpath.kernels.entries.write import KEY_PAGES, round_fp8, store_key_page, write_entry


@triton.jit
def _load_page(page_ptr, row, H: tl.constexpr, F: tl.constexpr, R: tl.constexpr):
    """Loads a key from its row of a page of R keys: float32 [H]."""
    PLAIN: tl.constexpr = H - 2 * F
    WIDTH: tl.constexpr = PLAIN + 4 * F
    b, j = tl.arange(0, H // 64), tl.arange(0, 64)
    channel = b[:, None] * 64 + j[None, :]
    is_plain = b < PLAIN // 64
    key_ptr = page_ptr + row * WIDTH
    codes = tl.load(key_ptr + channel, mask=is_plain[:, None], other=0)
    rotary_ptr = (key_ptr + PLAIN).to(tl.pointer_type(tl.bfloat16), bitcast=True)
    rotary = tl.load(rotary_ptr + (channel - PLAIN), mask=~is_plain[:, None], other=0.0).to(tl.float32)
    byte = tl.load(page_ptr + R * WIDTH + row * 8 + b, mask=is_plain, other=0).to(tl.int32)
    # 2^-127, the scale of byte 0, has a subnormal's bits.
    bits = tl.where(byte == 0, 0x400000, byte << 23)
    scale = tl.where(byte == 255, float("nan"), bits.to(tl.float32, bitcast=True))
    plain = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32) * scale[:, None]
    return tl.reshape(tl.where(is_plain[:, None], plain, rotary), (H,))


@triton.jit
def _write_near(
    kv_ptr,
    kv_stride,
    source,
    window_ptr,
    near_ptr,
    H: tl.constexpr,
    F: tl.constexpr,
    R: tl.constexpr,
    FORM: tl.constexpr,
):
    """Writes a near key: a row of the step, as it will be read, or one of the window's pool."""
    h = tl.arange(0, H)
    if source >= 0:
        key = tl.load(kv_ptr + source * kv_stride + h)
        if FORM == KEY_PAGES:
            key = round_fp8(key.to(tl.float32), H, F).to(tl.bfloat16)
        tl.store(near_ptr + h, key)
    else:
        older = -1 - source
        if FORM == KEY_PAGES:
            page_ptr = window_ptr + older // R * (R * (H + 2 * F + 8))
            tl.store(near_ptr + h, _load_page(page_ptr, older % R, H, F, R).to(tl.bfloat16))
        else:
            tl.store(near_ptr + h, tl.load(window_ptr + older * H + h))


@triton.jit(do_not_specialize=["num_ends", "num_blocks"])
def chunk_entries_kernel(
    kv_ptr,
    main_ptr,
    index_ptr,
    ends_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    requests_ptr,
    slots_ptr,
    blocks_ptr,
    sources_ptr,
    window_ptr,
    main_state_ptr,
    main_entries_ptr,
    index_state_ptr,
    index_entries_ptr,
    near_ptr,
    pooled_ptr,
    arrivals_ptr,
    main_weight_ptr,
    main_ape_ptr,
    index_weight_ptr,
    index_ape_ptr,
    kv_stride,
    main_stride,
    index_stride,
    num_blocks,
    num_ends,
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
):
    """Writes a part of a main entry, or an index entry, or, behind all of these, a near key. An end of -1 is none.

    WINDOW: rows of a slot's ring of keys. RATIO is 0 in a layer without compressors.
    """
    ROLES: tl.constexpr = PARTS + HAS_INDEX
    ROWS: tl.constexpr = RATIO * WINDOWS + SPARE
    OWN: tl.constexpr = RATIO * WINDOWS - 1
    number = tl.program_id(0)
    if number >= num_ends * ROLES:
        w = number - num_ends * ROLES
        source = tl.load(sources_ptr + w).to(tl.int64)
        _write_near(kv_ptr, kv_stride, source, window_ptr, near_ptr + w.to(tl.int64) * H, H, F, WINDOW, FORM)
    elif RATIO > 0:
        e, role = (number // ROLES).to(tl.int64), number % ROLES
        t = tl.load(ends_ptr + e).to(tl.int64)
        if t >= 0:
            p, request = tl.load(positions_ptr + t), tl.load(requests_ptr + t).to(tl.int64)
            slot = tl.load(slots_ptr + request).to(tl.int64)
            entry = p // RATIO
            row = entry % PER_BLOCK
            block = tl.load(blocks_ptr + request * num_blocks + entry // PER_BLOCK).to(tl.int64)
            cos, sin = cos_ptr + e * F, sin_ptr + e * F
            if role < PARTS:
                raw = main_ptr + t * main_stride
                ring = main_state_ptr + slot * (ROWS * 2 * WINDOWS * H)
                # fmt: off
                write_entry(
                    raw, main_stride, ring, main_ape_ptr, main_weight_ptr, cos, sin, positions_ptr, requests_ptr,
                    main_entries_ptr, pooled_ptr + e * H, arrivals_ptr + e, t, p, block, row, role, main_eps,
                    H, LOG_H, F, RATIO, WINDOWS, SPARE, OWN, SLICE, PARTS, PER_BLOCK, FORM, KEYS,
                )
                # fmt: on
            elif HAS_INDEX:
                raw = index_ptr + t * index_stride
                ring = index_state_ptr + slot * (ROWS * 2 * WINDOWS * HI)
                # fmt: off
                write_entry(
                    raw, index_stride, ring, index_ape_ptr, index_weight_ptr, cos, sin, positions_ptr, requests_ptr,
                    index_entries_ptr, pooled_ptr, arrivals_ptr, t, p, block, row, role, index_eps,
                    HI, LOG_HI, F, RATIO, WINDOWS, SPARE, OWN, HI, 1, PER_BLOCK, INDEX_FORM, INDEX_KEYS,
                )
                # fmt: on


@triton.jit
def _is_kept(requests_ptr, request, t, num_rows, ROWS: tl.constexpr):
    """Returns True for a row that no later row of its request replaces in a ring of ROWS rows."""
    return tl.load(requests_ptr + t + ROWS, mask=t + ROWS < num_rows, other=-1) != request


@triton.jit
def _keep_raw(raw_ptr, state_ptr, WIDTH: tl.constexpr):
    c = tl.arange(0, WIDTH)
    tl.store(state_ptr + c, tl.load(raw_ptr + c))


@triton.jit(do_not_specialize=["num_rows"])
def chunk_rings_kernel(
    kv_ptr,
    main_ptr,
    index_ptr,
    positions_ptr,
    requests_ptr,
    slots_ptr,
    window_ptr,
    main_state_ptr,
    index_state_ptr,
    kv_stride,
    main_stride,
    index_stride,
    num_rows,
    H: tl.constexpr,
    HI: tl.constexpr,
    F: tl.constexpr,
    WINDOW: tl.constexpr,
    RAW_ROWS: tl.constexpr,
    WINDOWS: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    FORM: tl.constexpr,
):
    """Writes row t to its slot's rings, where no later row of its request goes.

    WINDOW, RAW_ROWS: rows of a slot's rings of keys and of raw rows; 0 raw rows in a layer without compressors.
    """
    t = tl.program_id(0).to(tl.int64)
    request, p = tl.load(requests_ptr + t), tl.load(positions_ptr + t)
    slot = tl.load(slots_ptr + request).to(tl.int64)
    if _is_kept(requests_ptr, request, t, num_rows, WINDOW):
        h = tl.arange(0, H)
        key = tl.load(kv_ptr + t * kv_stride + h)
        if FORM == KEY_PAGES:
            page_ptr = window_ptr + slot * (WINDOW * (H + 2 * F + 8))
            store_key_page(key.to(tl.float32), page_ptr, p % WINDOW, H, F, WINDOW)
        else:
            tl.store(window_ptr + (slot * WINDOW + p % WINDOW) * H + h, key)
    if RAW_ROWS > 0:  # noqa: SIM102 (decided at compile time)
        if _is_kept(requests_ptr, request, t, num_rows, RAW_ROWS):
            row = slot * RAW_ROWS + p % RAW_ROWS
            _keep_raw(main_ptr + t * main_stride, main_state_ptr + row * (2 * WINDOWS * H), 2 * WINDOWS * H)
            if HAS_INDEX:
                _keep_raw(index_ptr + t * index_stride, index_state_ptr + row * (2 * WINDOWS * HI), 2 * WINDOWS * HI)
