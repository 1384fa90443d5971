"""NVFP4 x NVFP4 -> BF16 on Blackwell's block-scaled tensor cores, dense or one expert per 128-row tile.

How it works. A program owns a 128 x BN tile of y. Each step fetches, by TMA, BK values of K of both operands (4-bit
codes as they are stored) and their block scales (128 x 4 order), and issues one ``tl.dot_scaled``: on sm_100 that is
``tcgen05.mma.kind::mxf4nvf4.block_scale.scale_vec::4X``, which multiplies codes by scales and adds in float32 in
tensor memory. No value is decoded by an ALU. The global scales are not part of the sum: y = acc * alpha with
alpha = input_scale * weight_scale_2, a vector over the output rows of a dense product (fused shards keep their own),
one number per expert in a grouped one. TMA reads zeros outside a matrix and does not store there.

Grouped (``EXPERTS``): rows are sorted by expert and padded to tiles of 128, so that tile t has one expert; the
experts' matrices lie behind each other, and ``expert * N`` is the offset of the rows to fetch. Unused tiles (expert
-1) end at once. Neighbouring programs share a row tile and walk over N, so that the rows come from L2 and each
expert's weight once from memory.

Why it is fast, and its roofline. Bytes: N * K * 9/16 for the weight, once; a B200 moves about 8 TB/s, so that a
V4-Flash expert's down matrix (4096 x 2048, 4.7 MB) costs 0.6 us. Arithmetic: 2 * 128 * BN * BK operations for
(128 + BN) * BK * 9/16 bytes from L2, 228 a byte at BN = 128 and 303 at BN = 256; dense FP4 peaks near 9 PFLOP/s, so
that large M is bound by L2 or by the tensor cores; this has not been measured. Three stages of 36 KB
(BN = 128) leave room for two programs an SM, and both fit in tensor memory (2 x 256 of 512 columns).

Limits. M below 128 still multiplies 128 rows: a decode step reads padding rows from L2 beside the weight. No split
along K: a product with fewer tiles than SMs leaves SMs idle. K a multiple of 64. ``warp_specialize`` is not used: with
it the kernel compiles, but at 255 registers. Compiled for sm_100a and interpreted on a CPU; never run on a device.
"""

import triton
import triton.language as tl

from ownpath.kernels.nvfp4_sm100.swizzle_sm100 import load_scales

ROW_TILE = tl.constexpr(128)


@triton.jit
def gemm_w4a4_kernel(
    x_desc,
    x_scale_desc,
    w_desc,
    w_scale_desc,
    y_desc,
    alpha_ptr,
    expert_of_tile_ptr,
    N,
    K,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Computes y [M, N] = (x w^T) * alpha; the grid is row tiles * ceil(N / BN)."""
    num_n = tl.cdiv(N, BN)
    tile = tl.program_id(0) // num_n
    row0 = tile * ROW_TILE
    col0 = (tl.program_id(0) % num_n) * BN
    w_row0 = col0
    if EXPERTS:
        expert = tl.load(expert_of_tile_ptr + tile)
        if expert < 0:
            return
        w_row0 = expert * N + col0
    acc = tl.zeros((ROW_TILE, BN), tl.float32)
    for step in tl.range(0, tl.cdiv(K, BK), num_stages=STAGES):
        x = x_desc.load([row0, step * (BK // 2)])
        w = w_desc.load([w_row0, step * (BK // 2)])
        x_scale = load_scales(x_scale_desc, tile, step * (BK // 64), ROW_TILE, BK // 16)
        w_scale = load_scales(w_scale_desc, w_row0 // 128, step * (BK // 64), BN, BK // 16)
        acc = tl.dot_scaled(x, x_scale, "e2m1", w.T, w_scale, "e2m1", acc)
    if EXPERTS:
        acc = acc * tl.load(alpha_ptr + expert)
    else:
        cols = col0 + tl.arange(0, BN)
        acc = acc * tl.load(alpha_ptr + cols, mask=cols < N, other=0.0)[None, :]
    y_desc.store([row0, col0], acc.to(tl.bfloat16))
