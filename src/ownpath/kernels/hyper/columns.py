"""Device code of the boundary's first launch for many tokens; ``launch`` explains and launches it.

How it works. The tensor cores' left operand is ``fn``: its 24 rows, as rows of a part, in two tiles of 16. Tokens are
the columns of the right operand. An instruction pairs k of one operand with k of the other, and which channel a k
stands for is free: with a K_WIDTH of 8 a lane loads 8 channels of a token from each stream in 16 bytes, mixes them,
stores the new streams in 16 bytes and multiplies them, all in the registers where they came. No stream passes through
shared memory. A program keeps its slice of channels: it cuts ``fn`` once into three bfloat16 terms, which are
exact, in shared memory and in the lanes' order (the two rows' four words of a lane lie behind each other), before it
waits for its predecessor, and then walks over blocks of tokens.

Why it is fast. ``spread_many`` loads and cuts ``fn`` again for every 32 tokens, and its lanes exchange the streams
through shared memory. Here conversions are one shift or one mask, addresses are constants (D is one), and a warp has 8
tokens, whose streams, weights and sums fit 128 registers: two programs of eight warps are on an SM.

Roofline. As the boundary's; streams alone, mixed and stored without ``fn``, take 160 us at 8,192 tokens of 4,096
channels on an H200, this launch 242 to 251, ``spread_many`` 355.

Limits. S = 4; CHANNELS must divide D, so that no channel is masked. A ragged last block reads its last token again and
stores it once. The order of sums does not depend on the number of tokens, but is not ``spread_many``'s.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2


@gluon.jit
def _fn_rows(r, NUM_MIX: tl.constexpr):
    """Returns fn's row for each row of a part, -1 for none: pre in 0..3, squares in 4, post 8..11, comb 12..27."""
    if NUM_MIX == 24:
        return gl.where(r < 4, r, gl.where((r >= 8) & (r < 28), r - 4, -1))
    else:  # noqa: RET505 (one of the two branches is compiled)
        return gl.where(r < 4, r, -1)


@gluon.jit
def _cut(value):
    """Returns a float32's first 8 significant bits, as bfloat16, and the rest: both exact, by bits alone."""
    bits = value.to(gl.int32, bitcast=True)
    term = (bits >> 16).to(gl.int16).to(gl.bfloat16, bitcast=True)
    return term, value - (bits & -65536).to(gl.float32, bitcast=True)


@gluon.jit
def _keep(terms, number: tl.constexpr, term):
    """Stores a term [32 rows, 32 channels] in the lanes' order: [64 m + 32 j + lane, 8]."""
    # Row 16 m + 8 half + g; channel 8 q + 4 j + 2 w + e; lane 4 g + q.
    words = gl.reshape(term, (2, 2, 8, 4, 2, 2, 2))
    words = gl.permute(words, (0, 4, 2, 3, 5, 1, 6))  # m, j, g, q, w, half, e
    terms.index(number).store(gl.reshape(words, (128, 8)))


