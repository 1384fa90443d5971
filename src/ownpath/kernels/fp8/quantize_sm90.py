"""Quantises activations on Hopper: BF16 rows to E4M3 with one scale per 1 x 128, in the layout of W8A8's operand.

How it works. Eight threads share 128 columns of a row, of one or of two blocks, whose loads they start together. Each
loads 16 values of a block (two 16-byte loads), the eight find the largest magnitude by three shuffles, and each writes
four 4-byte words. The words have the positions that ``kernels.fp8.layout`` gives to the weights' bytes of the same k,
64 rows x 128 columns to a block of 8 KiB, with the block's 64 float32 scales behind it, so that the product fetches an
operand block with its scales by one bulk copy. Where the product before leaves few SMs free, this kernel's CTAs gather
on those and wait there, so that instructions behind the wait are time in front of the product.

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
from ownpath.kernels.fp8.config import QUANTIZE_ROWS, QUANTIZE_SPREAD_BYTES, QUANTIZE_THREADS, QuantizeConfig
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
        num_groups: Int32,
        num_rows: Int32,
    ) -> None:
        """Host side, used to compile only."""
        self.kernel(x, blocks, num_tokens, width, ld_x, num_k_blocks).launch(
            grid=[num_groups, num_rows, 1], block=[QUANTIZE_THREADS, 1, 1]
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
        group, rows, _ = cute.arch.block_idx()
        if cutlass.const_expr(self.cfg.is_spread):
            taken = cute.arch.alloc_smem(Uint8, QUANTIZE_SPREAD_BYTES, 16)
            ptx.store_shared_vec4(taken.toint(), (Float32(0.0),) * 4)  # or the compiler drops it
        cute.arch.griddepcontrol_launch_dependents()
        part, line = thread & 7, thread >> 3
        token, first = rows * QUANTIZE_ROWS + line, group * self.cfg.num_k
        num_columns, num_blocks = width - (first * 128 + part * 16), num_k_blocks - first
        if token >= num_tokens:
            num_columns, num_blocks = Int32(0), Int32(0)
        source = x + (Int64(token) * ld_x + (first * 128 + part * 16))
        row = (rows & 1) * QUANTIZE_ROWS + line
        unit = (part >> 2) ^ (row & 7)
        block = blocks.toint() + (Int64(rows >> 1) * num_k_blocks + first) * ACT_BLOCK_BYTES
        # The previous kernel may still write x, or read the blocks that this one writes.
        cute.arch.griddepcontrol_wait()
        loaded: list[list[Uint32]] = []
        for step in cutlass.range_constexpr(self.cfg.num_k):
            words: list[Uint32] = []
            for column in (128 * step, 128 * step + 8):
                words += fp8_ptx.load_global16_or_zero((source + column).toint(), num_columns > column)
            loaded.append(words)
        for step in cutlass.range_constexpr(self.cfg.num_k):
            target = block + (step * ACT_BLOCK_BYTES + row * 128 + unit * 16 + (part & 3) * 4)
            scale_at = block + (step * ACT_BLOCK_BYTES + BLOCK_BYTES + row * 4)
            self.quantize(loaded[step], target, scale_at, part == 0, num_blocks > step)

    @cute.jit
    def quantize(
        self,
        words: list[Uint32],
        target: Int64,
        scale_at: Int64,
        is_first: cutlass.Boolean,
        is_there: cutlass.Boolean,
    ) -> None:
        """Rounds a thread's 16 values of a row of a block, and writes them where the block is there."""
        largest = words[0] & Uint32(0x7FFF7FFF)
        for word in words[1:]:
            largest = fp8_ptx.max_u16x2(largest, word & Uint32(0x7FFF7FFF))
        for step in (1, 2, 4):
            largest = fp8_ptx.max_u16x2(largest, cute.arch.shuffle_sync_bfly(largest, offset=step))
        values = [value for word in words for value in (ptx.widen_bf16(word, False), ptx.widen_bf16(word, True))]
        scale, scaled = self.scale_values(fp8_ptx.max_u32(largest << 16, largest & Uint32(0xFFFF0000)), values)
        if is_there:
            self.write(target, scaled)
            if is_first:
                fp8_ptx.store_global_float(scale_at, scale)

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

    def write(self, target: Int64, scaled: list[Float32]) -> None:
        """Writes four words: columns {2q + 8, 2q, 2q + 9, 2q + 1} of 16 to unit 2q + part / 4, word part % 4.

        target: of q = 0. Rows of a block start at multiples of 128 bytes: a unit's number is exchanged in place.
        """
        for q in range(4):
            word = fp8_ptx.to_e4m3x4(scaled[2 * q + 8], scaled[2 * q], scaled[2 * q + 9], scaled[2 * q + 1])
            ptx.store_global(target ^ Int64(32 * q), word)


def compile_quantize(config: QuantizeConfig) -> Any:
    """Compiles for sm_90a; no GPU is needed."""
    ptr = cute.runtime.make_ptr
    space = cute.AddressSpace.gmem
    one = Int32(1)
    return cute.compile(
        Quantize(config),
        ptr(BFloat16, 1024, space, assumed_align=16),
        ptr(Uint8, 1024, space, assumed_align=128),
        one, Int32(128), Int32(128), one, one, one,
    )  # fmt: skip
