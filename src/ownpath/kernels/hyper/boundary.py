"""Device code of the hyper-connection boundary; ``launch`` explains and launches it.

A part is the contribution of one slice of channels to a token's sums: 32 floats, with the products for ``pre`` in 0..3,
the sum of squares in 4, the products for ``post`` in 8..11 and for ``comb`` in 12..27, so that each reader's columns
share 32-byte sectors. D hidden, t token, d channel, r row of a part, s slice.
"""

import triton
import triton.language as tl


@triton.jit
def _fn_rows(r, NUM_MIX: tl.constexpr):
    """Returns fn's row for each row of a part, -1 for none: pre in 0..3, squares in 4, post 8..11, comb 12..27."""
    if NUM_MIX == 24:
        return tl.where(r < 4, r, tl.where((r >= 8) & (r < 28), r - 4, -1))
    else:  # noqa: RET505 (one of the two branches is compiled)
        return tl.where(r < 4, r, -1)


@triton.jit
def _new_stream(x0, x1, x2, x3, y, post, comb, t, in_t, k, HAS_POST: tl.constexpr):
    """Computes stream k of [tokens, channels], rounded to the stored bfloat16."""
    if HAS_POST:
        p = tl.load(post + t * 4 + k, mask=in_t, other=0.0)
        c0 = tl.load(comb + t * 16 + k, mask=in_t, other=0.0)
        c1 = tl.load(comb + t * 16 + 4 + k, mask=in_t, other=0.0)
        c2 = tl.load(comb + t * 16 + 8 + k, mask=in_t, other=0.0)
        c3 = tl.load(comb + t * 16 + 12 + k, mask=in_t, other=0.0)
        mixed = c0[:, None] * x0.to(tl.float32) + c1[:, None] * x1.to(tl.float32)
        mixed = mixed + c2[:, None] * x2.to(tl.float32)
        mixed = mixed + c3[:, None] * x3.to(tl.float32)
        return (mixed + p[:, None] * y.to(tl.float32)).to(tl.bfloat16)
    else:  # noqa: RET505
        return tl.where(k < 2, tl.where(k == 0, x0, x1), tl.where(k == 2, x2, x3))


@triton.jit
def _output(y_ptr, other_ptr, at, inside, HAS_OTHER: tl.constexpr):
    """Loads a sublayer's output; of two parts, their sum as it would be stored, rounded to bfloat16."""
    y = tl.load(y_ptr + at, mask=inside, other=0.0)
    if HAS_OTHER:
        other = tl.load(other_ptr + at, mask=inside, other=0.0)
        y = (y.to(tl.float32) + other.to(tl.float32)).to(tl.bfloat16)
    return y


