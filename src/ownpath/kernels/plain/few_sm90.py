"""Device code of products with few rows of x; ``few`` explains and launches it.

Written in Gluon, Triton's form with explicit layouts, so that weights come from memory in the registers where the
tensor cores want them. The instruction pairs k of one operand with k of the other; which column of the matrix a k
stands for is free. With 8 columns a lane (``K_WIDTH``) a load is 16 bytes, and no value passes through shared memory.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2


@gluon.jit
def _left(warps: tl.constexpr, rows: tl.constexpr, step: tl.constexpr, layout: tl.constexpr):
    """Returns the indices of a left operand [warps, rows, step]."""
    warp = gl.arange(0, warps, gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    row = gl.arange(0, rows, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    k = gl.arange(0, step, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    return warp, row, k


@gluon.jit
def _right(warps: tl.constexpr, columns: tl.constexpr, step: tl.constexpr, layout: tl.constexpr):
    """Returns the indices of a right operand [warps, step, columns], columns before k."""
    warp = gl.arange(0, warps, gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    column = gl.arange(0, columns, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    k = gl.arange(0, step, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    return warp, column, k


@gluon.jit
def _load(at, inside, k_left, MASKED: tl.constexpr, UNEVEN: tl.constexpr):
    """Loads a chunk. inside: its rows; k_left: columns from each element to the end of the matrix."""
    if UNEVEN:
        value = gl.load(at, mask=inside & (k_left > 0), other=0.0)
    elif MASKED:
        value = gl.load(at, mask=inside, other=0.0)
    else:
        value = gl.load(at)
    return value


@gluon.jit(do_not_specialize=["num_tokens", "num_rows", "x_pitch", "width"])
def plain_linear_few_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    num_tokens,
    num_rows,
    x_pitch,
    width,
    LIVE: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    WARPS: tl.constexpr,
    STEP: tl.constexpr,
    CHUNKS: tl.constexpr,
    AHEAD: tl.constexpr,
    X_AHEAD: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
    UNEVEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Computes LIVE outputs of all tokens. x_pitch and width count groups of 8 elements."""
    SUMS: tl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    LEFT: tl.constexpr = gl.DotOperandLayout(0, SUMS, 8)
    RIGHT: tl.constexpr = gl.DotOperandLayout(1, SUMS, 8)
    if WEIGHT_FIRST:
        w_warp, row, w_k = _left(WARPS, ROWS, STEP, LEFT)
        x_warp, t, x_k = _right(WARPS, TOKENS, STEP, RIGHT)
    else:
        w_warp, row, w_k = _right(WARPS, ROWS, STEP, RIGHT)
        x_warp, t, x_k = _left(WARPS, TOKENS, STEP, LEFT)
    K = width * 8
    w_k += w_warp * (STEP * CHUNKS)
    x_k += x_warp * (STEP * CHUNKS)
    # What lies behind the last row or token reads the last one again, in the same load, and is not stored.
    n = gl.minimum(gl.program_id(0) * LIVE + row, num_rows - 1)
    w_at = w_ptr + n.to(gl.int64) * K + w_k
    x_at = x_ptr + gl.minimum(t, num_tokens - 1).to(gl.int64) * (x_pitch * 8) + x_k
    is_live = row < LIVE
    ws = ()
    for c in gl.static_range(AHEAD):
        ws += (_load(w_at + c * STEP, is_live, K - c * STEP - w_k, LIVE < ROWS, UNEVEN),)
    if PDL:
        tl.extra.cuda.gdc_wait()
    xs = ()
    for c in gl.static_range(X_AHEAD):
        xs += (_load(x_at + c * STEP, x_k >= 0, K - c * STEP - x_k, False, UNEVEN),)
    if PDL:
        # Here, because the compiler moves no load behind it: all of these are on their way before the first product.
        tl.extra.cuda.gdc_launch_dependents()
    # A sum waits for its last product: as many take turns as fit.
    NUM_SUMS: tl.constexpr = max(1, min(4, 512 // (ROWS * TOKENS)))
    zeros = gl.zeros([WARPS, ROWS, TOKENS] if WEIGHT_FIRST else [WARPS, TOKENS, ROWS], gl.float32, SUMS)
    sums = (zeros,)
    for _ in gl.static_range(1, NUM_SUMS):
        sums += (zeros,)
    for c in gl.static_range(CHUNKS):
        left, right = (ws[c], xs[c]) if WEIGHT_FIRST else (xs[c], ws[c])
        sums += (mma_v2(left, right, sums[c]),)
        if c + X_AHEAD < CHUNKS:
            later = (c + X_AHEAD) * STEP
            xs += (_load(x_at + later, x_k >= 0, K - later - x_k, False, UNEVEN),)
        if c + AHEAD < CHUNKS:
            later = (c + AHEAD) * STEP
            ws += (_load(w_at + later, is_live, K - later - w_k, LIVE < ROWS, UNEVEN),)
    total = sums[CHUNKS]
    for c in gl.static_range(1, NUM_SUMS):
        total += sums[CHUNKS + c]
    y = gl.sum(total, axis=0)
    OUT: tl.constexpr = gl.SliceLayout(0, SUMS)
    if WEIGHT_FIRST:
        own = gl.arange(0, ROWS, gl.SliceLayout(1, OUT))[:, None]
        token = gl.arange(0, TOKENS, gl.SliceLayout(0, OUT))[None, :]
    else:
        own = gl.arange(0, ROWS, gl.SliceLayout(0, OUT))[None, :]
        token = gl.arange(0, TOKENS, gl.SliceLayout(1, OUT))[:, None]
    out_n = gl.program_id(0) * LIVE + own
    y_at = y_ptr + token.to(gl.int64) * num_rows + out_n
    inside = (own < LIVE) & (out_n < num_rows) & (token < num_tokens)
    gl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=inside)
