"""Random valid operands, generated on the device they are used on.

Codes are uniform over all 16 (or, for FP8, all finite) ones. Block scales are uniform over the E4M3 codes of 32 to
448, where a quantiser that maps the largest value of a matrix to 6 x 448 puts almost all of them; those of experts over
the powers of two from 32 to 256, the same for both halves of 32 weights, as in NVFP4 that was made from MXFP4. Global
scales are chosen so that a product with unit-variance activations has about unit variance, times a random factor of 0.5
to 2, so that a contender that confuses them has a wrong result.
"""

from dataclasses import dataclass, fields
from typing import Self

import torch

from ownpath.bench.shapes import LinearShape, MoeShape
from ownpath.numerics import decode_e2m1, decode_e4m3

_FIRST_SCALE_CODE, _LAST_SCALE_CODE = 0x60, 0x7E  # 32 to 448 in E4M3
_POWER_CODES = range(0x60, 0x79, 8)  # 32, 64, 128, 256
_NUM_FP8_CODES = 0x7F  # magnitudes; 0x7F is NaN


class _Cloneable:
    def clone(self) -> Self:
        """Returns a copy: runners repack their operands in place."""
        return type(self)(*(getattr(self, field.name).clone() for field in fields(self)))  # type: ignore[arg-type]


@dataclass(frozen=True)
class MoeOperands(_Cloneable):
    """Shapes: w13 uint8 [E, 2F, D/2], gate rows first; w13_scale E4M3 [E, 2F, D/16]; w13_scale_2 float32 [E]; w2
    uint8 [E, D, F/2]; w2_scale E4M3 [E, D, F/16]; w2_scale_2 float32 [E]."""

    w13: torch.Tensor
    w13_scale: torch.Tensor
    w13_scale_2: torch.Tensor
    w2: torch.Tensor
    w2_scale: torch.Tensor
    w2_scale_2: torch.Tensor


@dataclass(frozen=True)
class Nvfp4Operands(_Cloneable):
    """Shapes: weight uint8 [N, K/2]; weight_scale E4M3 [N, K/16]; weight_scale_2 float32 []."""

    weight: torch.Tensor
    weight_scale: torch.Tensor
    weight_scale_2: torch.Tensor


@dataclass(frozen=True)
class Fp8Operands(_Cloneable):
    """Shapes: weight E4M3 [N, K]; scale E8M0 [ceil(N/128), ceil(K/128)]."""

    weight: torch.Tensor
    scale: torch.Tensor


def random_moe(shape: MoeShape, generator: torch.Generator) -> MoeOperands:
    """Makes one layer's routed experts."""
    experts, hidden, inter = shape.num_experts, shape.hidden, shape.inter
    w13 = _nvfp4((experts, 2 * inter, hidden), (experts,), generator, of_mxfp4=True)
    w2 = _nvfp4((experts, hidden, inter), (experts,), generator, of_mxfp4=True)
    return MoeOperands(*w13, *w2)


def random_nvfp4(shape: LinearShape, generator: torch.Generator) -> Nvfp4Operands:
    """Makes a dense NVFP4 weight."""
    return Nvfp4Operands(*_nvfp4((shape.out_features, shape.in_features), (), generator))


def random_fp8(shape: LinearShape, generator: torch.Generator) -> Fp8Operands:
    """Makes a dense FP8 weight with a power-of-two scale for each block of 128x128."""
    device = generator.device
    codes = torch.randint(
        0, _NUM_FP8_CODES, (shape.out_features, shape.in_features), generator=generator, device=device
    )
    signs = torch.randint(0, 2, codes.shape, generator=generator, device=device) << 7
    finite = torch.arange(_NUM_FP8_CODES, dtype=torch.uint8).view(torch.float8_e4m3fn)
    exponent = -torch.log2(_rms(decode_e4m3(finite)) * shape.in_features**0.5).round().to(torch.int64)
    blocks = (-(-shape.out_features // 128), -(-shape.in_features // 128))
    spread = torch.randint(-1, 2, blocks, generator=generator, device=device)
    scale = (127 + int(exponent) + spread).to(torch.uint8).view(torch.float8_e8m0fnu)
    return Fp8Operands((codes | signs).to(torch.uint8).view(torch.float8_e4m3fn), scale)


def random_activations(num_rows: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """Makes bfloat16 activations [num_rows, width] of unit variance."""
    return torch.randn(num_rows, width, generator=generator, device=generator.device).to(torch.bfloat16)


def _nvfp4(
    shape: tuple[int, ...], global_shape: tuple[int, ...], generator: torch.Generator, of_mxfp4: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *lead, width = shape
    device = generator.device
    packed = _random_bytes((*lead, width // 2), 0, 255, generator)
    values = _POWER_CODES if of_mxfp4 else range(_FIRST_SCALE_CODE, _LAST_SCALE_CODE + 1)
    scales = torch.tensor(values, dtype=torch.uint8).view(torch.float8_e4m3fn)
    if of_mxfp4:
        scale = _random_bytes((*lead, width // 32), 0, len(_POWER_CODES) - 1, generator)
        scale = scale.mul_(_POWER_CODES.step).add_(_POWER_CODES.start).repeat_interleave(2, dim=-1)
    else:
        scale = _random_bytes((*lead, width // 16), _FIRST_SCALE_CODE, _LAST_SCALE_CODE, generator)
    codes = torch.arange(16, dtype=torch.uint8)
    unit = 1 / (_rms(decode_e2m1(codes)) * _rms(decode_e4m3(scales)) * width**0.5)
    factor = 2 ** (2 * torch.rand(global_shape, generator=generator, device=device) - 1)
    return packed, scale.view(torch.float8_e4m3fn), (float(unit) * factor).to(torch.float32)


def _random_bytes(shape: tuple[int, ...], low: int, high: int, generator: torch.Generator) -> torch.Tensor:
    out = torch.empty(shape, dtype=torch.uint8, device=generator.device)
    return out.random_(low, high + 1, generator=generator)


def _rms(values: torch.Tensor) -> torch.Tensor:
    return values.double().square().mean().sqrt()
