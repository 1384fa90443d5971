"""What becomes of a tile's float32 sums: global scales, SwiGLU, rounding, and where in the output they go.

How it works. Packing puts output features 2g and 2g + 1 (or gate and up of one feature) into rows g and g + 8 of a
``wgmma``, so that a thread holds both: it writes pairs of neighbouring features, or trades with its neighbour in g
after SwiGLU to have such pairs again. Roofline: the bytes of the output, in 32-byte sectors. Limits: as ``gemm_sm90``.
"""

from typing import Any

import cutlass
from cutlass import Float32, Int32, Int64, cute

from ownpath.kernels.dsl import ptx
from ownpath.kernels.nvfp4.config import UNSCALE, GemmConfig


class Epilogue:
    """The output side of one ``GemmConfig``."""

    def __init__(self, config: GemmConfig) -> None:
        self.cfg = config

    def factors(self, global_scale: cute.Pointer, expert: Int32, block: Int32, lane: Int32) -> tuple[Any, Any]:
        """What the sums of rows g and g + 8 of this thread are multiplied by."""
        cfg = self.cfg
        table = cute.make_tensor(global_scale, cute.make_layout(1 << 30))
        if cutlass.const_expr(cfg.grouped):
            first, second = table[2 * expert], table[2 * expert + 1]
        else:
            row = block * 64 + lane // 32 * 16 + lane % 32 // 4 * 2
            first, second = table[row], table[row + 1]
        return first * Float32(UNSCALE), second * Float32(UNSCALE)

    def place(self, out: cute.Pointer, row0: Int32, block: Int32, lane: Int32, ld_out: Int32) -> tuple[Int64, Int64]:
        """Byte address of this thread's first output element, and bytes from token to token."""
        g, q, warp = lane % 32 // 4, lane % 4, lane // 32
        width = 4 if self.cfg.wide else 2
        if self.cfg.swiglu:
            # Odd g write the second token of the pair.
            feature, token = block * 32 + warp * 8 + g // 2 * 2, 2 * q + g % 2
        else:
            feature, token = block * 64 + warp * 16 + 2 * g, 2 * q
        pitch = Int64(ld_out) * width
        return out.toint() + Int64(feature) * width + Int64(row0 + token) * pitch, pitch

    @cute.jit
    def store(
        self,
        values: list[Any],
        factors: tuple[Any, Any],
        place: Int64,
        pitch: Int64,
        left: Int32,
        lane: Int32,
        swiglu_limit: Float32,
    ) -> None:
        """Writes one 16 x 8 piece of a warp: rows (g, g + 8) of tokens (2q, 2q + 1), of which ``left`` exist.

        Packing puts output features 2g and 2g + 1 (or gate and up of one feature) into rows g and g + 8, so that a
        thread holds a pair of neighbouring features of each token.
        """
        even = [values[0] * factors[0], values[2] * factors[1]]
        odd = [values[1] * factors[0], values[3] * factors[1]]
        if cutlass.const_expr(self.cfg.swiglu):
            hidden_even = self.activate(even[0], even[1], swiglu_limit)
            hidden_odd = self.activate(odd[0], odd[1], swiglu_limit)
            # Neighbours in g trade, so that each writes two features of one token.
            odd_g = lane // 4 % 2
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
                        ptx.store_global_vec2(place + column * pitch, pair)
                    else:
                        ptx.store_global(place + column * pitch, ptx.pack_bf16x2(*pair))

    def activate(self, gate: Float32, up: Float32, limit: Float32) -> Float32:
        """silu(min(gate, limit)) * clamp(up, -limit, limit)."""
        gate = ptx.minimum(gate, limit)
        up = ptx.maximum(ptx.minimum(up, limit), -limit)
        return gate * up * ptx.reciprocal(1.0 + ptx.exp2(gate * Float32(-1.4426950408889634)))
