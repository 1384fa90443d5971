"""The experts' first product on Blackwell: gate and up, SwiGLU and the quantisation for the second, in one kernel.

How it works. As ``gemm_w4a4_sm100``, on rows sorted by expert, with two accumulators in tensor memory: a program owns
128 rows and BN columns of h, fetches the BN gate rows and the BN up rows that lie F below them, and multiplies both
with the same activations. Its epilogue applies each projection's own global scale (float32), the clamp and SiLU,
rounds to BF16 as the unfused path would, and quantises the 128 x BN piece with the expert's w2 input scale: whole
blocks of 16 lie inside a tile, so that h leaves the SM as 4-bit codes and swizzled scales, 9/16 byte a value, instead
of going out as BF16 (or twice, as gate and up), in again, and out again.

Why it is fast, and its roofline. An expert's gate_up in V4-Flash (4096 x 4096) is 9.4 MB, 1.2 us at 8 TB/s; the
epilogue's traffic is 3.6 times smaller than BF16 h and 7 times than BF16 gate and up, for each of two passes saved.
Stages of 54 KB: three of them, one program an SM, 512 columns of tensor memory.

Limits. Those of ``gemm_w4a4_sm100``; F a multiple of 128. The epilogue computes 64 columns at a time to stay within
the registers of 8 warps. Its exp is the hardware's approximation (2 ulp), which can turn a rounding of h that lies at
a BF16 tie; the codes of such a value may be one step from the definition's. Compiled for sm_100a and interpreted on a
CPU; never run on a device.
"""

import triton
import triton.language as tl

from ownpath.kernels.nvfp4_sm100.quantize_sm100 import pack_codes, quantize_groups
from ownpath.kernels.nvfp4_sm100.swizzle_sm100 import load_scales, scale_offsets

ROW_TILE = tl.constexpr(128)


@triton.jit
def clamped_swiglu(gate, up, limit):
    """Computes silu(min(gate, limit)) * clamp(up, -limit, limit) in float32; NaN stays NaN."""
    gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
    up = tl.minimum(tl.maximum(up, -limit, propagate_nan=tl.PropagateNan.ALL), limit, propagate_nan=tl.PropagateNan.ALL)
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def store_quantized(h, input_scale, row0, col0, code_ptr, scale_ptr, F, COLUMNS: tl.constexpr):
    """Quantises h [128, COLUMNS] (float32 holding BF16 values) and stores it at (row0, col0) of [rows, F]."""
    code, scale = quantize_groups(tl.reshape(h, (ROW_TILE, COLUMNS // 16, 16)), input_scale)
    rows = row0 + tl.arange(0, ROW_TILE)
    bytes_ = col0 // 2 + tl.arange(0, COLUMNS // 2)
    code_at = rows.to(tl.int64)[:, None] * (F // 2) + bytes_[None, :]
    tl.store(code_ptr + code_at, pack_codes(code, ROW_TILE, COLUMNS))
    groups = col0 // 16 + tl.arange(0, COLUMNS // 16)
    tl.store(scale_ptr + scale_offsets(rows, groups, F // 64), scale)


@triton.jit
def gate_up_w4a4_kernel(
    x_desc,
    x_scale_desc,
    w_desc,
    w_scale_desc,
    alpha_ptr,
    h_input_scale_ptr,
    expert_of_tile_ptr,
    code_ptr,
    scale_ptr,
    F,
    K,
    limit,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Computes h = quantised swiglu of both products: codes [rows, F/2], swizzled scales; grid row tiles * (F / BN)."""
    num_n = F // BN
    tile = tl.program_id(0) // num_n
    col0 = (tl.program_id(0) % num_n) * BN
    expert = tl.load(expert_of_tile_ptr + tile)
    if expert < 0:
        return
    row0 = tile * ROW_TILE
    gate_row0 = expert * (2 * F) + col0
    up_row0 = gate_row0 + F
    gate = tl.zeros((ROW_TILE, BN), tl.float32)
    up = tl.zeros((ROW_TILE, BN), tl.float32)
    for step in tl.range(0, tl.cdiv(K, BK), num_stages=STAGES):
        x = x_desc.load([row0, step * (BK // 2)])
        x_scale = load_scales(x_scale_desc, tile, step * (BK // 64), ROW_TILE, BK // 16)
        w_gate = w_desc.load([gate_row0, step * (BK // 2)])
        gate_scale = load_scales(w_scale_desc, gate_row0 // 128, step * (BK // 64), BN, BK // 16)
        gate = tl.dot_scaled(x, x_scale, "e2m1", w_gate.T, gate_scale, "e2m1", gate)
        w_up = w_desc.load([up_row0, step * (BK // 2)])
        up_scale = load_scales(w_scale_desc, up_row0 // 128, step * (BK // 64), BN, BK // 16)
        up = tl.dot_scaled(x, x_scale, "e2m1", w_up.T, up_scale, "e2m1", up)
    gate_alpha, up_alpha = tl.load(alpha_ptr + expert * 2), tl.load(alpha_ptr + expert * 2 + 1)
    input_scale = tl.load(h_input_scale_ptr + expert)
    HALF: tl.constexpr = BN // 2
    gate0, gate1 = tl.split(tl.permute(tl.reshape(gate, (ROW_TILE, 2, HALF)), (0, 2, 1)))
    up0, up1 = tl.split(tl.permute(tl.reshape(up, (ROW_TILE, 2, HALF)), (0, 2, 1)))
    h0 = clamped_swiglu(gate0 * gate_alpha, up0 * up_alpha, limit).to(tl.bfloat16).to(tl.float32)
    store_quantized(h0, input_scale, row0, col0, code_ptr, scale_ptr, F, HALF)
    h1 = clamped_swiglu(gate1 * gate_alpha, up1 * up_alpha, limit).to(tl.bfloat16).to(tl.float32)
    store_quantized(h1, input_scale, row0, col0 + HALF, code_ptr, scale_ptr, F, HALF)
