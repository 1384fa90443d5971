"""Device code that multiplies keys in pages: codes become bfloat16 in registers, exactly.

Legend: R keys, words of some codes each.
"""

import triton
import triton.language as tl

FP8_QUERY, FP8_WEIGHT = tl.constexpr(2.0**96), 2.0**24
"""Powers of two that make up for 2^-120: of queries, so that their products with keys are normal, and of weights."""
FP4_QUERY, FP4_WEIGHT = tl.constexpr(2.0**48), 2.0**15
"""The same for FP4 keys, of which registers hold 2^-63."""
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
def in_fours(q, I_PAD: tl.constexpr, DIM: tl.constexpr):
    """Returns queries across, [DIM, I_PAD]: first their channels 4j, then 4j + 1, 4j + 2 and 4j + 3."""
    fours = tl.trans(tl.reshape(q, (I_PAD, DIM // 4, 4)), (0, 2, 1))
    return tl.trans(tl.reshape(fours, (I_PAD, DIM)))


@triton.jit
def _side_by_side(first, second, third, fourth):
    """Joins tensors [R, C] to [R, 4C]."""
    joined = tl.join(tl.join(first, third), tl.join(second, fourth))
    return tl.reshape(tl.trans(joined, (0, 2, 3, 1)), (first.shape[0], 4 * first.shape[1]))


@triton.jit
def widen_fp8(words, ASSEMBLES: tl.constexpr):
    """Converts FP8 keys, four channels to a word, to numbers of 2^-120 times theirs, in the order of ``in_fours``."""
    first, second = _widen_byte(words, 0, "0x4000", ASSEMBLES), _widen_byte(words, 1, "0x5010", ASSEMBLES)
    third, fourth = _widen_byte(words, 2, "0x6020", ASSEMBLES), _widen_byte(words, 3, "0x7030", ASSEMBLES)
    return _side_by_side(first, second, third, fourth)


@triton.jit
def enlarged(q, FACTOR: tl.constexpr):
    """Returns queries times a power of two."""
    return (q.to(tl.float32) * FACTOR).to(tl.bfloat16)


@triton.jit
def spread_scales(scales, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Gives the words of a key the scales of their blocks, times 2^63: bfloat16 [R, WIDTH]. scales: four E8M0, int32
    [R]. All are NaN where one is, or is more than 2^64."""
    fields = scales + 0x3F3F3F3F  # 63 to each, the exponent of bfloat16 then
    nan = tl.where((scales & (scales << 1) & SIGNS) == 0, 0, 0x7FFF)
    first, second = ((fields << 7) & 0x7F80) | nan, ((fields >> 1) & 0x7F80) | nan
    third, fourth = ((fields >> 9) & 0x7F80) | nan, ((fields >> 17) & 0x7F80) | nan
    blocks = tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), (ROWS, 4, 1))
    blocks = blocks.to(tl.int16).to(tl.bfloat16, bitcast=True)
    return tl.reshape(tl.broadcast_to(blocks, (ROWS, 4, WIDTH // 4)), (ROWS, WIDTH))


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
def widen_fp4(words, scales, ASSEMBLES: tl.constexpr):
    """Converts FP4 keys, four channels to a word, to numbers of 2^-63 times theirs, in the order of ``in_fours``."""
    first = _widen_nibble(words, scales, 0, "shl.b32 bits, $1, 6;", "shl.b32 sign, $1, 12;", ASSEMBLES)
    second = _widen_nibble(words, scales, 1, "shl.b32 bits, $1, 2;", "shl.b32 sign, $1, 8;", ASSEMBLES)
    third = _widen_nibble(words, scales, 2, "shr.u32 bits, $1, 2;", "shl.b32 sign, $1, 4;", ASSEMBLES)
    fourth = _widen_nibble(words, scales, 3, "shr.u32 bits, $1, 6;", "mov.b32 sign, $1;", ASSEMBLES)
    return _side_by_side(first, second, third, fourth)


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
