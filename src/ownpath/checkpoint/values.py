"""The dtypes of stored tensors: how their bytes are viewed, and which of them widen without loss."""

from types import MappingProxyType

import torch

TORCH_DTYPES = MappingProxyType(
    {
        "U8": torch.uint8,
        "I8": torch.uint8,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E8M0": torch.float8_e8m0fnu,
        "BF16": torch.bfloat16,
        "F16": torch.float16,
        "F32": torch.float32,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "U16": torch.uint16,
        "U32": torch.uint32,
    }
)
"""Safetensors dtype -> the dtype of its elements. I8 is only a name for bytes: packed codes, or ids below 128."""

FLOATS = ("F32", "BF16", "F16")
"""Floats that float32 holds exactly, which is what they widen to."""
TABLES = ("I64", "I32", "I16", "U8", "U16", "U32")
"""Integers that int64 holds exactly."""
