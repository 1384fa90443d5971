"""The layout in which Hopper kernels read NVFP4 weights, and its inverse.

Weights are cut into blocks of 64 rows x 128 columns; a block's 4096 bytes of codes lie behind each other, and so do
its 512 bytes of scales. Blocks follow each other along K, then along rows.

One ``wgmma`` takes 64 rows x 16 columns of weights from the registers of 128 threads. Thread 32 w + 4 g + q holds rows
16 w + g and 16 w + g + 8, columns 2 q + {0, 1} and 8 + 2 q + {0, 1}: eight codes, one 32-bit word. Bits of a word, in
each 16-bit half (low half: even column; * in the other half), and what a kernel does before it masks bits 15 and 8..6
of each half, where BF16 has its sign, low exponent and top mantissa bits:

    row g,     low columns    sign 15, exponent and mantissa 8..6           nothing
    row g + 8, low columns    sign 2*, exponent and mantissa 11..9          rotate right by 3
    row g,     high columns   sign 5*, exponent and mantissa 14..12         rotate right by 6
    row g + 8, high columns   sign 3, exponent 1 and 0, mantissa 4          keep only these, times 2**12 + 2**7 + 2**2

Three of these take two operations each; the fourth cannot, because the pattern 15, 8..6 does not tile the 16 bits. The
multiplication in the last row moves its bits by three distances at once, and none of the nine copies overlap.
A thread's words of steps 0..3 are 16 contiguous bytes, those of steps 4..7 are 2048 bytes further.

Scales become bytes with 5 exponent and 3 mantissa bits, value 2**(e - 10) * (1 + m / 8): every positive E4M3 value,
subnormals too, and never needs a shift by a data-dependent amount. Zero has no code: codes under a zero scale are
zeroed instead, which gives the same product. Scale word of warp w, thread group g and step pair s / 2 is at byte
256 (s / 4) + 64 w + 8 g + 4 (s / 2 % 2): row g of the even and the odd step, then row g + 8 of both, a byte each, the
word then rotated left by 4, so that masking leaves both rows of the even step where BF16 has exponent and mantissa,
and those of the odd step after a rotation by 8. Each half of a block along K, codes and scales, is contiguous.

Example: code 0b1011 (-1.5) at row 0, column 0 sets bits 15 (sign), 7 (exponent 01) and 6 (mantissa 1) of word 0.

Rows of a block are not in order: rows g and g + 8 of warp w hold output features 16 w + 2 g and 16 w + 2 g + 1 of the
block (``plain``), or gate and up of feature 8 w + g of 32 (``gate_up``), so that one thread ends up with both.
"""

from functools import lru_cache

import torch

SIGN_BITS = (15, 18, 21, 3)
EXPONENT_MANTISSA_BITS = ((8, 7, 6), (11, 10, 9), (14, 13, 12), (1, 0, 4))
"""Bit positions of the even column's code in a word, for each register; the odd column's are 16 higher, modulo 32."""


