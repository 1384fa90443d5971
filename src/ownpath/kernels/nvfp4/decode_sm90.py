"""Decodes NVFP4 codes in registers: the layout of ``kernels.nvfp4.layout`` to operands of the tensor cores.

E2M1's sign, exponent and mantissa bits are moved to the sign, low exponent and top mantissa bits of BF16, which is the
value times 2**-126 (subnormals included); the block scale, stored as a byte with a 5-bit exponent, is expanded to BF16
times 2**107. One BF16 multiply gives code * scale * 2**-19: 2 + 4 significant bits, exact. Roofline: 13.5 instructions
per 8 weights. Limits: scales are positive; whoever takes the sums multiplies them by 2**19.
"""

from cutlass import Uint32

from ownpath.kernels.dsl import ptx


def decode(word: Uint32, scales: Uint32) -> list[Uint32]:
    """Decodes 8 codes of a k16 step to BF16: registers (row g, low k), (g + 8, low), (g, high), (g + 8, high).

    scales: of rows g and g + 8, masked to their bits.
    """
    scale_low, scale_high = ptx.broadcast_halves(scales | Uint32(0x70007000))
    wanted = Uint32(0x81C081C0)
    first = word & wanted
    second = ptx.rotate_right(word, 3) & wanted
    third = ptx.rotate_right(word, 6) & wanted
    fourth = ptx.mad(word & Uint32(0x001B001B), 0x1084, 0) & wanted
    return [
        ptx.mul_bf16x2(first, scale_low),
        ptx.mul_bf16x2(second, scale_high),
        ptx.mul_bf16x2(third, scale_low),
        ptx.mul_bf16x2(fourth, scale_high),
    ]