@gluon.jit
def _cut_fn(fn_ptr, terms, D: tl.constexpr, NUM_MIX: tl.constexpr, CHANNELS: tl.constexpr, WARPS: tl.constexpr):
    """Keeps the slice's columns of fn as three terms each: of chunk c, stream k, smallest first, 3 (4 c + k) on."""
    LOADS: tl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [WARPS, 1], [1, 0])
    r = gl.arange(0, 32, gl.SliceLayout(1, LOADS))
    c = gl.arange(0, 32, gl.SliceLayout(0, LOADS))
    rows = _fn_rows(r, NUM_MIX)
    for i in gl.static_range(4 * (CHANNELS // 32)):
        d = gl.program_id(0) * CHANNELS + (i // 4) * 32 + (i % 4) * D + c
        in_fn = (rows[:, None] >= 0) & (d >= 0)[None, :]
        fn = gl.load(fn_ptr + rows[:, None] * (4 * D) + d[None, :], mask=in_fn, other=0.0)
        high, rest = _cut(fn)
        middle, rest = _cut(rest)
        low, _ = _cut(rest)
        _keep(terms, 3 * i, low)
        _keep(terms, 3 * i + 1, middle)
        _keep(terms, 3 * i + 2, high)


@gluon.jit
def _left(words, m: tl.constexpr, WORDS: tl.constexpr, LEFT: tl.constexpr):
    """Loads a term's rows 16 m on as the left operand, 16 bytes at a time."""
    first = words.slice(64 * m, 32).load(WORDS)
    second = words.slice(64 * m + 32, 32).load(WORDS)
    found = gl.reshape(gl.join(first, second), (8, 4, 2, 2, 2, 2))  # g, q, w, half, e, j
    found = gl.permute(found, (3, 0, 1, 5, 2, 4))  # half, g, q, j, w, e
    return gl.convert_layout(gl.reshape(found, (16, 32)), LEFT, assert_trivial=True)


@gluon.jit
def _add_products(low, high, n, terms, number, WORDS: tl.constexpr, LEFT: tl.constexpr):
    """Adds fn's rows times new streams, three terms, to the sums of rows 0 .. 16 and 16 .. 32 of a part."""
    for term in gl.static_range(3):
        words = terms.index(3 * number + term)
        low = mma_v2(_left(words, 0, WORDS, LEFT), n, low)
        high = mma_v2(_left(words, 1, WORDS, LEFT), n, high)
    return low, high


@gluon.jit
def _mix_of(post_ptr, comb_ptr, t, k: tl.constexpr):
    """Loads the five weights of new stream k: post, and comb's column."""
    p = gl.load(post_ptr + t * 4 + k)
    c0 = gl.load(comb_ptr + t * 16 + k)
    c1 = gl.load(comb_ptr + t * 16 + 4 + k)
    c2 = gl.load(comb_ptr + t * 16 + 8 + k)
    c3 = gl.load(comb_ptr + t * 16 + 12 + k)
    return p[None, :], c0[None, :], c1[None, :], c2[None, :], c3[None, :]


@gluon.jit
def _wide(value):
    """Converts bfloat16 to float32, two of a word by one instruction each."""
    return gl.inline_asm_elementwise(
        "shl.b32 $0, $2, 16; and.b32 $1, $2, -65536;", "=f,=f,r", [value], dtype=gl.float32, is_pure=True, pack=2
    )


@gluon.jit
def _rounded(value):
    """Rounds float32 to bfloat16, two at a time; not pure, lest the compiler convert again where it is used."""
    return gl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [value], dtype=gl.bfloat16, is_pure=False, pack=2
    )


@gluon.jit
def _new_stream(x0, x1, x2, x3, y, mix):
    """Computes a new stream in the order of ``spread_many``, rounded to the stored bfloat16."""
    p, c0, c1, c2, c3 = mix
    mixed = c0 * _wide(x0) + c1 * _wide(x1)
    mixed = mixed + c2 * _wide(x2)
    mixed = mixed + c3 * _wide(x3)
    return _rounded(mixed + p * _wide(y))


@gluon.jit
def _squared(n):
    wide = _wide(n)
    return wide * wide


@gluon.jit(do_not_specialize=["num_tokens"])
def spread_columns(
    x_ptr,
    y_ptr,
    other_ptr,
    post_ptr,
    comb_ptr,
    fn_ptr,
    new_ptr,
    part_ptr,
    num_tokens,
    D: tl.constexpr,
    WARPS: tl.constexpr,
    HAS_POST: tl.constexpr,
    HAS_OTHER: tl.constexpr,
    NUM_MIX: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Computes a slice of CHANNELS channels, TOKENS tokens at a time: new streams, and the slice's parts."""
    SUMS: tl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, WARPS], [16, 8])
    LEFT: tl.constexpr = gl.DotOperandLayout(0, SUMS, 8)
    RIGHT: tl.constexpr = gl.DotOperandLayout(1, SUMS, 8)
    WORDS: tl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [1, WARPS], [1, 0])
    NUM_SLICES: tl.constexpr = D // CHANNELS
    terms = gl.allocate_shared_memory(
        gl.bfloat16, [12 * (CHANNELS // 32), 128, 8], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    )
    _cut_fn(fn_ptr, terms, D, NUM_MIX, CHANNELS, WARPS)
    gl.thread_barrier()
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    column = gl.arange(0, TOKENS, gl.SliceLayout(0, RIGHT))
    channel = gl.arange(0, 32, gl.SliceLayout(1, RIGHT))
    token = gl.arange(0, TOKENS, gl.SliceLayout(0, SUMS))
    r = gl.arange(0, 16, gl.SliceLayout(1, SUMS))
    own = gl.program_id(0) * CHANNELS
    start = gl.program_id(1).to(gl.int64) * TOKENS
    for block in range(gl.program_id(1), (num_tokens + TOKENS - 1) // TOKENS, gl.num_programs(1)):
        # Offsets within the block fit 32 bits; only the block's own start needs 64.
        left = num_tokens - block * TOKENS
        t = gl.minimum(column, left - 1)
        in_t = (column < left)[None, :]
        at = t[None, :] * (4 * D) + channel[:, None]
        x_at = x_ptr + start * (4 * D) + at
        new_at = new_ptr + start * (4 * D) + at
        y_at = y_ptr + start * D + t[None, :] * D + channel[:, None]
        other_at = other_ptr + start * D + t[None, :] * D + channel[:, None]
        if HAS_POST:
            mix0 = _mix_of(post_ptr + start * 4, comb_ptr + start * 16, t, 0)
            mix1 = _mix_of(post_ptr + start * 4, comb_ptr + start * 16, t, 1)
            mix2 = _mix_of(post_ptr + start * 4, comb_ptr + start * 16, t, 2)
            mix3 = _mix_of(post_ptr + start * 4, comb_ptr + start * 16, t, 3)
        ahead = gl.num_programs(1) * TOKENS
        low = gl.zeros([16, TOKENS], gl.float32, SUMS)
        high = gl.zeros([16, TOKENS], gl.float32, SUMS)
        squares = gl.zeros([32, TOKENS], gl.float32, RIGHT)
        for chunk in range(CHANNELS // 32):
            c = own + chunk * 32
            x0 = gl.load(x_at + c)
            x1 = gl.load(x_at + D + c)
            x2 = gl.load(x_at + 2 * D + c)
            x3 = gl.load(x_at + 3 * D + c)
            if HAS_POST:
                y = gl.load(y_at + c)
                if HAS_OTHER:
                    y = _rounded(_wide(y) + _wide(gl.load(other_at + c)))
                n0 = _new_stream(x0, x1, x2, x3, y, mix0)
                n1 = _new_stream(x0, x1, x2, x3, y, mix1)
                n2 = _new_stream(x0, x1, x2, x3, y, mix2)
                n3 = _new_stream(x0, x1, x2, x3, y, mix3)
            else:
                n0, n1, n2, n3 = x0, x1, x2, x3
            gl.store(new_at + c, n0, mask=in_t)
            gl.store(new_at + D + c, n1, mask=in_t)
            gl.store(new_at + 2 * D + c, n2, mask=in_t)
            gl.store(new_at + 3 * D + c, n3, mask=in_t)
            low, high = _add_products(low, high, n0, terms, 4 * chunk, WORDS, LEFT)
            low, high = _add_products(low, high, n1, terms, 4 * chunk + 1, WORDS, LEFT)
            low, high = _add_products(low, high, n2, terms, 4 * chunk + 2, WORDS, LEFT)
            low, high = _add_products(low, high, n3, terms, 4 * chunk + 3, WORDS, LEFT)
            squares += _squared(n0) + _squared(n1) + _squared(n2) + _squared(n3)
        part = part_ptr + (start * NUM_SLICES + gl.program_id(0)) * 32
        part_at = part + (token * (NUM_SLICES * 32))[None, :] + r[:, None]
        gl.store(part_at, low, mask=(token < left)[None, :] & (r != 4)[:, None])
        gl.store(part_at + 16, high, mask=(token < left)[None, :])
        gl.store(part + column * (NUM_SLICES * 32) + 4, gl.sum(squares, axis=0), mask=column < left)
        start += ahead
