"""Operands of the W4A4 products: codes as stored, block scales swizzled for Blackwell, global scales as one factor.

The factor of a product is alpha = input_scale * weight_scale_2, formed once in float32. Codes are not copied, only
viewed; the scales are (an eighth of the codes' bytes), because their order changes. Shapes here are the kernels':
experts lie behind each other in the rows.
"""

from dataclasses import dataclass

import torch

from ownpath.kernels.nvfp4_sm100.scales import PIECE_COLUMNS, PIECE_ROWS, swizzle_scales, unswizzle_scales

K_STEP = 64
"""Values of K that one swizzled piece of scales covers."""


class OperandError(ValueError):
    """Raised for a weight or scale that the W4A4 kernels cannot take; the message names it."""


@dataclass(frozen=True)
class W4A4LinearOperand:
    """codes uint8 [N, K/2]; scale E4M3 [1, ceil(N/128), K/64, 2, 256]; alpha float32 [N]; input_scale float32 []."""

    codes: torch.Tensor
    scale: torch.Tensor
    alpha: torch.Tensor
    input_scale: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.codes.shape[0], 2 * self.codes.shape[1]


@dataclass(frozen=True)
class W4A4MoeOperand:
    """Both products of E experts of hidden size D and width F.

    Shapes: w13 uint8 [E * 2F, D/2], w13_scale E4M3 [1, E * 2F/128, D/64, 2, 256], w13_alpha float32 [E, 2] (gate,
        up), w13_input_scale float32 [E]; w2 uint8 [E * D, F/2], w2_scale E4M3 [1, E * D/128, F/64, 2, 256], w2_alpha
        float32 [E], w2_input_scale float32 [E].
    """

    w13: torch.Tensor
    w13_scale: torch.Tensor
    w13_alpha: torch.Tensor
    w13_input_scale: torch.Tensor
    w2: torch.Tensor
    w2_scale: torch.Tensor
    w2_alpha: torch.Tensor
    w2_input_scale: torch.Tensor
    swiglu_limit: float

    @property
    def num_experts(self) -> int:
        return len(self.w2_alpha)

    @property
    def hidden_size(self) -> int:
        return 2 * self.w13.shape[1]

    @property
    def inter_size(self) -> int:
        return 2 * self.w2.shape[1]


def linear_operand(
    weight: torch.Tensor, weight_scale: torch.Tensor, global_scale_N: torch.Tensor, input_scale: torch.Tensor
) -> W4A4LinearOperand:
    """Makes the operand of a dense product.

    Shapes: weight uint8 [N, K/2]; weight_scale E4M3 [N, K/16]; global_scale_N float32 [N]; input_scale float32 [].
    Errors: OperandError when K is not a multiple of 64, N not of 8, or a global scale is not finite and positive.
    """
    num_rows, k = weight.shape[0], 2 * weight.shape[1]
    if k % K_STEP or num_rows % 8:
        raise OperandError(f"weight [{num_rows}, {k}]: W4A4 needs K in multiples of {K_STEP} and N in multiples of 8")
    _require_scales("weight_scale_2", global_scale_N)
    _require_scales("input_scale", input_scale)
    alpha = (input_scale * global_scale_N).contiguous()
    return W4A4LinearOperand(weight.contiguous(), _box(weight_scale), alpha, input_scale.contiguous())


def moe_operand(
    w13: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    w2: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    swiglu_limit: float,
) -> W4A4MoeOperand:
    """Makes the operand of routed experts from (qdata, scale, global_scale, input_scale) of both fused matrices.

    Shapes: w13: uint8 [E, 2F, D/2] (gate rows first), E4M3 [E, 2F, D/16], float32 [E, 2], float32 [E]; w2: uint8
        [E, D, F/2], E4M3 [E, D, F/16], float32 [E], float32 [E].
    Errors: OperandError when D or F is not a multiple of 128, or a global scale is not finite and positive.
    """
    dim, inter = w2[0].shape[1], 2 * w2[0].shape[2]
    if dim % PIECE_ROWS or inter % PIECE_ROWS:
        raise OperandError(f"experts of width {inter} on {dim}: W4A4 needs both in multiples of {PIECE_ROWS}")
    for name, (_, _, global_scale, input_scale) in (("w13", w13), ("w2", w2)):
        _require_scales(f"{name}_scale_2", global_scale)
        _require_scales(f"{name}_input_scale", input_scale)
    return W4A4MoeOperand(
        w13[0].contiguous().flatten(0, 1),
        _box(w13[1]),
        (w13[3][:, None] * w13[2]).contiguous(),
        w13[3].contiguous(),
        w2[0].contiguous().flatten(0, 1),
        _box(w2[1]),
        (w2[3] * w2[2]).contiguous(),
        w2[3].contiguous(),
        swiglu_limit,
    )


def boxed_shape(num_rows: int, k: int) -> tuple[int, int, int, int, int]:
    """Returns the shape in which TMA fetches swizzled scales: pieces of 512 bytes as 2 x 256, its widest box."""
    return 1, -(-num_rows // PIECE_ROWS), -(-k // K_STEP), 2, 256


def unboxed(scale: torch.Tensor, num_rows: int, num_groups: int) -> torch.Tensor:
    """Converts the operand's swizzled scales back to row-major [num_rows, num_groups]."""
    pieces = scale.view(scale.shape[1], scale.shape[2], 32, 4, 4)
    return unswizzle_scales(pieces, num_rows, num_groups)


def scale_padding(scale: torch.Tensor, num_rows: int, num_groups: int) -> torch.Tensor:
    """Returns the padding of swizzled scales outside [num_rows, num_groups]: uint8, one after the other."""
    whole = unboxed(scale, scale.shape[1] * PIECE_ROWS, scale.shape[2] * PIECE_COLUMNS).view(torch.uint8)
    row, col = (torch.arange(n, device=scale.device) for n in whole.shape)
    return whole[(row[:, None] >= num_rows) | (col >= num_groups)]


def _box(scale: torch.Tensor) -> torch.Tensor:
    """Swizzles row-major scales [N, G] or [E, N, G] into the box shape; experts become rows of pieces."""
    swizzled = swizzle_scales(scale)
    return swizzled.view(1, -1, swizzled.shape[-4], 2, 256)


def _require_scales(name: str, values: torch.Tensor) -> None:
    if not bool((torch.isfinite(values) & (values > 0)).all()):
        raise OperandError(f"{name} must be finite and positive: W4A4 needs a calibrated scale for every matrix")
