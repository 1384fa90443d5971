"""The layout in which the experts' FP8 kernel reads E2M1 codes under power-of-two scales, and its inverse.

A code times a power of two 2**e is an E4M3 number for e from -8 (0.5 becomes 2**-9, the smallest subnormal) to 6 (6
becomes 384): 15 powers. Every weight row has a power of two of its own, so that its largest block has e = 6; a row
whose blocks span more than 2**14 does not fit, nor does a scale that is no power of two, nor one that changes inside a
group of 32. Blocks without a code other than 0 fit anything.

Weights are cut into blocks of 64 rows x 128 columns; a block's 4096 bytes of codes lie behind each other, and so do its
256 bytes of scales. Blocks follow each other along K, then along rows.

One FP8 ``wgmma`` takes 64 rows x 32 columns from the registers of 128 threads. Thread 32 w + 4 g + q holds rows
16 w + g and 16 w + g + 8, columns 4 q + {0..3} and 16 + 4 q + {0..3}: for each row eight codes, one 32-bit word.
Magnitude i of the first four is at bits 4 i .. 4 i + 2, of the second four at 16 + 4 i ..; between them, the sign i of
the first four is at bit 8 i + 7, where byte i of an E4M3 word has it, that of the second four at bit 8 i + 3. A
thread's words of steps 0 and 1 (row g, row g + 8 of each) are 16 contiguous bytes, those of steps 2 and 3 are 2048
bytes further. Scales: byte s of the word at 64 w + 8 g + 4 h belongs to row 16 w + g + 8 h and columns 32 s ..; it is
8 (e + 8), the offset of a table of eight E4M3 bytes.

Rows of a block have the order of ``nvfp4.layout`` (``plain_rows``, ``gate_up_rows``).

Example: code 0b1011 (-1.5) at row 0, column 1 sets bits 15 (sign), 5 and 4 (magnitude 3) of word 0.
"""

from dataclasses import dataclass

import torch

LOWEST, HIGHEST = -8, 6
"""Exponents e for which every E2M1 code times 2**e is an E4M3 number."""
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def _e4m3(value: float) -> int:
    """Returns the E4M3 byte of a value that E4M3 holds."""
    return int(torch.tensor(value).to(torch.float8_e4m3fn).view(torch.uint8))


def _tables() -> tuple[tuple[int, int], ...]:
    found = []
    for exponent in range(LOWEST, HIGHEST + 1):
        packed = int.from_bytes(bytes(_e4m3(value * 2.0**exponent) for value in _MAGNITUDES), "little")
        found.append((packed & 0xFFFFFFFF, packed >> 32))
    return (*found, (0, 0))


TABLES = _tables()
"""For each byte of the scales, divided by 8: the E4M3 bytes of magnitudes 0..3 and 4..7."""


@dataclass(frozen=True)
class ScaleWindow:
    """The powers of two of a matrix's blocks.

    exponents: int32 [N, K/32]. used: bool [N, K/32], blocks with a code other than zero.
    """

    exponents: torch.Tensor
    used: torch.Tensor

    @property
    def row_exponents(self) -> torch.Tensor:
        """The power of two of each row, int32 [N]: its largest used block's e becomes ``HIGHEST``."""
        largest = torch.where(self.used, self.exponents, -1000).amax(dim=1)
        return torch.where(self.used.any(dim=1), largest, self.exponents.amax(dim=1)) - HIGHEST

    @property
    def relative(self) -> torch.Tensor:
        """Each block's e, int32 [N, K/32]; that of a block of zeros is moved into the window."""
        relative = self.exponents - self.row_exponents[:, None]
        return torch.where(self.used, relative, relative.clamp(LOWEST, HIGHEST))

    @property
    def fits(self) -> bool:
        """True if E4M3 holds every block."""
        return not bool((self.relative < LOWEST).any())


TOO_WIDE = f"the block scales of a row span more than 2**{HIGHEST - LOWEST}"


def mxfp4_window(codes: torch.Tensor, scale: torch.Tensor) -> ScaleWindow | str:
    """Reads a matrix's powers of two, or says why E4M3 cannot hold it. codes uint8 [N, K/2]; scale E8M0 [N, K/32]."""
    used = ((codes.view(torch.uint8) & 0x77) != 0).view(len(codes), -1, 16).any(dim=-1)
    window = ScaleWindow(scale.view(torch.uint8).int() - 127, used)
    return window if window.fits else TOO_WIDE


