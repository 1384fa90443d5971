"""Device code that makes a row's index queries: rotated, and rounded as official numerics does."""

import triton
import triton.language as tl

from ownpath.kernels.scores.types import INDEX_DIM

INVERSE_ROOT = tl.constexpr(INDEX_DIM**-0.5)


@triton.jit
def rotated_queries(q_ptr, cos_ptr, sin_ptr, num_heads, I_PAD: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr):
    """Loads one row's queries [I_PAD, DIM] and rotates their last 2 * HALF channels in pairs, rounding once."""
    i, c, f = tl.arange(0, I_PAD)[:, None], tl.arange(0, 2 * HALF)[None, :], tl.arange(0, HALF)
    plain = tl.load(q_ptr + i * DIM + c, mask=i < num_heads, other=0.0)
    rotary = tl.load(q_ptr + i * DIM + 2 * HALF + c, mask=i < num_heads, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(rotary, (I_PAD, HALF, 2)))
    cos, sin = tl.load(cos_ptr + f)[None, :], tl.load(sin_ptr + f)[None, :]
    turned = tl.join(even * cos - odd * sin, even * sin + odd * cos).to(tl.bfloat16)
    halves = tl.join(plain, tl.reshape(turned, (I_PAD, 2 * HALF)))
    return tl.reshape(tl.permute(halves, (0, 2, 1)), (I_PAD, DIM))


@triton.jit
def _hadamard(q, I_PAD: tl.constexpr, DIM: tl.constexpr):
    """Multiplies by the Hadamard matrix over sqrt(DIM), rounded once; the sums of ``numerics.hadamard``, in its order.

    Each stage adds and subtracts neighbours and puts sums before differences, so that the next one's are neighbours.
    """
    y = q.to(tl.float32)
    for _ in tl.static_range(7):
        even, odd = tl.split(tl.reshape(y, (I_PAD, DIM // 2, 2)))
        y = tl.reshape(tl.permute(tl.join(even + odd, even - odd), (0, 2, 1)), (I_PAD, DIM))
    return (y * INVERSE_ROOT).to(tl.bfloat16)


@triton.jit
def _round_to_fp4(q, I_PAD: tl.constexpr, DIM: tl.constexpr):
    """Rounds to E2M1 with a power-of-two scale per 32 channels, and reads back: ``numerics.fake_quantize_fp4``."""
    x = tl.reshape(q.to(tl.float32), (I_PAD, DIM // 32, 32))
    largest = tl.max(tl.abs(x), axis=2)
    bits = largest.to(tl.int32, bitcast=True)
    # 2^ceil(log2(largest / 6)); 6 is 1.5 * 2^2.
    byte = tl.maximum((bits >> 23) - 2 + ((bits & 0x7FFFFF) > 0x400000).to(tl.int32), 1)
    byte = tl.where(largest == 0.0, 127, byte)
    scale = (byte << 23).to(tl.float32, bitcast=True)[:, :, None]
    a = tl.abs(x) * ((254 - byte) << 23).to(tl.float32, bitcast=True)[:, :, None]
    upper = tl.where(a > 5.0, 6.0, tl.where(a >= 3.5, 4.0, tl.where(a > 2.5, 3.0, 2.0)))
    lower = tl.where(a > 1.25, 1.5, tl.where(a >= 0.75, 1.0, tl.where(a > 0.25, 0.5, 0.0)))
    size = tl.where(a >= 1.75, upper, lower) * scale
    rounded = tl.where(a <= 6.0, tl.where(x < 0, -size, size), float("nan"))  # what is not finite stays visible
    return tl.reshape(rounded, (I_PAD, DIM)).to(tl.bfloat16)


@triton.jit
def official_queries(
    q_ptr,
    cos_ptr,
    sin_ptr,
    num_heads,
    I_PAD: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Loads, rotates and rounds one row's queries as official numerics does, [I_PAD, DIM]: AT_ONCE heads after the
    other, so that few registers hold what is in float32."""
    if I_PAD > AT_ONCE:
        H: tl.constexpr = I_PAD // 2
        first = official_queries(q_ptr, cos_ptr, sin_ptr, num_heads, H, DIM, HALF, AT_ONCE)
        second = official_queries(q_ptr + H * DIM, cos_ptr, sin_ptr, num_heads - H, H, DIM, HALF, AT_ONCE)
        return tl.reshape(tl.permute(tl.join(first, second), (2, 0, 1)), (I_PAD, DIM))
    else:  # noqa: RET505 (one of them is compiled)
        q = rotated_queries(q_ptr, cos_ptr, sin_ptr, num_heads, I_PAD, DIM, HALF)
        return _round_to_fp4(_hadamard(q, I_PAD, DIM), I_PAD, DIM)
