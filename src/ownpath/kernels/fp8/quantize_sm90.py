"""Quantises activations on Hopper: BF16 rows to E4M3 with one scale per 1 x 128, in the layout of W8A8's operand.

How it works. Eight threads share 128 columns of a row, of one or of two blocks, whose loads they start together. Each
loads 16 values of a block (two 16-byte loads), the eight find the largest magnitude by three shuffles, and each writes
four 4-byte words. The words have the positions that ``kernels.fp8.layout`` gives to the weights' bytes of the same k,
64 rows x 128 columns to a block of 8 KiB, with the block's 64 float32 scales behind it, so that the product fetches an
operand block with its scales by one bulk copy.

Scale. ``power_of_two``: 2**ceil(log2(max(amax, 1e-4) / 448)), from the bits. Otherwise max(amax, 1e-4) / 448, divided
exactly. A NaN or infinity makes its scale NaN, so that it reaches the output. DeepSeek's released quantisers.

Roofline. Memory: 3.03 bytes per value; 2048 x 8192 is 51 MB. Rows of a block beyond the last token are not written:
they only enter sums that are not stored. Limits: K a multiple of 8; 16-byte aligned rows; sm_90a.
"""

from typing import Any

import cutlass
from cutlass import BFloat16, Float32, Int32, Int64, Uint8, Uint32, cute

from ownpath.kernels.dsl import ptx
from ownpath.kernels.fp8 import ptx as fp8_ptx
from ownpath.kernels.fp8.config import QUANTIZE_ROWS, QUANTIZE_THREADS, QuantizeConfig
from ownpath.kernels.fp8.layout import ACT_BLOCK_BYTES, BLOCK_BYTES


class Quantize:
    """Builds the kernel of one ``QuantizeConfig``."""

    def __init__(self, config: QuantizeConfig) -> None:
        self.cfg = config

    @cute.jit
    def __call__(
        self,
        x: cute.Pointer,
        blocks: cute.Pointer,
        num_tokens: Int32,
        width: Int32,
        ld_x: Int32,
        num_k_blocks: Int32,
        grid: Int32,
    ) -> None:
        """Host side, used to compile only."""
        self.kernel(x, blocks, num_tokens, width, ld_x, num_k_blocks).launch(
            grid=[grid, 1, 1], block=[QUANTIZE_THREADS, 1, 1]
        )

    @cute.kernel
    def kernel(
        self,
        x: cute.Pointer,
        blocks: cute.Pointer,
        num_tokens: Int32,
        width: Int32,
        ld_x: Int32,
        num_k_blocks: Int32,
    ) -> None:
        thread, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        cute.arch.griddepcontrol_launch_dependents()
        part = thread % 8
        num_groups = (num_k_blocks + self.cfg.num_k - 1) // self.cfg.num_k
        token = cta // num_groups * QUANTIZE_ROWS + thread // 8
        first = cta % num_groups * self.cfg.num_k
        # The previous kernel may still write x, or read the blocks that this one writes.
        cute.arch.griddepcontrol_wait()
        loaded: list[list[Uint32]] = []
        for step in cutlass.range_constexpr(self.cfg.num_k):
            words: list[Uint32] = []
            for half in cutlass.range_constexpr(2):
                column = (first + step) * 128 + part * 16 + 8 * half
                inside = token < num_tokens and column < width
                offset = Int64(token) * ld_x + column
                words += fp8_ptx.load_global16_or_zero(x + (offset if inside else Int64(0)), inside)
            loaded.append(words)
        block = blocks + (Int64(token // 64) * num_k_blocks + first) * ACT_BLOCK_BYTES
        for step in cutlass.range_constexpr(self.cfg.num_k):
            is_there = token < num_tokens and first + step < num_k_blocks
            self.quantize(loaded[step], block + step * ACT_BLOCK_BYTES, token % 64, part, is_there)

    @cute.jit
    def quantize(
        self, words: list[Uint32], block: cute.Pointer, row: Int32, part: Int32, is_there: cutlass.Boolean
    ) -> None:
        """Rounds a thread's 16 values of a row of a block, and writes them where the block is there."""
        largest = Uint32(0)
        for word in words:
            largest = fp8_ptx.max_u32(largest, word & Uint32(0x7FFF))
            largest = fp8_ptx.max_u32(largest, (word >> 16) & Uint32(0x7FFF))
        for step in (1, 2, 4):
            largest = fp8_ptx.max_u32(largest, cute.arch.shuffle_sync_bfly(largest, offset=step))
        values = []
        for word in words:
            values += [ptx.as_float(word << 16), ptx.as_float(word & Uint32(0xFFFF0000))]
        scale, scaled = self.scale_values(largest << 16, values)
        if is_there:
            self.write(block, row, part, scaled)
            if part == 0:
                target = cute.recast_ptr(block + (BLOCK_BYTES + row * 4), dtype=Float32)
                cute.make_tensor(target, cute.make_layout(1))[0] = scale

    def scale_values(self, amax_bits: Uint32, values: list[Float32]) -> tuple[Float32, list[Float32]]:
        """Returns a block's scale, from the float32 bits of its largest magnitude, and its values over the scale."""
        floor = Uint32(0x38D1B717)  # 1e-4
        bits = fp8_ptx.max_u32(amax_bits, floor)
        if cutlass.const_expr(self.cfg.power_of_two):
            # 448 = 1.75 * 2**8: the biased exponent, less 8, plus one where the mantissa is above 1.75's.
            exponent = (bits + Uint32(0x1FFFFF)) >> 23
            exponent = exponent - Uint32(8)
            scale = ptx.as_float(exponent << 23)
            factor = ptx.as_float((Uint32(254) - exponent) << 23)
            scaled = [value * factor for value in values]
        else:
            scale = fp8_ptx.divide(ptx.as_float(bits), Float32(448.0))
            scaled = [fp8_ptx.divide(value, scale) for value in values]
        return fp8_ptx.nan_unless_finite(scale, amax_bits), scaled

    def write(self, block: cute.Pointer, row: Int32, part: Int32, scaled: list[Float32]) -> None:
        """Writes four words: columns {2q + 8, 2q, 2q + 9, 2q + 1} of 16 to unit 2q + part / 4, word part % 4."""
        for q in range(4):
            word = fp8_ptx.to_e4m3x4(scaled[2 * q + 8], scaled[2 * q], scaled[2 * q + 9], scaled[2 * q + 1])
            unit = (2 * q + part // 4) ^ (row % 8)
            target = cute.recast_ptr(block + (row * 128 + unit * 16 + part % 4 * 4), dtype=Uint32)
            cute.make_tensor(target, cute.make_layout(1))[0] = word


def compile_quantize(config: QuantizeConfig) -> Any:
    """Compiles for sm_90a; no GPU is needed."""
    ptr = cute.runtime.make_ptr
    space = cute.AddressSpace.gmem
    one = Int32(1)
    return cute.compile(
        Quantize(config),
        ptr(BFloat16, 1024, space, assumed_align=16),
        ptr(Uint8, 1024, space, assumed_align=128),
        one, Int32(128), Int32(128), one, one,
    )  # fmt: skip
