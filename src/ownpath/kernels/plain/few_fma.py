"""Device code of products with one or two rows of x, without tensor cores; ``few`` explains and launches it.

A tensor core's tile has 8 rows of x: at one or two, multiplying in the lanes themselves is sooner done.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "x_pitch", "width"])
def plain_linear_few_fma_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    num_tokens,
    num_rows,
    x_pitch,
    width,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    UNEVEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Computes ROWS outputs of all tokens. x_pitch and width count groups of 8 elements."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :, None]
    t = tl.arange(0, TOKENS)[:, None, None]
    k = tl.arange(0, CHUNK)[None, None, :]
    K = width * 8
    # What lies behind the last row or token reads the last one again, and is not stored.
    w_at = w_ptr + tl.minimum(n, num_rows - 1).to(tl.int64) * K + k
    x_at = x_ptr + tl.minimum(t, num_tokens - 1).to(tl.int64) * (x_pitch * 8) + k
    ws, xs = (), ()
    for c in tl.static_range(CHUNKS):
        if UNEVEN:
            ws += (tl.load(w_at + c * CHUNK, mask=k < K - c * CHUNK, other=0.0),)
        else:
            ws += (tl.load(w_at + c * CHUNK),)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for c in tl.static_range(CHUNKS):
        if UNEVEN:
            xs += (tl.load(x_at + c * CHUNK, mask=k < K - c * CHUNK, other=0.0),)
        else:
            xs += (tl.load(x_at + c * CHUNK),)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    products = ws[0].to(tl.float32) * xs[0].to(tl.float32)
    for c in tl.static_range(1, CHUNKS):
        products += ws[c].to(tl.float32) * xs[c].to(tl.float32)
    y = tl.sum(products, axis=2)
    own = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :]
    token = tl.arange(0, TOKENS)[:, None]
    y_at = y_ptr + token.to(tl.int64) * num_rows + own
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=(own < num_rows) & (token < num_tokens))
