"""The torch dtype of each safetensors dtype, and the file format's order of bytes."""

from types import MappingProxyType

import torch

TORCH_DTYPES = MappingProxyType(
    {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "C64": torch.complex64}
    | {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu}
    | {"F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz}
    | {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool}
    | {"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8}
)
"""Without the dtypes that torch has no elements for (F4, F6): no encoding stores those."""
NAMES = MappingProxyType({dtype: name for name, dtype in TORCH_DTYPES.items()})

FLOATS = ("F32", "BF16", "F16")
"""Floats that float32 holds exactly, which is what they widen to."""
TABLES = ("I64", "I32", "I16", "U8", "U16", "U32")
"""Integers that int64 holds exactly."""
