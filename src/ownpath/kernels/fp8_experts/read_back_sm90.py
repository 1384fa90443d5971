"""Rounds BF16 rows to E4M3 with a power-of-two scale per 1 x 128 and writes the values as BF16, which holds them.

How it works. As ``quantize_sm90``: eight threads share 128 columns; the E4M3 words are expanded again, exactly, and
multiplied by the scale. Rows may be rounded in place. The kernel behind may read them without waiting for this one
(``nvfp4.gemm_sm90``'s second product does), so it may start only when every CTA has written.

Roofline. Memory: 4 bytes per value. Limits: as ``quantize_sm90``.
"""

from typing import Any

import cutlass
from cutlass import BFloat16, Int32, Int64, Uint32, cute

from ownpath.kernels.dsl import ptx
from ownpath.kernels.fp8 import ptx as fp8_ptx
from ownpath.kernels.fp8.config import QuantizeConfig
from ownpath.kernels.fp8.quantize_sm90 import Quantize
from ownpath.kernels.fp8_experts import ptx as own_ptx
from ownpath.kernels.fp8_experts.config import QUANTIZE_GROUPS
from ownpath.kernels.fp8_experts.read_back_config import ReadBackConfig


class ReadBack:
    """Builds the kernel."""

    def __init__(self) -> None:
        self.rounding = Quantize(QuantizeConfig(power_of_two=True))

    @cute.jit
    def __call__(
        self, x: cute.Pointer, out: cute.Pointer, num_rows: Int32, width: Int32, ld_x: Int32, grid: Int32
    ) -> None:
        """Host side, used to compile only."""
        self.kernel(x, out, num_rows, width, ld_x).launch(grid=[grid, 1, 1], block=[8 * QUANTIZE_GROUPS, 1, 1])

    @cute.kernel
    def kernel(self, x: cute.Pointer, out: cute.Pointer, num_rows: Int32, width: Int32, ld_x: Int32) -> None:
        """Rounds one block of 1 x 128 per eight threads. ld_x: elements between rows of x; out is contiguous."""
        thread, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        cute.arch.griddepcontrol_wait()
        block = cta * QUANTIZE_GROUPS + thread // 8
        row, column = block // (width // 128), block % (width // 128) * 128 + thread % 8 * 16
        source = (x + (Int64(cutlass.min(row, num_rows - 1)) * ld_x + column)).toint()
        words = [*ptx.load_global_vec4(source), *ptx.load_global_vec4(source + 16)]
        largest = Uint32(0)
        for word in words:
            largest = fp8_ptx.max_u32(largest, word & Uint32(0x7FFF))
            largest = fp8_ptx.max_u32(largest, (word >> 16) & Uint32(0x7FFF))
        for step in (1, 2, 4):
            largest = fp8_ptx.max_u32(largest, cute.arch.shuffle_sync_bfly(largest, offset=step))
        values = []
        for word in words:
            values += [ptx.widen_bf16(word, False), ptx.widen_bf16(word, True)]
        scale, scaled = self.rounding.scale_values(largest << 16, values)
        narrow = [fp8_ptx.to_e4m3x4(*scaled[4 * idx : 4 * idx + 4]) for idx in range(4)]
        rounded = [value for word in narrow for value in own_ptx.widen_e4m3(word)]
        packed = [ptx.pack_bf16x2(scale * rounded[2 * idx], scale * rounded[2 * idx + 1]) for idx in range(8)]
        if row < num_rows:
            target = (out + (Int64(row) * width + column)).toint()
            ptx.store_global_vec4(target, tuple(packed[:4]))
            ptx.store_global_vec4(target + 16, tuple(packed[4:]))
        own_ptx.release_writes()
        cute.arch.griddepcontrol_launch_dependents()


def compile_read_back(_config: ReadBackConfig) -> Any:
    """Compiles for sm_90a; no GPU is needed."""
    rows = cute.runtime.make_ptr(BFloat16, 1024, cute.AddressSpace.gmem, assumed_align=16)
    one = Int32(1)
    return cute.compile(ReadBack(), rows, rows, one, Int32(128), Int32(128), one)