def plain_rows(num_rows: int) -> torch.Tensor:
    """Returns the source row of each packed row. Shapes: int64 [num_rows], blocks of [warp 4, half 2, g 8]."""
    block, warp, half, g = torch.meshgrid(*map(torch.arange, (num_rows // 64, 4, 2, 8)), indexing="ij")
    return (block * 64 + warp * 16 + 2 * g + half).flatten()


def gate_up_rows(num_rows: int) -> torch.Tensor:
    """Returns the source rows, as ``plain_rows``, for gate rows followed by as many up rows."""
    block, warp, half, g = torch.meshgrid(*map(torch.arange, (num_rows // 64, 4, 2, 8)), indexing="ij")
    return (block * 32 + warp * 8 + g + half * (num_rows // 2)).flatten()


@lru_cache(maxsize=8)
def _code_tables(device: torch.device) -> torch.Tensor:
    """Returns the word bits of a byte of two neighbouring codes, for each of four registers. Shapes: int32 [4, 256]."""
    byte = torch.arange(256)
    tables = torch.zeros(4, 256, dtype=torch.int64)
    for lane, code in enumerate((byte & 15, byte >> 4)):
        sign, exponent_mantissa = code >> 3, code & 7
        for register, (sign_bit, exponent_mantissa_bits) in enumerate(
            zip(SIGN_BITS, EXPONENT_MANTISSA_BITS, strict=True)
        ):
            tables[register] |= sign << (sign_bit + 16 * lane) % 32
            for target, bit in enumerate(reversed(exponent_mantissa_bits)):
                tables[register] |= (exponent_mantissa >> target & 1) << (bit + 16 * lane)
    return torch.where(tables >= 1 << 31, tables - (1 << 32), tables).to(torch.int32).to(device)


@lru_cache(maxsize=8)
def _scale_table(device: torch.device) -> torch.Tensor:
    """Returns the E5M3 byte of each positive E4M3 byte. Shapes: uint8 [128]; entries 0 and 127 (NaN) are unused."""
    table = []
    for byte in range(128):
        exponent, mantissa = byte >> 3, byte & 7
        if exponent:
            table.append(exponent + 3 << 3 | mantissa)
        else:
            shift = max(mantissa.bit_length() - 1, 0)
            table.append(shift + 1 << 3 | (mantissa << 3 - shift) & 7)
    return torch.tensor(table, dtype=torch.uint8, device=device)


def pack_codes(codes: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Packs row-major codes, two per byte, into the layout above.

    Shapes: codes uint8 [N, K/2], low nibble = even column; rows int64 [N] from ``plain_rows`` or ``gate_up_rows``;
    returns uint8 [N * K / 2]. N a multiple of 64, K of 128.
    """
    num_rows, num_bytes = codes.shape
    # [block, warp, half, g, k block, step high, step low, column half, q]
    ordered = codes[rows].view(num_rows // 64, 4, 2, 8, num_bytes // 64, 2, 4, 2, 4).long()
    tables = _code_tables(codes.device)
    words = torch.zeros_like(ordered[:, :, 0, :, :, :, :, 0], dtype=torch.int32)
    for register in range(4):
        words |= tables[register][ordered[:, :, register % 2, :, :, :, :, register // 2]]
    # [block, warp, g, k block, step high, step low, q] -> [block, k block, step high, warp, g, q, step low]
    return words.permute(0, 3, 4, 1, 2, 6, 5).contiguous().view(torch.uint8).flatten()


def unpack_codes(packed: torch.Tensor, rows: torch.Tensor, num_cols: int) -> torch.Tensor:
    """Inverts ``pack_codes``: returns uint8 [N, K/2]."""
    num_rows = len(rows)
    words = packed.view(torch.int32).view(num_rows // 64, num_cols // 128, 2, 4, 8, 4, 4)
    words = words.permute(0, 3, 4, 1, 2, 6, 5).long()
    shape = (num_rows // 64, 4, 2, 8, num_cols // 128, 2, 4, 2, 4)
    ordered = torch.empty(shape, dtype=torch.uint8, device=packed.device)
    for register, (sign, fields) in enumerate(zip(SIGN_BITS, EXPONENT_MANTISSA_BITS, strict=True)):
        byte = torch.zeros_like(words)
        for lane in range(2):
            for target, source in zip((3, 2, 1, 0), (sign, *fields), strict=True):
                byte |= (words >> (source + 16 * lane) % 32 & 1) << (target + 4 * lane)
        ordered[:, :, register % 2, :, :, :, :, register // 2] = byte.to(torch.uint8)
    codes = torch.empty(num_rows, num_cols // 2, dtype=torch.uint8, device=packed.device)
    codes[rows] = ordered.view(num_rows, num_cols // 2)
    return codes


def pack_scales(scale: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Converts E4M3 block scales to E5M3 bytes in the layout above.

    Shapes: scale E4M3 [N, K/16] (or its bytes), zero or positive; returns uint8 [N * K / 16].
    """
    bytes_ = scale.view(torch.uint8)
    encoded = _scale_table(scale.device)[(bytes_ & 0x7F).long()]
    return order_scales(encoded, rows)


def order_scales(encoded: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Reorders row-major bytes [N, K/16] to the block layout."""
    num_rows, num_groups = encoded.shape
    # [block, warp, half, g, k block, step high, pair, odd] -> [block, k block, step high, warp, g, pair, half, odd]
    ordered = encoded[rows].view(num_rows // 64, 4, 2, 8, num_groups // 8, 2, 2, 2)
    words = ordered.permute(0, 4, 5, 1, 3, 6, 2, 7).contiguous().flatten().view(torch.int32)
    return (words << 4 | words >> 28 & 15).view(torch.uint8).flatten()


def unpack_scales(packed: torch.Tensor, rows: torch.Tensor, num_cols: int) -> torch.Tensor:
    """Inverts ``pack_scales``: returns float32 [N, K/16]; zero scales come back as 2**-9 or 2**-10."""
    num_rows = len(rows)
    words = packed.view(torch.int32)
    bytes_ = (words >> 4 & 0x0FFFFFFF | words << 28).view(torch.uint8)
    ordered = bytes_.view(num_rows // 64, num_cols // 128, 2, 4, 8, 2, 2, 2).permute(0, 3, 6, 4, 1, 2, 5, 7)
    ordered = ordered.reshape(num_rows, num_cols // 16).int()
    values = torch.empty(num_rows, num_cols // 16, device=packed.device)
    values[rows] = torch.ldexp(1 + (ordered & 7) / 8, (ordered >> 3) - 10)
    return values


def pack_weight_(codes: torch.Tensor, scale: torch.Tensor, rows: torch.Tensor) -> None:
    """Packs one matrix in place: reorders its codes and scales and re-encodes the scales, in the same memory.

    Shapes: codes uint8 [N, K/2] and scale E4M3 [N, K/16], contiguous; N a multiple of 64, K of 128.
    """
    dead = scale.view(torch.uint8) & 0x7F == 0
    codes.masked_fill_(dead.repeat_interleave(8, dim=1), 0)
    codes.view(-1).copy_(pack_codes(codes, rows))
    scale.view(torch.uint8).view(-1).copy_(pack_scales(scale, rows))


def unpack_weight(
    codes: torch.Tensor, scale: torch.Tensor, rows: torch.Tensor, num_cols: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverts ``pack_weight_``. A block with scale zero comes back as zero codes with scale 2**-9, the same values.

    Shapes: codes and scale as packed, in any shape; rows int64 [N] on their device; returns codes uint8 [N, K/2], scale
    E4M3 [N, K/16].
    """
    unpacked = unpack_scales(scale.view(torch.uint8).flatten(), rows, num_cols)
    return unpack_codes(codes.flatten(), rows, num_cols), unpacked.to(torch.float8_e4m3fn)


def check_scales(name: str, scale: torch.Tensor) -> None:
    """Checks block scales. Errors: ValueError naming the tensor for a NaN or negative block scale."""
    bytes_ = scale.view(torch.uint8)
    if bool((bytes_ & 0x7F == 0x7F).any()):
        raise ValueError(f"{name} holds a NaN block scale")
    if bool((bytes_ > 0x80).any()):
        raise ValueError(f"{name} holds a negative block scale")
