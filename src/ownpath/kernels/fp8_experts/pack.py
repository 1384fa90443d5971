"""Packs experts into the layout of ``fp8_experts.layout``, reads them back, and says which E4M3 cannot hold."""

from dataclasses import dataclass

import torch

from ownpath.formats import MXFP4, NVFP4
from ownpath.kernels.fp8_experts.layout import (
    TOO_WIDE,
    ScaleWindow,
    mxfp4_window,
    nvfp4_window,
    pack_codes,
    pack_scales,
    unpack_codes,
    unpack_scales,
)
from ownpath.kernels.nvfp4.layout import check_scales
from ownpath.kernels.nvfp4.linear import require_packable
from ownpath.numerics import decode_nvfp4_blocks
from ownpath.qtensor import QuantTensor


@dataclass(frozen=True)
class PackedCodes:
    """One matrix of every expert in the layout of ``fp8_experts.layout``.

    Shapes: codes uint8 [E * N * K / 2]; scales uint8 [E * N * K / 32]; row_scales float32 [E, N], of packed rows;
        global_scale as stored: float32 [E, 2] or [E]; ``None`` for MXFP4.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    row_scales: torch.Tensor
    global_scale: torch.Tensor | None
    num_rows: int
    num_cols: int

    @property
    def device_index(self) -> int:
        return self.codes.get_device()


def check_stack(name: str, side: QuantTensor) -> str | None:
    """Returns which expert's scales span more powers of two than E4M3 has; ``None`` where all fit.

    Errors: ValueError naming a stack that cannot be packed: a layout, a bad scale, or NVFP4 that was not made from
    MXFP4, with what rounding its scales would cost.
    """
    assert side.scale is not None
    require_packable(name, side.qdata)
    require_packable(f"{name}_scale", side.scale)
    if side.format is NVFP4:
        check_scales(f"{name}_scale", side.scale)
    elif bool((side.scale.view(torch.uint8) == 255).any()):
        raise ValueError(f"{name}_scale holds a NaN block scale")
    for expert in range(len(side.qdata)):
        window = _window(side, expert)
        if window == TOO_WIDE:
            return f"{name} of expert {expert}: {window}"
        if isinstance(window, str):
            cost = rounding_cost(side.qdata[expert], side.scale[expert])
            raise ValueError(
                f"{name} of expert {expert} was not made from MXFP4: {window}; FP8 products would need its scales "
                f"rounded to powers of two, which changes its weights by {cost:.1%} (relative L2)"
            )
    return None


def rounding_cost(codes: torch.Tensor, scale: torch.Tensor) -> float:
    """Returns the relative L2 change of an NVFP4 matrix whose block scales are rounded to powers of two."""
    weight = decode_nvfp4_blocks(codes, scale, torch.float32)
    values = scale.float()
    rounded = torch.exp2(torch.log2(values.clamp(min=2.0**-9)).round())
    ratio = torch.where(values > 0, rounded / values, 1.0).repeat_interleave(16, dim=1)
    return float((weight * (ratio - 1)).norm() / weight.norm())


def pack_stack(side: QuantTensor, rows: torch.Tensor) -> PackedCodes:
    """Packs a checked stack: its codes in place, its scales into a byte for 32 of them."""
    codes, placed = side.qdata, rows.to(side.qdata.device)
    num_experts, num_rows, num_cols = side.shape
    scales = torch.empty(num_experts, num_rows * num_cols // 32, dtype=torch.uint8, device=codes.device)
    row_scales = torch.empty(num_experts, num_rows, dtype=torch.float32, device=codes.device)
    for expert in range(num_experts):
        window = _window(side, expert)
        assert not isinstance(window, str)
        if side.format is NVFP4:
            assert side.scale is not None
            dead = side.scale[expert].view(torch.uint8) & 0x7F == 0
            codes[expert].masked_fill_(dead.repeat_interleave(8, dim=1), 0)
        scales[expert] = pack_scales(window.relative, placed)
        multipliers = _multipliers(side.global_scale, expert, num_rows, codes)
        row_scales[expert] = torch.ldexp(multipliers, window.row_exponents)[placed]
        codes[expert].view(-1).copy_(pack_codes(codes[expert], placed))
    return PackedCodes(codes, scales, row_scales, side.global_scale, num_rows, num_cols)


def restore_stack(weight: PackedCodes, rows: torch.Tensor, expert: int) -> QuantTensor:
    """Reads one expert's matrix back, in its stored format. rows: the source of each packed row."""
    placed, num_experts = rows.to(weight.codes.device), len(weight.row_scales)
    packed, scales = (part.view(num_experts, -1)[expert] for part in (weight.codes, weight.scales))
    codes = unpack_codes(packed, placed, weight.num_cols)
    row_scales = torch.empty_like(weight.row_scales[expert])
    row_scales[placed] = weight.row_scales[expert]
    multipliers = _multipliers(weight.global_scale, expert, weight.num_rows, codes)
    shift = torch.log2(row_scales / multipliers).round().int()
    exponents = unpack_scales(scales, placed, weight.num_cols) + shift[:, None]
    if weight.global_scale is None:
        return QuantTensor(codes, (exponents + 127).to(torch.uint8).view(torch.float8_e8m0fnu), None, MXFP4)
    # A block of zeros may have been moved out of E4M3's range; any scale gives the same products.
    powers = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents.clamp(-9, 8))
    scale = powers.repeat_interleave(2, dim=1).to(torch.float8_e4m3fn)
    return QuantTensor(codes, scale, weight.global_scale[expert], NVFP4)


def _window(side: QuantTensor, expert: int) -> ScaleWindow | str:
    assert side.scale is not None
    read = mxfp4_window if side.format is MXFP4 else nvfp4_window
    return read(side.qdata[expert], side.scale[expert])


def _multipliers(global_scale: torch.Tensor | None, expert: int, num_rows: int, like: torch.Tensor) -> torch.Tensor:
    """Returns the stored multiplier of each row, float32 [N]: of gate and up, of the matrix, or 1."""
    if global_scale is None:
        return torch.ones(num_rows, device=like.device)
    stored = global_scale[expert].reshape(-1)
    return stored.repeat_interleave(num_rows // len(stored))
