"""Torch twin of the W4A4 products: both operands NVFP4, as Blackwell's block-scaled tensor cores multiply them.

How it differs from W4A16 (``ref.linear``, ``ref.moe``): the activations too are rounded to E2M1 with an E4M3 scale
for every 16 of them. Their global scale is the checkpoint's ``input_scale``, fixed by calibration; a fused product
quantises its input once, so it takes the largest input scale of its shards, and nothing saturates that would not
have saturated apart. The arithmetic, step by step:

    qx       = quantize_nvfp4_activation(x, input_scale)              codes and block scales, the definition
    acc      = sum over k of (code * scale)_x (code * scale)_w        float32 (float64 for float64 x)
    y        = acc * alpha,    alpha = input_scale * weight_scale_2    one float32 product per output row
    h        = bf16(silu(min(gate, limit)) * clamp(up, +-limit))       then quantised with the expert's w2 input scale
    out      = bf16(acc * alpha) of the down product, per chosen expert
    moe[t]   = bf16(sum over the token's choices, in their order, of weight * out)   float32

Every product inside ``acc`` is exact in float32 (4 significant bits of codes, 8 of scales), so that two
implementations differ by the order of their sums and nothing else until the last rounding.

Shape suffixes: M rows, K in, N out; T tokens, E experts, D hidden, F expert width, S rows sent to one expert.
"""

import torch
import torch.nn.functional as F

from ownpath.kernels.mixture import clamped_swiglu as swiglu
from ownpath.kernels.mixture import sum_dtype
from ownpath.numerics import decode_nvfp4_blocks, quantize_nvfp4_activation

W4A4Weight = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""(qdata, scale, global_scale, input_scale) of the experts' fused matrices."""


def quantized_product(
    x_MK: torch.Tensor, input_scale: torch.Tensor, qdata_NK2: torch.Tensor, scale_NK16: torch.Tensor
) -> torch.Tensor:
    """Computes ``acc``: quantised x times quantised w without either global scale, in ``sum_dtype(x)``.

    Shapes: x [M, K]; input_scale float32 []; qdata uint8 [N, K/2]; scale E4M3 [N, K/16] -> [M, N].
    """
    dtype = sum_dtype(x_MK)
    qx = quantize_nvfp4_activation(x_MK, input_scale)
    assert qx.scale is not None
    return F.linear(decode_nvfp4_blocks(qx.qdata, qx.scale, dtype), decode_nvfp4_blocks(qdata_NK2, scale_NK16, dtype))


def nvfp4_linear_w4a4(
    x_MK: torch.Tensor,
    input_scale: torch.Tensor,
    qdata_NK2: torch.Tensor,
    scale_NK16: torch.Tensor,
    global_scale_N: torch.Tensor,
) -> torch.Tensor:
    """Computes y = acc * (input_scale * global_scale), both operands NVFP4, rounded once to the dtype of x.

    Shapes: x [M, K]; input_scale float32 []; qdata uint8 [N, K/2]; scale E4M3 [N, K/16]; global_scale float32 [N];
        y [M, N].
    """
    acc_MN = quantized_product(x_MK, input_scale, qdata_NK2, scale_NK16)
    return (acc_MN * (input_scale * global_scale_N)).to(x_MK.dtype)


def expert_hidden_w4a4(x_SD: torch.Tensor, w13: W4A4Weight, expert: int, swiglu_limit: float) -> torch.Tensor:
    """Computes h of one expert before its second quantisation: [S, F] in ``sum_dtype(x)``, not yet rounded to BF16."""
    qdata, scale, global_scale, input_scale = w13
    inter = qdata.shape[1] // 2
    gate_up_alpha = (input_scale[expert] * global_scale[expert])[:, None].expand(-1, inter).flatten()
    acc = quantized_product(x_SD, input_scale[expert], qdata[expert], scale[expert])
    gate_SF, up_SF = (acc * gate_up_alpha).split(inter, dim=-1)
    return swiglu(gate_SF, up_SF, swiglu_limit)


def nvfp4_moe_w4a4(
    x_TD: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    w13: W4A4Weight,
    w2: W4A4Weight,
    swiglu_limit: float,
) -> torch.Tensor:
    """Computes y[t] = sum over chosen experts of weight * w2 swiglu(w13 x[t]), all NVFP4, gate rows first in w13.

    Shapes: x [T, D]; topk_ids int [T, K], ids outside [0, E) are skipped; topk_weights float32 [T, K]; y [T, D].
        w13: qdata uint8 [E, 2F, D/2], scale E4M3 [E, 2F, D/16], global_scale float32 [E, 2] (gate, up), input_scale
        float32 [E]. w2: qdata uint8 [E, D, F/2], scale E4M3 [E, D, F/16], global_scale [E], input_scale [E].
    """
    dtype = sum_dtype(x_TD)
    num_tokens, num_chosen = topk_ids_TK.shape
    out_TKD = torch.zeros((num_tokens, num_chosen, x_TD.shape[1]), dtype=dtype, device=x_TD.device)
    for expert in range(len(w13[0])):
        token_ids, slots = torch.where(topk_ids_TK == expert)
        if len(token_ids):
            h_SF = expert_hidden_w4a4(x_TD[token_ids], w13, expert, swiglu_limit).to(x_TD.dtype)
            acc_SD = quantized_product(h_SF, w2[3][expert], w2[0][expert], w2[1][expert])
            out_SD = (acc_SD * (w2[3][expert] * w2[2][expert])).to(x_TD.dtype)
            out_TKD[token_ids, slots] = out_SD.to(dtype)
    y_TD = torch.zeros_like(out_TKD[:, 0])
    for slot in range(num_chosen):
        y_TD += out_TKD[:, slot] * topk_weights_TK[:, slot, None].to(dtype)
    return y_TD.to(x_TD.dtype)