@triton.jit(do_not_specialize=["num_tokens"])
def spread_few(
    x_ptr,
    y_ptr,
    other_ptr,
    post_ptr,
    comb_ptr,
    fn_ptr,
    new_ptr,
    part_ptr,
    num_tokens,
    D,
    num_slices,
    HAS_POST: tl.constexpr,
    HAS_OTHER: tl.constexpr,
    NUM_MIX: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Computes a slice of TOKENS tokens: new streams, and the slice's part of the logits and of the sum of squares."""
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    r, in_d = tl.arange(0, 32), d < D
    rows = _fn_rows(r, NUM_MIX)
    in_fn = (rows[:, None] >= 0) & in_d[None, :]
    fn_at = fn_ptr + rows[:, None] * (4 * D) + d[None, :]
    fn0 = tl.load(fn_at, mask=in_fn, other=0.0)
    fn1 = tl.load(fn_at + D, mask=in_fn, other=0.0)
    fn2 = tl.load(fn_at + 2 * D, mask=in_fn, other=0.0)
    fn3 = tl.load(fn_at + 3 * D, mask=in_fn, other=0.0)
    # Row 4 of a part sums the squares, in the same reduction as the products.
    is_square = (r == 4)[:, None] & in_d[None, :]
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for i in tl.static_range(TOKENS):
        t = tl.program_id(1).to(tl.int64) * TOKENS + i + tl.arange(0, 1)
        in_t = t < num_tokens
        inside = in_t[:, None] & in_d[None, :]
        at = t[:, None] * (4 * D) + d[None, :]
        x0 = tl.load(x_ptr + at, mask=inside, other=0.0)
        x1 = tl.load(x_ptr + at + D, mask=inside, other=0.0)
        x2 = tl.load(x_ptr + at + 2 * D, mask=inside, other=0.0)
        x3 = tl.load(x_ptr + at + 3 * D, mask=inside, other=0.0)
        y = x0
        if HAS_POST:
            y = _output(y_ptr, other_ptr, t[:, None] * D + d[None, :], inside, HAS_OTHER)
        n0 = _new_stream(x0, x1, x2, x3, y, post_ptr, comb_ptr, t, in_t, 0, HAS_POST)
        n1 = _new_stream(x0, x1, x2, x3, y, post_ptr, comb_ptr, t, in_t, 1, HAS_POST)
        n2 = _new_stream(x0, x1, x2, x3, y, post_ptr, comb_ptr, t, in_t, 2, HAS_POST)
        n3 = _new_stream(x0, x1, x2, x3, y, post_ptr, comb_ptr, t, in_t, 3, HAS_POST)
        tl.store(new_ptr + at, n0, mask=inside)
        tl.store(new_ptr + at + D, n1, mask=inside)
        tl.store(new_ptr + at + 2 * D, n2, mask=inside)
        tl.store(new_ptr + at + 3 * D, n3, mask=inside)
        w0, w1, w2, w3 = n0.to(tl.float32), n1.to(tl.float32), n2.to(tl.float32), n3.to(tl.float32)
        acc = tl.where(is_square, w0, fn0) * w0 + tl.where(is_square, w1, fn1) * w1
        acc += tl.where(is_square, w2, fn2) * w2 + tl.where(is_square, w3, fn3) * w3
        token = tl.program_id(1).to(tl.int64) * TOKENS + i
        part = part_ptr + (token * num_slices + tl.program_id(0)) * 32
        tl.store(part + r, tl.sum(acc, axis=1), mask=(r < 32) & (token < num_tokens))


@triton.jit
def _cut(value):
    """Returns a float32's first 8 significant bits, as bfloat16, and the rest: both exact, by bits alone."""
    bits = value.to(tl.int32, bitcast=True)
    term = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return term, value - (bits & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _add_products(acc, squares, n, fn):
    """Returns acc + n fnᵀ, with fn as three bfloat16 terms of 8 bits, smallest first, and squares + n²."""
    high, rest = _cut(fn)
    middle, rest = _cut(rest)
    low, _ = _cut(rest)
    acc = tl.dot(n, tl.trans(low), acc)
    acc = tl.dot(n, tl.trans(middle), acc)
    acc = tl.dot(n, tl.trans(high), acc)
    wide = n.to(tl.float32)
    return acc, squares + wide * wide


@triton.jit(do_not_specialize=["num_tokens"])
def spread_many(
    x_ptr,
    y_ptr,
    other_ptr,
    post_ptr,
    comb_ptr,
    fn_ptr,
    new_ptr,
    part_ptr,
    num_tokens,
    D,
    num_slices,
    HAS_POST: tl.constexpr,
    HAS_OTHER: tl.constexpr,
    NUM_MIX: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Computes the same for TOKENS tokens at a time in one warp, 32 channels of a stream per step, by tensor cores."""
    # Offsets within the tile fit 32 bits; only the tile's own start needs 64.
    first = tl.program_id(1).to(tl.int64) * TOKENS
    t = tl.arange(0, TOKENS)
    x_ptr += first * (4 * D)
    new_ptr += first * (4 * D)
    y_ptr += first * D
    other_ptr += first * D
    post_ptr += first * 4
    comb_ptr += first * 16
    part_ptr += (first * num_slices + tl.program_id(0)) * 32
    c, r = tl.arange(0, 32), tl.arange(0, 32)
    in_t = t < num_tokens - tl.program_id(1) * TOKENS
    rows = _fn_rows(r, NUM_MIX)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    acc = tl.zeros((TOKENS, 32), dtype=tl.float32)
    squares = tl.zeros((TOKENS, 32), dtype=tl.float32)
    for chunk in range(CHANNELS // 32):
        d = tl.program_id(0) * CHANNELS + chunk * 32 + c
        in_d = d < D
        inside = in_t[:, None] & in_d[None, :]
        in_fn = (rows[:, None] >= 0) & in_d[None, :]
        at = t[:, None] * (4 * D) + d[None, :]
        x0 = tl.load(x_ptr + at, mask=inside, other=0.0)
        x1 = tl.load(x_ptr + at + D, mask=inside, other=0.0)
        x2 = tl.load(x_ptr + at + 2 * D, mask=inside, other=0.0)
        x3 = tl.load(x_ptr + at + 3 * D, mask=inside, other=0.0)
        y = x0
        if HAS_POST:
            y = _output(y_ptr, other_ptr, t[:, None] * D + d[None, :], inside, HAS_OTHER)
        fn_at = fn_ptr + rows[:, None] * (4 * D) + d[None, :]
        for k in range(4):
            fn = tl.load(fn_at + k * D, mask=in_fn, other=0.0)
            n = _new_stream(x0, x1, x2, x3, y, post_ptr, comb_ptr, t, in_t, k, HAS_POST)
            tl.store(new_ptr + at + k * D, n, mask=inside)
            acc, squares = _add_products(acc, squares, n, fn)
    acc = tl.where((r == 4)[None, :], tl.sum(squares, axis=1)[:, None], acc)
    tl.store(part_ptr + (t * num_slices * 32)[:, None] + r[None, :], acc, mask=in_t[:, None])


@triton.jit
def _one(vector, WIDTH: tl.constexpr, AT: tl.constexpr):
    """Returns element AT of a vector as a scalar."""
    return tl.sum(tl.where(tl.arange(0, WIDTH) == AT, vector, 0.0), axis=0)


@triton.jit
def _collapse(
    new_ptr, weight, d, in_d, part_ptr, base, scale, h_ptr, t, D, num_slices, mix_norm_eps, eps, norm_eps,
    SLICES: tl.constexpr,
):  # fmt: skip
    """Collapses one token's streams and normalises the result."""
    row = new_ptr + t * (4 * D) + d
    x0 = tl.load(row, mask=in_d, other=0.0)
    x1 = tl.load(row + D, mask=in_d, other=0.0)
    x2 = tl.load(row + 2 * D, mask=in_d, other=0.0)
    x3 = tl.load(row + 3 * D, mask=in_d, other=0.0)
    r, s = tl.arange(0, 8), tl.arange(0, SLICES)
    part = part_ptr + (t * num_slices + s[:, None]) * 32 + r[None, :]
    sums = tl.sum(tl.load(part, mask=(s < num_slices)[:, None], other=0.0), axis=0)
    rms = tl.rsqrt(_one(sums, 8, 4) / (4 * D) + mix_norm_eps)
    pre = tl.sigmoid(sums * rms * scale + base) + eps
    h = _one(pre, 8, 0) * x0.to(tl.float32) + _one(pre, 8, 1) * x1.to(tl.float32)
    h += _one(pre, 8, 2) * x2.to(tl.float32) + _one(pre, 8, 3) * x3.to(tl.float32)
    h = h.to(tl.bfloat16).to(tl.float32)
    h = h * tl.rsqrt(tl.sum(h * h, axis=0) / D + norm_eps) * weight
    tl.store(h_ptr + t * D + d, h.to(tl.bfloat16), mask=in_d)


@triton.jit
def _sum_parts(part, mask, column, WIDTH: tl.constexpr, TOKENS: tl.constexpr, SLICES: tl.constexpr):
    """Sums columns column .. column + WIDTH of some tokens' parts over slices: [TOKENS, WIDTH]."""
    columns = tl.load(part[:, None] + column + tl.arange(0, WIDTH)[None, :], mask=mask[:, None], other=0.0)
    return tl.sum(tl.reshape(columns, (TOKENS, SLICES, WIDTH)), axis=1)


@triton.jit
def _sum_parts_in_turn(
    part, in_t, column, num_slices, WIDTH: tl.constexpr, SLICES: tl.constexpr, AT_ONCE: tl.constexpr
):  # fmt: skip
    """Sums the same columns of many tokens' parts, AT_ONCE slices at a time, for which a thread has registers."""
    q, i = tl.arange(0, AT_ONCE)[None, :, None], column + tl.arange(0, WIDTH)[None, None, :]
    sums = tl.zeros((part.shape[0], AT_ONCE, WIDTH), dtype=tl.float32)
    for first in tl.static_range(0, SLICES, AT_ONCE):
        mask = in_t[:, None, None] & (first + q < num_slices)
        sums += tl.load(part[:, None, None] + (first + q) * 32 + i, mask=mask, other=0.0)
    return tl.sum(sums, axis=1)


@triton.jit
def _softmax_row(logits, row: tl.constexpr, eps):
    """Computes softmax of a row of [TOKENS, 16], plus eps: four vectors [TOKENS]."""
    i = tl.arange(0, 16)[None, :]
    a = tl.sum(tl.where(i == row * 4, logits, 0.0), axis=1)
    b = tl.sum(tl.where(i == row * 4 + 1, logits, 0.0), axis=1)
    c = tl.sum(tl.where(i == row * 4 + 2, logits, 0.0), axis=1)
    d = tl.sum(tl.where(i == row * 4 + 3, logits, 0.0), axis=1)
    top = tl.maximum(tl.maximum(a, b), tl.maximum(c, d))
    a, b, c, d = tl.exp(a - top), tl.exp(b - top), tl.exp(c - top), tl.exp(d - top)
    total = (a + b) + (c + d)
    return a / total + eps, b / total + eps, c / total + eps, d / total + eps


@triton.jit
def _unit_sum(a, b, c, d, eps, APPROX: tl.constexpr):
    """Divides the four by their sum plus eps."""
    total = (a + b) + (c + d) + eps
    if APPROX:  # one instruction, one unit in the last place; the sum is between eps and 5
        r = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [total], tl.float32, is_pure=True, pack=1)
    else:
        r = 1.0 / total
    return a * r, b * r, c * r, d * r


@triton.jit
def _store_row(at, a, b, c, d, in_t):
    tl.store(at, a, mask=in_t)
    tl.store(at + 1, b, mask=in_t)
    tl.store(at + 2, c, mask=in_t)
    tl.store(at + 3, d, mask=in_t)


@triton.jit
def _sinkhorn(
    part_ptr, base_ptr, scale_ptr, post_ptr, comb_ptr, first, num_tokens, D, num_slices, mix_norm_eps, eps,
    NUM_ITERS: tl.constexpr, TOKENS: tl.constexpr, SLICES: tl.constexpr, AT_ONCE: tl.constexpr,
    APPROX: tl.constexpr,
):  # fmt: skip
    """Computes post and comb of some tokens. A token's 16 entries are in one thread: 39 normalisations, no shuffle."""
    i, j, t = tl.arange(0, 16), tl.arange(0, 4), first + tl.arange(0, TOKENS)
    scale1, scale2 = tl.load(scale_ptr + 1), tl.load(scale_ptr + 2)
    base1, base2 = tl.load(base_ptr + 4 + j), tl.load(base_ptr + 8 + i)
    in_t = t < num_tokens
    if AT_ONCE < SLICES:
        part = part_ptr + t * num_slices * 32
        comb = _sum_parts_in_turn(part, in_t, 12, num_slices, 16, SLICES, AT_ONCE)
        post = _sum_parts_in_turn(part, in_t, 8, num_slices, 4, SLICES, AT_ONCE)
        squares = tl.sum(_sum_parts_in_turn(part, in_t, 4, num_slices, 1, SLICES, AT_ONCE), axis=1)
    else:
        q = tl.arange(0, TOKENS * SLICES)
        s, mask = q % SLICES, (first + q // SLICES < num_tokens) & (q % SLICES < num_slices)
        part = part_ptr + ((first + q // SLICES) * num_slices + s) * 32
        comb = _sum_parts(part, mask, 12, 16, TOKENS, SLICES)
        post = _sum_parts(part, mask, 8, 4, TOKENS, SLICES)
        squares = tl.sum(_sum_parts(part, mask, 4, 1, TOKENS, SLICES), axis=1)
    rms = tl.rsqrt(squares / (4 * D) + mix_norm_eps)
    post = 2 * tl.sigmoid(post * rms[:, None] * scale1 + base1[None, :])
    tl.store(post_ptr + t[:, None] * 4 + j[None, :], post, mask=in_t[:, None])
    logits = comb * rms[:, None] * scale2 + base2[None, :]
    c00, c01, c02, c03 = _softmax_row(logits, 0, eps)
    c10, c11, c12, c13 = _softmax_row(logits, 1, eps)
    c20, c21, c22, c23 = _softmax_row(logits, 2, eps)
    c30, c31, c32, c33 = _softmax_row(logits, 3, eps)
    c00, c10, c20, c30 = _unit_sum(c00, c10, c20, c30, eps, APPROX)
    c01, c11, c21, c31 = _unit_sum(c01, c11, c21, c31, eps, APPROX)
    c02, c12, c22, c32 = _unit_sum(c02, c12, c22, c32, eps, APPROX)
    c03, c13, c23, c33 = _unit_sum(c03, c13, c23, c33, eps, APPROX)
    for _ in range(NUM_ITERS - 1):
        c00, c01, c02, c03 = _unit_sum(c00, c01, c02, c03, eps, APPROX)
        c10, c11, c12, c13 = _unit_sum(c10, c11, c12, c13, eps, APPROX)
        c20, c21, c22, c23 = _unit_sum(c20, c21, c22, c23, eps, APPROX)
        c30, c31, c32, c33 = _unit_sum(c30, c31, c32, c33, eps, APPROX)
        c00, c10, c20, c30 = _unit_sum(c00, c10, c20, c30, eps, APPROX)
        c01, c11, c21, c31 = _unit_sum(c01, c11, c21, c31, eps, APPROX)
        c02, c12, c22, c32 = _unit_sum(c02, c12, c22, c32, eps, APPROX)
        c03, c13, c23, c33 = _unit_sum(c03, c13, c23, c33, eps, APPROX)
    _store_row(comb_ptr + t * 16, c00, c01, c02, c03, in_t)
    _store_row(comb_ptr + t * 16 + 4, c10, c11, c12, c13, in_t)
    _store_row(comb_ptr + t * 16 + 8, c20, c21, c22, c23, in_t)
    _store_row(comb_ptr + t * 16 + 12, c30, c31, c32, c33, in_t)


@triton.jit(do_not_specialize=["num_tokens"])
def collapse(
    new_ptr,
    part_ptr,
    base_ptr,
    scale_ptr,
    weight_ptr,
    h_ptr,
    post_ptr,
    comb_ptr,
    num_tokens,
    D,
    num_slices,
    mix_norm_eps,
    eps,
    norm_eps,
    NUM_MIX: tl.constexpr,
    NUM_ITERS: tl.constexpr,
    SINKHORN_TOKENS: tl.constexpr,
    SLICES: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """Runs Sinkhorn programs first, as they take longest (none after the last sublayer), then a program per token."""
    num_sinkhorn = 0
    if NUM_MIX == 24:
        num_sinkhorn = (num_tokens + SINKHORN_TOKENS - 1) // SINKHORN_TOKENS
    d, r = tl.arange(0, BLOCK_D), tl.arange(0, 8)
    in_d = d < D
    weight = tl.load(weight_ptr + d, mask=in_d, other=0.0).to(tl.float32)
    base = tl.load(base_ptr + r, mask=r < 4, other=0.0)
    scale = tl.load(scale_ptr)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    if program < num_sinkhorn:
        first = program.to(tl.int64) * SINKHORN_TOKENS
        _sinkhorn(
            part_ptr, base_ptr, scale_ptr, post_ptr, comb_ptr, first, num_tokens, D, num_slices, mix_norm_eps, eps,
            NUM_ITERS, SINKHORN_TOKENS, SLICES, AT_ONCE, PDL,
        )  # fmt: skip
    else:
        token = (program - num_sinkhorn).to(tl.int64)
        _collapse(
            new_ptr, weight, d, in_d, part_ptr, base, scale, h_ptr, token, D, num_slices, mix_norm_eps, eps, norm_eps,
            SLICES,
        )  # fmt: skip
