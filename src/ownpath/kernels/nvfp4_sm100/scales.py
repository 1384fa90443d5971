"""The order in which Blackwell's block-scaled matrix instructions read block scales, and its inverse.

A tensor-core tile has 128 rows, and one instruction step covers 64 values of K, which in NVFP4 is four blocks of 16.
The scales of such a piece, 128 x 4 bytes, lie in one run of 512 bytes. Row r, column c of the piece is byte

    (r mod 32) * 16 + (r div 32) * 4 + c

so that 16 bytes hold one column strip of rows r, r + 32, r + 64, r + 96: each of the 32 lanes of tensor memory takes
one 16-byte piece. Pieces follow each other along K first, then along the rows. Rows and columns that fill the last
pieces up are zero: a zero scale contributes nothing, and no unwritten byte can be a NaN.

Worked example. Row 33, block 5 of a matrix with K = 256 (16 blocks, 4 pieces a row of pieces): piece 1, column 1,
lane 1, strip 1, so byte 1 * 512 + 1 * 16 + 1 * 4 + 1 = 533.

Source: the scale factor layout of ``tcgen05.mma`` with ``.scale_vec::4X`` (PTX ISA) and of cuBLASLt's block-scaled
products ("1D block scaling factors layout").
"""

import torch

PIECE_ROWS = 128
PIECE_COLUMNS = 4
LANES = 32


def swizzled_shape(num_rows: int, num_groups: int) -> tuple[int, int, int, int, int]:
    """Returns the shape [row pieces, column pieces, 32, 4, 4] of the scales of ``num_rows`` x ``num_groups`` blocks."""
    strips = PIECE_ROWS // LANES
    return -(-num_rows // PIECE_ROWS), -(-num_groups // PIECE_COLUMNS), LANES, strips, PIECE_COLUMNS


def swizzle_scales(scale: torch.Tensor) -> torch.Tensor:
    """Reorders block scales from row-major to the 128 x 4 order, padded with zeros to whole pieces.

    Shapes: scale of a one-byte dtype [..., N, G] -> same dtype [..., ceil(N/128), ceil(G/4), 32, 4, 4].
    Errors: ValueError for an element of more than one byte or fewer than two dimensions.
    """
    if scale.ndim < 2 or scale.dtype.itemsize != 1:
        raise ValueError(f"scale must be [..., N, G] of one-byte elements, not {scale.dtype} {tuple(scale.shape)}")
    *lead, num_rows, num_groups = scale.shape
    shape = swizzled_shape(num_rows, num_groups)
    padding = (0, shape[1] * PIECE_COLUMNS - num_groups, 0, shape[0] * PIECE_ROWS - num_rows)
    padded = torch.nn.functional.pad(scale.view(torch.uint8), padding)
    pieces = padded.view(*lead, shape[0], shape[3], LANES, shape[1], PIECE_COLUMNS)
    return pieces.movedim(-2, -4).transpose(-3, -2).contiguous().view(scale.dtype)


def unswizzle_scales(swizzled: torch.Tensor, num_rows: int, num_groups: int) -> torch.Tensor:
    """Reorders block scales from the 128 x 4 order back to row-major, without the padding.

    Shapes: swizzled [..., ceil(N/128), ceil(G/4), 32, 4, 4] -> [..., N, G].
    Errors: ValueError when ``swizzled`` is not the swizzled form of that many rows and blocks.
    """
    shape = swizzled_shape(num_rows, num_groups)
    if tuple(swizzled.shape[-5:]) != shape:
        raise ValueError(f"swizzled scales of {num_rows} x {num_groups} blocks are {shape}, not {swizzled.shape}")
    pieces = swizzled.view(torch.uint8).transpose(-3, -2).movedim(-4, -2)
    lead = swizzled.shape[:-5]
    padded = pieces.reshape(*lead, shape[0] * PIECE_ROWS, shape[1] * PIECE_COLUMNS)
    return padded[..., :num_rows, :num_groups].contiguous().view(swizzled.dtype)
