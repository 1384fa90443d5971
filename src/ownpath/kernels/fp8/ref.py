"""Torch twins of the Hopper FP8 products on the same packed operand, with the same signatures.

W8A16 decodes exactly and sums in float32. W8A8 follows the published scheme: E4M3 activations with one scale per
1 x 128, a product per 128 of K, each added to the total times both scales. The device's tensor cores keep about 14
bits while they sum inside 128 of K; here that sum is float32.

Shape suffixes: M rows, N out, K in, B = ceil(K / 128) blocks of K.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ownpath.kernels.contract import Routing, StoredExperts, StoredLinear
from ownpath.kernels.fp8.layout import PackedFp8, row_order, unpack_blocks
from ownpath.kernels.mixture import mixture, sum_dtype, with_shared
from ownpath.kernels.reference import ExpertsReference, LinearReference
from ownpath.numerics import decode_fp8_block
from ownpath.numerics.e4m3 import E4M3_MAX, decode_e4m3, encode_e4m3
from ownpath.numerics.e8m0 import decode_e8m0, encode_e8m0_ceil
from ownpath.numerics.fake_quant import FP8_AMAX_FLOOR
from ownpath.qtensor import QuantTensor


def unpack_fp8(weight: PackedFp8) -> tuple[Tensor, Tensor]:
    """Returns codes E4M3 [N, K] and the float32 scale of each row and block of K, [N, B]."""
    blocks, (num_tiles, num_k_blocks, _) = weight.blocks, weight.blocks.shape
    codes = unpack_blocks(blocks, row_order(), 64 * num_tiles, weight.in_features).view(num_tiles, 64, -1)
    scale = weight.scales[..., 2].contiguous().view(torch.float32)
    valid = torch.arange(64, device=blocks.device) < weight.rows[:, 1, None]
    spread = scale[:, None, :].expand(num_tiles, 64, num_k_blocks)
    return codes[valid].view(torch.float8_e4m3fn), spread[valid]


def quantize_rows(x_MK: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Quantises x to E4M3 codes [M, B, 128] with float32 scales [M, B]; columns beyond K are 0.

    power_of_two: 2**ceil(log2(max(amax, 1e-4) / 448)); otherwise max(amax, 1e-4) / 448. A block with a NaN or an
    infinity gets a NaN scale. Source: DeepSeek's released activation quantiser, block 128.
    """
    x_MBK = F.pad(x_MK.float(), (0, -x_MK.shape[1] % 128)).unflatten(1, (-1, 128))
    amax = x_MBK.abs().amax(dim=-1)
    floored = amax.clamp(min=FP8_AMAX_FLOOR)
    if power_of_two:
        scale = decode_e8m0(encode_e8m0_ceil(floored, E4M3_MAX))
    else:
        scale = floored / torch.full((), E4M3_MAX, device=x_MK.device)
    codes = encode_e4m3(x_MBK / scale[..., None])
    return codes, torch.where(torch.isfinite(amax), scale, torch.nan)


def fp8_w8a16(x: Tensor, weight: PackedFp8, out: Tensor) -> None:
    """Computes out = x (E4M3 x block scale).T. Shapes: x [M, K]; out [M, N]."""
    codes_NK, scale_NB = unpack_fp8(weight)
    wide = scale_NB.repeat_interleave(128, dim=1)[:, : weight.in_features]
    out.copy_(x.float() @ (decode_e4m3(codes_NK) * wide).T)


def fp8_w8a8(x: Tensor, weight: PackedFp8, out: Tensor, workspace: Tensor) -> None:
    """Computes out = sum over blocks of K of (codes codes.T) * token scale * weight scale. workspace: not used."""
    codes_MBK, scale_MB = quantize_rows(x, weight.power_of_two)
    codes_NK, scale_NB = unpack_fp8(weight)
    codes_NBK = F.pad(decode_e4m3(codes_NK), (0, -weight.in_features % 128)).unflatten(1, (-1, 128))
    total_MN = torch.zeros(out.shape, device=x.device)
    for block_idx in range(scale_MB.shape[1]):
        product = decode_e4m3(codes_MBK[:, block_idx].contiguous()) @ codes_NBK[:, block_idx].T
        total_MN += product * (scale_MB[:, block_idx, None] * scale_NB[None, :, block_idx])
    out.copy_(total_MN)


def fp8_linear(x_MK: torch.Tensor, qdata_NK: torch.Tensor, scale_NK128: torch.Tensor) -> torch.Tensor:
    """Computes y = x (E4M3 x block scale)ᵀ.

    Shapes: x [M, K]; qdata E4M3 [N, K]; scale E8M0 or float32 [ceil(N/128), ceil(K/128)]; y [M, N].
    """
    dtype = sum_dtype(x_MK)
    return F.linear(x_MK.to(dtype), decode_fp8_block(qdata_NK, scale_NK128, dtype)).to(x_MK.dtype)


def fp8_moe(
    x_TD: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    w13: tuple[torch.Tensor, torch.Tensor],
    w2: tuple[torch.Tensor, torch.Tensor],
    swiglu_limit: float,
    *,
    num_shared: int = 0,
    expert_map: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes as ``nvfp4_moe``, with E4M3 experts that have a scale per 128 x 128.

    Shapes (R = ceil(F/128), C = ceil(D/128)): w13: qdata E4M3 [E, 2F, D], gate rows first, scale E8M0 or float32
        [E, 2, R, C]: gate and up have a grid each, the last blocks of both may be partial. w2: qdata E4M3 [E, D, F],
        scale [E, C, R]. The others as in ``nvfp4_moe``.
    """

    def gate_up(x_SD: torch.Tensor, expert: int) -> torch.Tensor:
        both = w13[0][expert].unflatten(0, (2, -1))
        return F.linear(x_SD, decode_fp8_block(both, w13[1][expert], x_SD.dtype).flatten(0, 1))

    def down(hidden_SF: torch.Tensor, expert: int) -> torch.Tensor:
        return F.linear(hidden_SF, decode_fp8_block(w2[0][expert], w2[1][expert], hidden_SF.dtype))

    ids_TK, weights_TK = with_shared(topk_ids_TK, topk_weights_TK, len(w13[0]), num_shared, expert_map)
    return mixture(x_TD, ids_TK, weights_TK, gate_up, down, swiglu_limit)


def _linear(x_MK: Tensor, operand: StoredLinear) -> Tensor:
    """Computes each shard by itself: each has its own grid of scales."""
    parts = [fp8_linear(x_MK, shard.qdata, _scale(shard)) for shard in operand.shards]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _experts(x_TD: Tensor, routing: Routing, operand: StoredExperts) -> Tensor:
    return fp8_moe(
        x_TD,
        routing.ids,
        routing.weights,
        (operand.gate_up.qdata, _scale(operand.gate_up)),
        (operand.down.qdata, _scale(operand.down)),
        operand.swiglu_limit,
        num_shared=routing.num_shared,
        expert_map=routing.expert_map,
    )


def _scale(weight: QuantTensor) -> Tensor:
    assert weight.scale is not None
    return weight.scale


FP8_LINEAR = LinearReference(_linear)
FP8_MOE = ExpertsReference(_experts)
