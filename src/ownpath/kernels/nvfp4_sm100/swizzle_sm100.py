"""The 128 x 4 order of block scales in device code: offsets for stores, and loads of tiles.

The order itself, with a worked example, is in ``kernels.nvfp4_sm100.scales``. A kernel that makes scales computes each
one's offset; four scales of a row are 4 adjacent bytes. A kernel that multiplies fetches whole 512-byte pieces by TMA
as blocks [1, row pieces, column pieces, 2, 256] (a TMA box holds at most 256 elements a dimension) and renames the
axes to [rows, groups]; the compiler sees through the renaming and copies the bytes from shared to tensor memory as
they are (``tcgen05.cp``), so that reading costs no shuffle. Bound by nothing of its own; limits: whole pieces only.
"""

import triton
import triton.language as tl


@triton.jit
def scale_offsets(rows, groups, num_column_pieces):
    """Returns byte offsets [R, G] of scales at rows x groups of a matrix with ``num_column_pieces`` = ceil(K / 64)."""
    piece = (rows // 128).to(tl.int64)[:, None] * num_column_pieces + (groups // 4)[None, :]
    inside_row = rows % 32 * 16 + rows % 128 // 32 * 4
    return piece * 512 + inside_row[:, None] + (groups % 4)[None, :]


@triton.jit
def load_scales(descriptor, row_piece, column_piece, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """Loads a tile [ROWS, GROUPS] of swizzled E4M3 scales, whose first piece is (row_piece, column_piece)."""
    pieces = descriptor.load([0, row_piece, column_piece, 0, 0])
    split = tl.reshape(pieces, (ROWS // 128, GROUPS // 4, 32, 4, 4))
    return tl.reshape(tl.permute(split, (0, 3, 2, 1, 4)), (ROWS, GROUPS))
