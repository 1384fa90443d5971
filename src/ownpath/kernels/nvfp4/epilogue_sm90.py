"""The epilogue of an NVFP4 product: global scales, SwiGLU, rounding and stores of a tile's float32 sums.

How it works. Packing puts output features 2g and 2g + 1 (or gate and up of one feature) into rows g and g + 8 of a
``wgmma``, so that a thread holds both: it writes pairs of neighbouring features, or trades with its neighbour in g
after SwiGLU to have such pairs again. Roofline: the bytes of the output, in 32-byte sectors. Limits: as ``gemm_sm90``.
"""

from dataclasses import dataclass

import cutlass
from cutlass import Float32, Int32, Int64, cute

from ownpath.kernels.dsl import ptx
from ownpath.kernels.dsl.warpgroup import Thread
from ownpath.kernels.nvfp4.config import UNSCALE, GemmConfig
from ownpath.kernels.nvfp4.tile_sm90 import Tile


@dataclass(frozen=True)
class ThreadRows:
    """A thread's two rows of a 64-row block, for all tokens of a tile.

    factors: multipliers of the sums of rows g and g + 8. place: byte address of the thread's first output element.
    pitch: bytes from token to token. num_tokens: of the tile.
    """

    thread: Thread
    factors: tuple[Float32, Float32]
    place: Int64
    pitch: Int64
    num_tokens: Int32


@dataclass(frozen=True)
class Epilogue:
    """The output of a call. global_scale: float32, two per expert or one per row. ld_out: elements between tokens."""

    cfg: GemmConfig
    global_scale: cute.Pointer
    out: cute.Pointer
    ld_out: Int32
    swiglu_limit: Float32

    def rows(self, tile: Tile, block: Int32, thread: Thread) -> ThreadRows:
        """Returns the thread's rows of a 64-row block of the weight."""
        factors = self.factors(tile.expert, block, thread)
        place, pitch = self.place(tile.row0, block, thread)
        return ThreadRows(thread, factors, place, pitch, tile.rows)

    def factors(self, expert: Int32, block: Int32, thread: Thread) -> tuple[Float32, Float32]:
        """Returns the multipliers of this thread's sums of rows g and g + 8."""
        table = cute.make_tensor(self.global_scale, cute.make_layout(1 << 30))
        if cutlass.const_expr(self.cfg.grouped):
            first, second = table[2 * expert], table[2 * expert + 1]
        else:
            row = block * 64 + thread.warp * 16 + thread.row * 2
            first, second = table[row], table[row + 1]
        return first * Float32(UNSCALE), second * Float32(UNSCALE)

    def place(self, row0: Int32, block: Int32, thread: Thread) -> tuple[Int64, Int64]:
        """Returns the byte address of this thread's first output element, and the bytes from token to token."""
        g, q, warp = thread.row, thread.pair, thread.warp
        width = 4 if self.cfg.wide else 2
        if self.cfg.swiglu:
            # Odd g write the second token of the pair.
            feature, token = block * 32 + warp * 8 + g // 2 * 2, 2 * q + g % 2
        else:
            feature, token = block * 64 + warp * 16 + 2 * g, 2 * q
        pitch = Int64(self.ld_out) * width
        return self.out.toint() + Int64(feature) * width + Int64(row0 + token) * pitch, pitch

    @cute.jit
    def store(self, values: list[Float32], rows: ThreadRows, piece: int) -> None:
        """Writes one 16 x 8 piece of a warp: rows (g, g + 8) of tokens (2q, 2q + 1), where those exist.

        Packing puts output features 2g and 2g + 1 (or gate and up of one feature) into rows g and g + 8, so that a
        thread holds a pair of neighbouring features of each token.
        """
        factors, place = rows.factors, rows.place + 8 * piece * rows.pitch
        left = rows.num_tokens - (8 * piece + 2 * rows.thread.pair)
        even = [values[0] * factors[0], values[2] * factors[1]]
        odd = [values[1] * factors[0], values[3] * factors[1]]
        if cutlass.const_expr(self.cfg.swiglu):
            hidden_even = swiglu(even[0], even[1], self.swiglu_limit)
            hidden_odd = swiglu(odd[0], odd[1], self.swiglu_limit)
            # Neighbours in g exchange values, so that each writes two features of one token.
            odd_g = rows.thread.idx // 4 % 2
            given = hidden_even if odd_g == 1 else hidden_odd
            taken = cute.arch.shuffle_sync_bfly(given, offset=4)
            low = taken if odd_g == 1 else hidden_even
            high = hidden_odd if odd_g == 1 else taken
            if odd_g < left:
                ptx.store_global(place, ptx.pack_bf16x2(low, high))
        else:
            for column, pair in enumerate((even, odd)):
                if column < left:
                    if cutlass.const_expr(self.cfg.wide):
                        ptx.store_global_vec2(place + column * rows.pitch, pair)
                    else:
                        ptx.store_global(place + column * rows.pitch, ptx.pack_bf16x2(*pair))


def swiglu(gate: Float32, up: Float32, limit: Float32) -> Float32:
    """Computes silu(min(gate, limit)) * clamp(up, -limit, limit)."""
    gate = ptx.minimum(gate, limit)
    up = ptx.maximum(ptx.minimum(up, limit), -limit)
    return gate * up * ptx.reciprocal(1.0 + ptx.exp2(gate * Float32(-1.4426950408889634)))
