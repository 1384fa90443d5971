"""Launches of the W4A4 products: check, allocate, launch. The kernels are in the imported modules.

Linear: quantise x -> block-scaled product (2 launches). Experts: count and place the pairs,
quantise into sorted rows, gate_up with SwiGLU and quantisation, down, combine (6 launches, whatever the routing).
The host reads nothing back and no launch depends on data, so that a CUDA graph can capture both. The grouped products'
grid covers every possible routing, and unused tiles end at once. Every sum has one order, so that repeated calls give
the same bits. A row's arithmetic does not depend on the other rows; only the width of the tiles depends on their
number, and the ``_invariant`` calls fix that too.

Why it is fast, and the rooflines: in the kernels' modules. Tiles are chosen by arithmetic, not by measurement: 128
columns while the weight's bytes bound a product, 256 from 2048 rows on, where the activations' traffic would.

Limits: BF16 activations; workspaces come from torch's allocator and descriptors are made on the host on every call.
Compiled for sm_100a and interpreted on a CPU; never run on a device, which is why ``prove`` compares these calls with
their torch twin before a runner trusts them.
"""

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from ownpath.kernels.checks import check
from ownpath.kernels.nvfp4_sm100.gate_up_sm100 import gate_up_w4a4_kernel
from ownpath.kernels.nvfp4_sm100.gemm_sm100 import gemm_w4a4_kernel
from ownpath.kernels.nvfp4_sm100.layout import (
    W4A4MoeOperand,
    boxed_shape,
)
from ownpath.kernels.nvfp4_sm100.quantize_sm100 import quantize_kernel
from ownpath.kernels.nvfp4_sm100.route_sm100 import combine_kernel, count_kernel, num_tiles_bound, place_kernel

ROW_TILE = 128
NARROW, WIDE, WIDE_FROM_ROWS = 128, 256, 2048
BLOCK_K = 256
STAGES = 3
QUANTIZE_ROWS, QUANTIZE_COLUMNS = 8, 512
CHUNK = 1024