def nvfp4_window(codes: torch.Tensor, scale: torch.Tensor) -> ScaleWindow | str:
    """Reads a matrix's powers of two, or says why E4M3 cannot hold it. codes uint8 [N, K/2]; scale E4M3 [N, K/16]."""
    raw = (scale.view(torch.uint8) & 0x7F).int()
    live = ((codes.view(torch.uint8) & 0x77) != 0).view(len(codes), -1, 8).any(dim=-1) & (raw > 0)
    exponent, mantissa = raw >> 3, raw & 7
    # Subnormals are mantissa * 2**-9: the powers among them are 2**-9, 2**-8 and 2**-7.
    is_power = torch.where(exponent > 0, mantissa == 0, (mantissa & (mantissa - 1)) == 0)
    if bool((live & ~is_power).any()):
        return "a block scale is no power of two"
    subnormal = (mantissa >= 2).int() + (mantissa >= 4).int() - 9
    halves = torch.where(exponent > 0, exponent - 7, subnormal).unflatten(1, (-1, 2))
    live_halves = live.unflatten(1, (-1, 2))
    if bool((live_halves.all(dim=-1) & (halves[..., 0] != halves[..., 1])).any()):
        return "a block scale changes inside a group of 32"
    is_second = live_halves[..., 1] & ~live_halves[..., 0]
    window = ScaleWindow(torch.where(is_second, halves[..., 1], halves[..., 0]), live_halves.any(dim=-1))
    return window if window.fits else TOO_WIDE


def pack_codes(codes: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Packs row-major codes, two per byte, into the layout above.

    Shapes: codes uint8 [N, K/2], low nibble = even column; rows int64 [N], the source of each packed row; returns
    uint8 [N * K / 2]. N a multiple of 64, K of 128.
    """
    num_rows, num_bytes = codes.shape
    nibbles = torch.stack((codes & 15, codes >> 4), dim=-1)[rows].to(torch.int64)
    # [block, warp, half, g, k block, step high, step low, side, q, i]
    ordered = nibbles.view(num_rows // 64, 4, 2, 8, num_bytes // 64, 2, 2, 2, 4, 4)
    words = torch.zeros_like(ordered[..., 0, :, 0])
    for side, sign_bit in enumerate((7, 3)):
        for i in range(4):
            code = ordered[..., side, :, i]
            words |= (code & 7) << (16 * side + 4 * i) | (code >> 3) << (8 * i + sign_bit)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    # [block, warp, half, g, k block, step high, step low, q] -> [block, k block, step high, warp, g, q, step low, half]
    return words.permute(0, 4, 5, 1, 3, 7, 6, 2).contiguous().view(torch.uint8).flatten()


def unpack_codes(packed: torch.Tensor, rows: torch.Tensor, num_cols: int) -> torch.Tensor:
    """Inverts ``pack_codes``: returns uint8 [N, K/2]."""
    num_rows = len(rows)
    words = packed.view(torch.int32).view(num_rows // 64, num_cols // 128, 2, 4, 8, 4, 2, 2)
    words = words.permute(0, 3, 7, 4, 1, 2, 6, 5).to(torch.int64)
    shape = (num_rows // 64, 4, 2, 8, num_cols // 128, 2, 2, 2, 4, 4)
    ordered = torch.empty(shape, dtype=torch.uint8, device=packed.device)
    for side, sign_bit in enumerate((7, 3)):
        for i in range(4):
            magnitude, sign = words >> (16 * side + 4 * i) & 7, words >> (8 * i + sign_bit) & 1
            ordered[..., side, :, i] = (magnitude | sign << 3).to(torch.uint8)
    pairs = ordered.view(num_rows, num_cols // 2, 2)
    codes = torch.empty(num_rows, num_cols // 2, dtype=torch.uint8, device=packed.device)
    codes[rows] = pairs[..., 0] | pairs[..., 1] << 4
    return codes


def pack_scales(relative: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Packs the blocks' e, int32 [N, K/32], into table offsets in the layout above: uint8 [N * K / 32]."""
    num_rows, num_groups = relative.shape
    offsets = (8 * (relative - LOWEST)).to(torch.uint8)
    # [block, warp, half, g, k block, step] -> [block, k block, warp, g, half, step]
    return offsets[rows].view(num_rows // 64, 4, 2, 8, num_groups // 4, 4).permute(0, 4, 1, 3, 2, 5).flatten()


def unpack_scales(packed: torch.Tensor, rows: torch.Tensor, num_cols: int) -> torch.Tensor:
    """Inverts ``pack_scales``: returns int32 [N, K/32]."""
    num_rows = len(rows)
    ordered = packed.view(num_rows // 64, num_cols // 128, 4, 8, 2, 4).permute(0, 2, 4, 3, 1, 5)
    relative = torch.empty(num_rows, num_cols // 32, dtype=torch.int32, device=packed.device)
    relative[rows] = ordered.reshape(num_rows, -1).int() // 8 + LOWEST
    return relative
