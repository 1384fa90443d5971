"""Device code that multiplies keys in pages: codes become bfloat16 in registers, exactly.

Legend: R keys, words of some codes each.
"""

import triton
import triton.language as tl

QUERY_FACTOR, FP8_FACTOR = tl.constexpr(2.0**96), 2.0**24
"""Powers of two that make up for 2^-120: of queries, so that their products with keys are normal, and of weights."""
FP4_FACTOR = 2.0**63
"""The same for FP4 keys, whose codes are multiplied in registers: of weights."""
SIGNS = tl.constexpr(-2139062144)
"""The highest bit of each byte."""


@triton.jit
def _widen_byte(words, BYTE: tl.constexpr, PICK: tl.constexpr, ASSEMBLES: tl.constexpr):
    """Converts one E4M3 code of each word to a bfloat16 number of 2^-120 times its value, exactly.

    Exponent and mantissa move by bits; the code of NaN becomes 480 * 2^-120. PICK: the permutation that puts this byte
    of two words into the upper bytes of two halves.
    """
    if ASSEMBLES:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 pair, bits; prmt.b32 pair, $1, $2, " + PICK + "; shr.u32 bits, pair, 4;"
            " and.b32 bits, bits, 0x07F007F0; lop3.b32 $0, pair, 0x80008000, bits, 0xEA; }",
            "=r,r,r",
            [words],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    code = words >> (8 * BYTE)
    return (((code & 0x80) << 8) | ((code & 0x7F) << 4)).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def split_channels(q, I_PAD: tl.constexpr, QUARTER: tl.constexpr):
    """Returns a query's channels 4j, 4j + 1, 4j + 2 and 4j + 3 [QUARTER, I_PAD] each."""
    even, odd = tl.split(tl.reshape(q, (I_PAD, QUARTER, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return tl.trans(first), tl.trans(second), tl.trans(third), tl.trans(fourth)


@triton.jit
def multiply_fp8(words, first, second, third, fourth, ASSEMBLES: tl.constexpr):
    """Multiplies FP8 keys, four channels to a word, by what ``split_channels`` returns, with ``QUERY_FACTOR``."""
    products = tl.dot(_widen_byte(words, 0, "0x4000", ASSEMBLES), first)
    products = tl.dot(_widen_byte(words, 1, "0x5010", ASSEMBLES), second, products)
    products = tl.dot(_widen_byte(words, 2, "0x6020", ASSEMBLES), third, products)
    return tl.dot(_widen_byte(words, 3, "0x7030", ASSEMBLES), fourth, products)


@triton.jit
def enlarged(q):
    """Returns queries times ``QUERY_FACTOR``."""
    return (q.to(tl.float32) * QUERY_FACTOR).to(tl.bfloat16)


@triton.jit
def spread_scales(scales, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Gives the words of a key the scales of their blocks, times 2^63: bfloat16 [R, WIDTH]. scales: four E8M0, int32
    [R]."""
    fields = scales + 0x3F3F3F3F  # 63 to each, the exponent of bfloat16 then; above 191 see ``nan_of_scales``
    first, second = fields << 7, fields >> 1
    third, fourth = fields >> 9, fields >> 17
    halves = tl.join(tl.join(first, third), tl.join(second, fourth))
    blocks = (tl.reshape(halves, (ROWS, 4, 1)) & 0x7F80).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return tl.reshape(tl.broadcast_to(blocks, (ROWS, 4, WIDTH // 4)), (ROWS, WIDTH))


@triton.jit
def nan_of_scales(scales):
    """Returns 0 for a key, NaN where one of its scales is NaN or more than 2^64: float32 [R]."""
    return tl.where((scales & (scales << 1) & SIGNS) == 0, 0.0, float("nan"))


@triton.jit
def _widen_nibble(words, scales, NIBBLE: tl.constexpr, BITS: tl.constexpr, SIGN: tl.constexpr, ASSEMBLES: tl.constexpr):
    """Converts one E2M1 code of each word, four to a word, to a bfloat16 number, times its scale of ``spread_scales``.

    In bits 8 to 6 a code is a number of 2^-126 times its value, the subnormal one included. BITS, SIGN: the shifts
    that move it there, and its sign to bit 15, in two words at a time.
    """
    if ASSEMBLES:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 bits, sign; "
            + BITS
            + " and.b32 bits, bits, 0x01C001C0; "
            + SIGN
            + " lop3.b32 bits, sign, 0x80008000, bits, 0xEA; mul.rn.bf16x2 $0, bits, $2; }",
            "=r,r,r",
            [words, scales],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    code = words.to(tl.int32) >> (4 * NIBBLE)
    value = (((code & 8) << 12) | ((code & 7) << 6)).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return (value.to(tl.float32) * scales.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def multiply_fp4(words, scales, first, second, third, fourth, ASSEMBLES: tl.constexpr):
    """Multiplies FP4 keys, four channels to a word, by what ``split_channels`` returns."""
    keys = _widen_nibble(words, scales, 0, "shl.b32 bits, $1, 6;", "shl.b32 sign, $1, 12;", ASSEMBLES)
    products = tl.dot(keys, first)
    keys = _widen_nibble(words, scales, 1, "shl.b32 bits, $1, 2;", "shl.b32 sign, $1, 8;", ASSEMBLES)
    products = tl.dot(keys, second, products)
    keys = _widen_nibble(words, scales, 2, "shr.u32 bits, $1, 2;", "shl.b32 sign, $1, 4;", ASSEMBLES)
    products = tl.dot(keys, third, products)
    keys = _widen_nibble(words, scales, 3, "shr.u32 bits, $1, 6;", "mov.b32 sign, $1;", ASSEMBLES)
    return tl.dot(keys, fourth, products)


@triton.jit
def weighted_sums(products, weights, ROWS: tl.constexpr, I_PAD: tl.constexpr):
    """Sums each key's products with all heads, [ROWS, I_PAD], times the heads' weights: float32 [ROWS]. Four heads are
    added by fused multiplications, then the sums of four."""
    across = tl.trans(tl.reshape(products, (ROWS, 2, 2, I_PAD // 4)), (0, 3, 1, 2))
    even, odd = tl.split(across)
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    even, odd = tl.split(tl.trans(tl.reshape(weights, (2, 2, I_PAD // 4)), (2, 0, 1)))
    first_w, third_w = tl.split(even)
    second_w, fourth_w = tl.split(odd)
    sums = tl.fma(third, third_w[None, :], fourth * fourth_w[None, :])
    sums = tl.fma(first, first_w[None, :], tl.fma(second, second_w[None, :], sums))
    return tl.sum(sums, axis=1)
