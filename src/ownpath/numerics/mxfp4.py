"""MXFP4 scales as NVFP4 ones: the same weights, exactly, for kernels that read NVFP4."""

import torch

E4M3_MAX_POWER, E4M3_MIN_POWER = 8, -9
NAN = 255


def mxfp4_scale_as_nvfp4(name: str, codes: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """E8M0 scales per 32 weights to E4M3 scales per 16 and a power of two per matrix, product unchanged.

    Shapes: codes uint8 [E, N, K/2]; scale E8M0 [E, N, K/32]; returns E4M3 [E, N, K/16] and float32 [E].
    Errors: ValueError naming the operand and expert for a NaN scale, or for scales of non-zero blocks that span more
    than the 18 powers of two of E4M3.
    """
    exponent = scale.view(torch.uint8).to(torch.int16)
    is_zero = (codes.unflatten(-1, (-1, 16)) & 0x77 == 0).all(dim=-1)
    for expert in torch.where((exponent == NAN).flatten(1).any(dim=1))[0].tolist():
        raise ValueError(f"{name} of expert {expert} holds a NaN scale")
    top = torch.where(is_zero, 0, exponent).flatten(1).amax(dim=1)
    power = exponent - top[:, None, None] + E4M3_MAX_POWER
    power = torch.where(is_zero, 0, power)
    for expert in torch.where((power < E4M3_MIN_POWER).flatten(1).any(dim=1))[0].tolist():
        raise ValueError(f"{name} of expert {expert} spans more than the {E4M3_MAX_POWER - E4M3_MIN_POWER + 1} "
                         "powers of two that NVFP4 block scales have")  # fmt: skip
    narrow = _power_of_two(power).to(torch.float8_e4m3fn)
    global_scale = _power_of_two(top - 127 - E4M3_MAX_POWER)
    return narrow.view(torch.uint8).repeat_interleave(2, dim=-1).view(torch.float8_e4m3fn), global_scale


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent.int())
