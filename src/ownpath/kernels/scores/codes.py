"""Device code that multiplies keys in pages: codes become bfloat16 in registers, exactly.

Legend: R keys, words of some codes each.
"""

import triton
import triton.language as tl

QUERY_FACTOR, FP8_FACTOR = tl.constexpr(2.0**96), 2.0**24
"""Powers of two that make up for 2^-120: of queries, so that their products with keys are normal, and of weights."""
HIGHEST = tl.constexpr(253)
"""The exponent field of 2^126."""


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
    """Gives the words of a key the E8M0 scales of their blocks, uint8 [R, 4], times 2^63: bfloat16 [R, WIDTH]."""
    factors = ((scales.to(tl.int16) + 63) << 7).to(tl.bfloat16, bitcast=True)
    return tl.reshape(tl.broadcast_to(factors[:, :, None], (ROWS, 4, WIDTH // 4)), (ROWS, WIDTH))


@triton.jit
def _widen_nibble(words, rest, NIBBLE: tl.constexpr, BITS: tl.constexpr, SIGN: tl.constexpr, ASSEMBLES: tl.constexpr):
    """Converts one E2M1 code of each word, four to a word, to a bfloat16 number, times ``rest`` of ``fp4_scales``.

    In bits 8 to 6 a code is a number of 2^-126 times its value, the subnormal one included. BITS, SIGN: the shifts
    that move it there, and its sign to bit 15, in two words at a time.
    """
    if ASSEMBLES:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 bits, sign; " + BITS + " and.b32 bits, bits, 0x01C001C0; " + SIGN +
            " lop3.b32 bits, sign, 0x80008000, bits, 0xEA; mul.rn.bf16x2 $0, bits, $2; }",
            "=r,r,r",
            [words, rest],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    code = words.to(tl.int32) >> (4 * NIBBLE)
    value = (((code & 8) << 12) | ((code & 7) << 6)).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return (value.to(tl.float32) * rest.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def multiply_fp4(words, rest, first, second, third, fourth, ASSEMBLES: tl.constexpr):
    """Multiplies FP4 keys, four channels to a word, by what ``split_channels`` returns."""
    products = tl.dot(_widen_nibble(words, rest, 0, "shl.b32 bits, $1, 6;", "shl.b32 sign, $1, 12;", ASSEMBLES), first)
    products = tl.dot(_widen_nibble(words, rest, 1, "shl.b32 bits, $1, 2;", "shl.b32 sign, $1, 8;", ASSEMBLES), second, products)
    products = tl.dot(_widen_nibble(words, rest, 2, "shr.u32 bits, $1, 2;", "shl.b32 sign, $1, 4;", ASSEMBLES), third, products)
    return tl.dot(_widen_nibble(words, rest, 3, "shr.u32 bits, $1, 6;", "mov.b32 sign, $1;", ASSEMBLES), fourth, products)
