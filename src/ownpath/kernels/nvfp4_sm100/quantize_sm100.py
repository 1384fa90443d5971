"""Quantises activations from BF16 to NVFP4 on Blackwell: E2M1 codes, E4M3 block scales in the tensor cores' order.

How it works. A program takes ``ROWS`` rows and ``COLUMNS`` values of K: it finds the largest magnitude of every 16,
divides it by 6 and by the calibrated ``input_scale``, rounds to E4M3, and rounds every value divided by its scale to
E2M1. All of it is ``numerics.quantize_nvfp4_activation`` in float32, with true division (``div.rn``; Triton's ``/``
is an approximation), so that the bytes are equal to the definition's, ties, infinities and zero blocks included. A
block with a NaN gets the scale NaN (and codes 0, which no longer matter), and so reaches the output. Codes go out
row-major, two to a byte; scales go straight to the 128 x 4 order (``kernels.nvfp4_sm100.scales``), which saves the pass
that would swizzle them.

Rows beyond the last one are padding of a 128-row tile. They are written as zeros, scales included, so that a reader of
a padding row never finds an old NaN.

For the experts (``EXPERTS``) row r is a copy of the token behind routing pair ``pair_of_row[r]``, quantised with the
input scale of the tile's own expert: gather, permutation and quantisation are one pass.

Why it is fast, and its roofline. It reads 2 bytes and writes 0.5 + 1/16 for each value, and so should be bound by
memory: 8192 x 4096 values are 86 MB, 11 us at 8 TB/s. The eight comparisons that make a code and one ``div.rn`` are
about 30 instructions a value, of the same order at 148 SMs; ``cvt.rn.satfinite.e2m1x2`` would need fewer, but cannot
be interpreted, and nothing here has run on a device to show the difference.

Limits: K a multiple of 64; x contiguous BF16. Compiled for sm_100a and interpreted on a CPU; never run on a device.
"""

import triton
import triton.language as tl

from ownpath.kernels.nvfp4_sm100.swizzle_sm100 import scale_offsets


@triton.jit
def quantize_groups(x, input_scale):
    """Quantises float32 x [R, G, 16] to E2M1 codes (int32) and an E4M3 scale per group [R, G]."""
    has_nan = tl.max((x != x).to(tl.int32), axis=2) != 0
    amax = tl.max(tl.where(x != x, 0.0, tl.abs(x)), axis=2)
    six = tl.full(amax.shape, 6.0, tl.float32)
    ideal = tl.div_rn(tl.div_rn(amax, six), tl.zeros_like(amax) + input_scale)
    wide = tl.minimum(ideal, 448.0, propagate_nan=tl.PropagateNan.ALL)
    scale = tl.where(has_nan, float("nan"), wide).to(tl.float8e4nv)
    unit = (scale.to(tl.float32) * input_scale)[:, :, None] + tl.zeros_like(x)
    magnitude = tl.abs(tl.div_rn(x, unit))
    # One step per midpoint; a tie goes to the even code. A zero unit would compare as infinity or NaN: code 0.
    code = (magnitude > 0.25).to(tl.int32) + (magnitude >= 0.75).to(tl.int32) + (magnitude > 1.25).to(tl.int32)
    code += (magnitude >= 1.75).to(tl.int32) + (magnitude > 2.5).to(tl.int32) + (magnitude >= 3.5).to(tl.int32)
    code += (magnitude > 5.0).to(tl.int32)
    code = tl.where(unit == 0.0, 0, code)
    sign = (x.to(tl.int32, bitcast=True) >> 28) & 8
    return tl.where(unit != unit, 0, code | sign), scale


@triton.jit
def pack_codes(code, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Packs codes [ROWS, COLUMNS / 16, 16] into bytes [ROWS, COLUMNS / 2], the even k in the low nibble."""
    even, odd = tl.split(tl.reshape(code, (ROWS, COLUMNS // 2, 2)))
    return (even | (odd << 4)).to(tl.uint8)


@triton.jit(do_not_specialize=["num_rows", "num_choices"])
def quantize_kernel(
    x_ptr,
    input_scale_ptr,
    pair_of_row_ptr,
    expert_of_tile_ptr,
    code_ptr,
    scale_ptr,
    num_rows,
    num_choices,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Quantises x to codes [rows, K/2] and swizzled scales; the grid is (padded rows / ROWS, ceil(K / COLUMNS))."""
    row0 = tl.program_id(0) * ROWS
    rows = row0 + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if EXPERTS:
        expert = tl.load(expert_of_tile_ptr + row0 // 128)
        if expert < 0:
            return
        pairs = tl.load(pair_of_row_ptr + rows)
        real = pairs >= 0
        sources = tl.where(real, pairs // num_choices, 0)
        input_scale = tl.load(input_scale_ptr + expert)
        stored = real | True
    else:
        real = rows < num_rows
        sources = rows
        input_scale = tl.load(input_scale_ptr)
        stored = real
    inside = columns < K
    x_at = sources.to(tl.int64)[:, None] * K + columns[None, :]
    x = tl.load(x_ptr + x_at, mask=real[:, None] & inside[None, :], other=0.0).to(tl.float32)
    code, scale = quantize_groups(tl.reshape(x, (ROWS, COLUMNS // 16, 16)), input_scale)
    packed = pack_codes(code, ROWS, COLUMNS)
    bytes_ = tl.program_id(1) * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
    code_at = rows.to(tl.int64)[:, None] * (K // 2) + bytes_[None, :]
    tl.store(code_ptr + code_at, packed, mask=stored[:, None] & (bytes_ < K // 2)[None, :])
    groups = tl.program_id(1) * (COLUMNS // 16) + tl.arange(0, COLUMNS // 16)
    tl.store(scale_ptr + scale_offsets(rows, groups, K // 64), scale, mask=(groups < K // 16)[None, :])
