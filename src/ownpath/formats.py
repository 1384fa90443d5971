"""Number formats that a stored weight, and a cache, can have. Descriptors only: the arithmetic is in
``ownpath.numerics``."""

from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True)
class Format:
    """The number format of a weight matrix.

    bits: bits of one stored element.
    block: rows x columns that share one block scale; ``None`` when the format has no block scale.
    scale_dtypes: safetensors dtype names that a block scale may have on disk.
    has_global_scale: whether one FP32 multiplier per tensor completes ``value = qdata * scale * global_scale``.
    """

    name: str
    bits: int
    block: tuple[int, int] | None = None
    scale_dtypes: tuple[str, ...] = ()
    has_global_scale: bool = False

    @property
    def packed_per_byte(self) -> int:
        """Elements in one stored byte: 2 for the 4-bit formats, otherwise 1."""
        return 2 if self.bits == 4 else 1

    def __str__(self) -> str:
        return self.name


NVFP4 = Format("NVFP4", 4, (1, 16), ("F8_E4M3",), has_global_scale=True)
MXFP4 = Format("MXFP4", 4, (1, 32), ("F8_E8M0",))
MXFP8 = Format("MXFP8", 8, (1, 32), ("F8_E8M0",))
FP8_BLOCK = Format("FP8_BLOCK", 8, (128, 128), ("F8_E8M0", "F32", "BF16", "F16"))
BF16 = Format("BF16", 16)
FP32 = Format("FP32", 32)
INT64 = Format("INT64", 64)

FP8_KEY_DIM, FP8_KEY_ROTARY, FP8_INDEX_DIM = 512, 64, 128
"""Channels of a key in FP8 pages, how many of them are rotary, and channels of an index key."""
FP8_KEY_BYTES, FP8_INDEX_BYTES = 584, 132
"""Bytes of a key in FP8 pages: 448 E4M3, 64 BF16, 7 scales and a pad byte; of an index key: 128 E4M3 and a scale."""


class CacheFormat(StrEnum):
    """The format of keys in the caches."""

    BF16 = "bf16"
    """The activations' dtype: BF16 on a GPU."""
    FP8 = "fp8"
    """The pages of DeepSeek's published caches: E4M3 with power-of-two scales, rotary channels in BF16."""
