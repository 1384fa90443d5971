"""Quantises rows for the experts' FP8 products: BF16 to E4M3 with a power-of-two scale per 1 x 128.

How it works. Eight threads share 128 columns of a row, 16 values each (two 16-byte loads); three shuffles find the
largest magnitude, and each thread writes its 16 bytes. A token's row is read and quantised once and written to each of
its places in the experts' order (``spreads``), or to its own (the hidden rows, which have that order already). Scales
are float32 [K / 128, rows], so that a tile's scales of a K block are contiguous.

Scale. 2**ceil(log2(max(amax, 1e-4) / 448)), from the bits, as ``fp8.quantize_sm90``: DeepSeek's released quantiser. A
NaN or infinity makes its scale NaN, so that it reaches the output.

Roofline. Memory: 3.03 bytes per value of hidden rows; 2 + 1.03 times the places for tokens. Limits: K a multiple of
128; 16-byte aligned rows; sm_90a.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
from cutlass import BFloat16, Float32, Int32, Int64, Uint8, Uint32, cute

from ownpath.kernels.dsl import ptx
from ownpath.kernels.fp8 import ptx as fp8_ptx
from ownpath.kernels.fp8.config import QuantizeConfig
from ownpath.kernels.fp8.quantize_sm90 import Quantize
from ownpath.kernels.fp8_experts.config import QUANTIZE_GROUPS, QuantizeRowsConfig
from ownpath.kernels.nvfp4.schedule import Schedule, element


@dataclass(frozen=True)
class Target:
    """Quantised rows [rows, width], and their blocks' scales, ``ld_scales`` floats from one K block to the next."""

    out: cute.Pointer
    scales: cute.Pointer
    width: Int32
    ld_scales: Int32

    @cute.jit
    def write(self, row: Int32, k_block: Int32, part: Int32, packed: tuple[Uint32, ...], scale: Float32) -> None:
        """Writes a thread's 16 bytes of a row's block, and the scale once."""
        place = self.out.toint() + Int64(row) * self.width + k_block * 128 + part * 16
        ptx.store_global_vec4(place, packed)
        if part == 0:
            cute.make_tensor(self.scales + (Int64(k_block) * self.ld_scales + row), cute.make_layout(1))[0] = scale


class QuantizeRows:
    """Builds the kernel of one ``QuantizeRowsConfig``."""

    def __init__(self, config: QuantizeRowsConfig) -> None:
        self.cfg = config
        self.rounding = Quantize(QuantizeConfig(power_of_two=True))

    @cute.jit
    def __call__(
        self,
        x: cute.Pointer,
        schedule: cute.Pointer,
        out: cute.Pointer,
        scales: cute.Pointer,
        num_rows: Int32,
        slots: Int32,
        width: Int32,
        ld_x: Int32,
        ld_scales: Int32,
        grid: Int32,
    ) -> None:
        """Host side, used to compile only."""
        self.kernel(x, schedule, out, scales, num_rows, slots, width, ld_x, ld_scales).launch(
            grid=[grid, 1, 1], block=[8 * QUANTIZE_GROUPS, 1, 1]
        )

    @cute.kernel
    def kernel(
        self,
        x: cute.Pointer,
        schedule: cute.Pointer,
        out: cute.Pointer,
        scales: cute.Pointer,
        num_rows: Int32,
        slots: Int32,
        width: Int32,
        ld_x: Int32,
        ld_scales: Int32,
    ) -> None:
        """Quantises one block of 1 x 128 per eight threads. num_rows: of x; slots: places of a row."""
        thread, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        # The next kernel reads the schedule without waiting for this one: it must be complete before that starts.
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        num_k_blocks = width // 128
        block = cta * QUANTIZE_GROUPS + thread // 8
        row, k_block = block // num_k_blocks, block % num_k_blocks
        part = thread % 8
        inside = row < num_rows
        source = x + (Int64(cutlass.min(row, num_rows - 1)) * ld_x + k_block * 128 + part * 16)
        words = [*ptx.load_global_vec4(source.toint()), *ptx.load_global_vec4(source.toint() + 16)]
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
        packed = tuple(fp8_ptx.to_e4m3x4(*scaled[4 * idx : 4 * idx + 4]) for idx in range(4))
        target = Target(out, scales, width, ld_scales)
        if inside:
            if cutlass.const_expr(self.cfg.spreads):
                places = Schedule(schedule).sorted_rows(num_rows, slots)
                for slot in cutlass.range(slots, unroll=2):
                    place = element(places, row * slots + slot)[0]
                    if place >= 0:
                        target.write(place, k_block, part, packed, scale)
            else:
                target.write(row, k_block, part, packed, scale)


def compile_quantize(config: QuantizeRowsConfig) -> Any:
    """Compiles for sm_90a; no GPU is needed."""
    ptr = cute.runtime.make_ptr
    space = cute.AddressSpace.gmem
    one = Int32(1)
    return cute.compile(
        QuantizeRows(config),
        ptr(BFloat16, 1024, space, assumed_align=16),
        ptr(Int32, 1024, space, assumed_align=16),
        ptr(Uint8, 1024, space, assumed_align=128),
        ptr(Float32, 1024, space, assumed_align=4),
        one, one, Int32(128), Int32(128), one, one,
    )  # fmt: skip
