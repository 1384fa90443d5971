"""E2M1, the 4-bit float of NVFP4 and MXFP4: one sign bit, two exponent bits, one mantissa bit.

A code is ``s eem``: bit 3 is the sign, bits 0..2 index ``E2M1_MAGNITUDES``. There is no infinity and no NaN.
"""

import functools

import torch
from torch import Tensor

E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX = 6.0


def round_to_e2m1_code(x: Tensor) -> Tensor:
    """Returns the code of the E2M1 value nearest to x without checking for NaN (a NaN gets code 0 or 8, by its sign).

    For quantisers whose block scale already carries the NaN. Rounds as ``encode_e2m1``.
    """
    a = x.abs()
    code = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    # One step per midpoint between neighbours. A tie goes to the even code: ">" stays below, ">=" lifts it.
    for passed in (a > 0.25, a >= 0.75, a > 1.25, a >= 1.75, a > 2.5, a >= 3.5, a > 5.0):
        code += passed.view(torch.uint8)  # its bytes are 0 and 1; a bool would be converted first
    return code | (torch.signbit(x).view(torch.uint8) << 3)


def encode_e2m1(x: Tensor) -> Tensor:
    """Returns the code of the E2M1 value nearest to x: ties to the even code, saturating at 6, the sign of zero kept.

    Shapes: x [...] of a floating dtype -> uint8 [...], each in 0..15.
    Errors: ValueError for a NaN, which E2M1 cannot hold. An infinity saturates.
    Source: OCP Microscaling Formats v1.0, 5.3.3 (FP4), with IEEE 754 roundTiesToEven.
    """
    if not x.is_floating_point():
        raise ValueError(f"encode_e2m1: x must be floating point, not {x.dtype}")
    if bool(torch.isnan(x).any()):
        raise ValueError("encode_e2m1: x has a NaN, and E2M1 has no code for NaN")
    return round_to_e2m1_code(x)


def decode_e2m1(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns the value of each E2M1 code; exact in every dtype from float8_e4m3fn up. Code 8 is -0.

    Shapes: codes uint8 [...] in 0..15 -> dtype [...].
    Errors: ValueError for another storage dtype (int8 would make codes of packed bytes negative).
    """
    if codes.dtype != torch.uint8:
        raise ValueError(f"decode_e2m1: codes must be uint8, not {codes.dtype}")
    return _code_table(codes.device)[codes.long()].to(dtype)


def pack_e2m1(codes: Tensor) -> Tensor:
    """Packs two codes into a byte: the even k in the low nibble, the odd k that follows it in the high nibble.

    Shapes: codes uint8 [..., K] -> uint8 [..., K/2].
    Errors: ValueError for an odd K or another dtype.
    """
    if codes.dtype != torch.uint8:
        raise ValueError(f"pack_e2m1: codes must be uint8, not {codes.dtype}")
    if codes.shape[-1] % 2:
        raise ValueError(f"pack_e2m1: K = {codes.shape[-1]} is odd, and a byte holds two codes")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_e2m1(packed: Tensor) -> Tensor:
    """Unpacks bytes to codes, in k order.

    Shapes: packed uint8 or int8 [..., K/2] -> uint8 [..., K].
    Errors: ValueError for another dtype.
    """
    packed = packed_bytes(packed)
    return torch.stack((packed & 0x0F, packed >> 4), dim=-1).flatten(-2)


def packed_bytes(packed: Tensor) -> Tensor:
    """Views packed bytes as uint8. (DeepSeek stores FP4 as int8, whose ``>> 4`` would copy the sign bit.)"""
    if packed.dtype not in (torch.uint8, torch.int8):
        raise ValueError(f"packed E2M1 must be uint8 or int8, not {packed.dtype}")
    return packed.view(torch.uint8)


def decode_packed_e2m1(packed: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Computes ``decode_e2m1(unpack_e2m1(packed), dtype)`` with one table look-up for each byte.

    Shapes: packed uint8 or int8 [..., K/2] -> dtype [..., K]; dtype is bfloat16, float16, float32 or float64.
    """
    packed = packed_bytes(packed)
    lookup_dtype = dtype if dtype.itemsize in (2, 4) else torch.float32
    table = _pair_table(packed.device, lookup_dtype)
    pairs = table.index_select(0, packed.reshape(-1).to(torch.int32))
    *lead, num_bytes = packed.shape
    return pairs.view(lookup_dtype).view(*lead, 2 * num_bytes).to(dtype)


@functools.cache
def _code_table(device: torch.device) -> Tensor:
    """Returns the 16 values in code order, float32 [16]; cached for each device."""
    magnitudes = torch.tensor(E2M1_MAGNITUDES, dtype=torch.float32, device=device)
    return torch.cat((magnitudes, -magnitudes))


@functools.cache
def _pair_table(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Returns both values of every byte as one integer of twice the width, [256], so that a look-up moves one word."""
    byte = torch.arange(256, dtype=torch.uint8, device=device)
    pairs = decode_e2m1(unpack_e2m1(byte.unsqueeze(-1)), dtype)
    return pairs.view(torch.int64 if dtype.itemsize == 4 else torch.int32).view(256)