def quantize_activation(x_MK: torch.Tensor, input_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises x to E2M1 codes and swizzled E4M3 scales; padding rows are zero.

    Shapes: x bfloat16 [M, K], K a multiple of 64; input_scale float32 []; codes uint8 [M, K/2]; scale E4M3
        [1, ceil(M/128), K/64, 2, 256].
    """
    num_rows, k = x_MK.shape
    codes = torch.empty((num_rows, k // 2), dtype=torch.uint8, device=x_MK.device)
    scale = torch.empty(boxed_shape(num_rows, k), dtype=torch.float8_e4m3fn, device=x_MK.device)
    grid = (scale.shape[1] * ROW_TILE // QUANTIZE_ROWS, triton.cdiv(k, QUANTIZE_COLUMNS))
    quantize_kernel[grid](
        x_MK,
        input_scale,
        None,
        None,
        codes,
        scale,
        num_rows,
        1,
        K=k,
        ROWS=QUANTIZE_ROWS,
        COLUMNS=QUANTIZE_COLUMNS,
        EXPERTS=False,
        enable_fp_fusion=False,
    )
    return codes, scale


def run_experts(
    x_TD: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    operand: W4A4MoeOperand,
    columns: int,
) -> torch.Tensor:
    """Runs routed experts in six launches, whatever the routing. columns: of the tiles of down.

    Shapes: x bfloat16 [T, D]; ids int32 or int64 [T, K]; weights float32 [T, K]; y bfloat16 [T, D].
    Errors: ValueError for another dtype, shape, stride or device, or a device without tcgen05.
    """
    check_input(x_TD, operand.hidden_size, operand.w13.device)
    routed = (len(x_TD), topk_ids_TK.shape[-1])
    check("topk_ids", topk_ids_TK, (torch.int32, torch.int64), routed, x_TD.device)
    check("topk_weights", topk_weights_TK, (torch.float32,), routed, x_TD.device)
    y_TD = torch.empty_like(x_TD)
    if x_TD.numel() == 0:
        return y_TD
    pair_of_row, row_of_pair, expert_of_tile = place_pairs(topk_ids_TK, operand.num_experts)
    h_codes, h_scale = _expert_hidden(x_TD, routed[1], pair_of_row, expert_of_tile, operand)
    out = torch.empty((len(pair_of_row), operand.hidden_size), dtype=torch.bfloat16, device=x_TD.device)
    run_product(h_codes, h_scale, operand.w2, operand.w2_scale, out, operand.w2_alpha, columns, expert_of_tile)
    grid = (len(x_TD), triton.cdiv(operand.hidden_size, CHUNK))
    combine_kernel[grid](
        out,
        row_of_pair,
        topk_weights_TK,
        y_TD,
        operand.hidden_size,
        CHOICES=routed[1],
        COLUMNS=CHUNK,
        enable_fp_fusion=False,
    )
    return y_TD


def place_pairs(topk_ids_TK: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Places pairs: int32 pair_of_row [tiles * 128], row_of_pair [T * K], expert_of_tile [tiles] (``route_sm100``)."""
    num_pairs = topk_ids_TK.numel()
    num_tiles = num_tiles_bound(num_pairs, num_experts, ROW_TILE)
    sizes = (num_experts, num_tiles * ROW_TILE, num_pairs, num_tiles)
    int32s = [torch.empty(size, dtype=torch.int32, device=topk_ids_TK.device) for size in sizes]
    count, pair_of_row, row_of_pair, expert_of_tile = int32s
    count_kernel[(num_experts,)](topk_ids_TK, count, num_pairs, CHUNK=CHUNK)
    place_kernel[(num_experts + 1,)](
        topk_ids_TK,
        count,
        pair_of_row,
        row_of_pair,
        expert_of_tile,
        num_pairs,
        num_tiles,
        NUM_EXPERTS=num_experts,
        EXPERTS_POW2=triton.next_power_of_2(num_experts),
        CHUNK=CHUNK,
    )
    return pair_of_row, row_of_pair, expert_of_tile


def columns_per_tile(num_rows: int, n: int) -> int:
    """Returns the columns of y per program: with many rows, wider tiles save reads of the rows."""
    return WIDE if num_rows >= WIDE_FROM_ROWS and n % WIDE == 0 else NARROW


def _expert_hidden(
    x_TD: torch.Tensor,
    num_choices: int,
    pair_of_row: torch.Tensor,
    expert_of_tile: torch.Tensor,
    operand: W4A4MoeOperand,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes codes [rows, F/2] and swizzled scales of every routed pair's h, in the order of the rows."""
    num_rows, dim, inter = len(pair_of_row), operand.hidden_size, operand.inter_size
    codes, scale = _quantized_buffers(num_rows, dim, x_TD.device)
    quantize_kernel[(num_rows // QUANTIZE_ROWS, triton.cdiv(dim, QUANTIZE_COLUMNS))](
        x_TD,
        operand.w13_input_scale,
        pair_of_row,
        expert_of_tile,
        codes,
        scale,
        num_rows,
        num_choices,
        K=dim,
        ROWS=QUANTIZE_ROWS,
        COLUMNS=QUANTIZE_COLUMNS,
        EXPERTS=True,
        enable_fp_fusion=False,
    )
    h_codes, h_scale = _quantized_buffers(num_rows, inter, x_TD.device)
    gate_up_w4a4_kernel[(len(expert_of_tile) * (inter // 128),)](
        _code_box(codes, ROW_TILE),
        _scale_box(scale, ROW_TILE),
        _code_box(operand.w13, 128),
        _scale_box(operand.w13_scale, 128),
        operand.w13_alpha,
        operand.w2_input_scale,
        expert_of_tile,
        h_codes,
        h_scale,
        inter,
        dim,
        operand.swiglu_limit,
        BN=128,
        BK=BLOCK_K,
        STAGES=STAGES,
        num_warps=8,
        enable_fp_fusion=False,
    )
    return h_codes, h_scale


def run_product(
    codes: torch.Tensor,
    scale: torch.Tensor,
    w_codes: torch.Tensor,
    w_scale: torch.Tensor,
    y: torch.Tensor,
    alpha: torch.Tensor,
    block_n: int,
    expert_of_tile: torch.Tensor | None = None,
) -> None:
    """Writes y [M, N]; with ``expert_of_tile`` the weights are those of each row tile's expert."""
    num_rows, n = y.shape
    num_tiles = triton.cdiv(num_rows, ROW_TILE)
    gemm_w4a4_kernel[(num_tiles * triton.cdiv(n, block_n),)](
        _code_box(codes, ROW_TILE),
        _scale_box(scale, ROW_TILE),
        _code_box(w_codes, block_n),
        _scale_box(w_scale, block_n),
        TensorDescriptor.from_tensor(y, [ROW_TILE, block_n]),
        alpha,
        expert_of_tile,
        n,
        2 * codes.shape[1],
        BN=block_n,
        BK=BLOCK_K,
        STAGES=STAGES,
        EXPERTS=expert_of_tile is not None,
        num_warps=8 if block_n == WIDE else 4,
        enable_fp_fusion=False,
    )


def _quantized_buffers(num_rows: int, k: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.empty((num_rows, k // 2), dtype=torch.uint8, device=device)
    return codes, torch.empty(boxed_shape(num_rows, k), dtype=torch.float8_e4m3fn, device=device)


def _code_box(codes: torch.Tensor, num_rows: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(codes, [num_rows, BLOCK_K // 2])


def _scale_box(scale: torch.Tensor, num_rows: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(scale, [1, num_rows // 128, BLOCK_K // 64, 2, 256])


def check_input(x: torch.Tensor, width: int, device: torch.device) -> None:
    """Checks x. Errors: ValueError naming x, or a device whose tensor cores have no block scales."""
    if x.ndim != 2:
        raise ValueError(f"x must have 2 dimensions, found shape {list(x.shape)}")
    check("x", x, (torch.bfloat16,), (len(x), width), device)
    if x.is_cuda:
        major, minor = torch.cuda.get_device_capability(x.device)
        if major != 10:
            raise ValueError(f"x is on an sm_{major}{minor} device; NVFP4 x NVFP4 needs tcgen05, sm_100 or sm_103")
    elif not triton.knobs.runtime.interpret:
        raise ValueError(f"x is on {x.device}; this kernel runs on CUDA")
