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
FP8_KEY_BYTES, FP8_INDEX_BYTES, FP4_INDEX_BYTES = 584, 132, 68
"""Bytes of a key in FP8 pages: 448 E4M3, 64 BF16, 7 scales and a pad byte; of an index key: 128 E4M3 and a scale; of an
index key in FP4 pages: 128 E2M1, two to a byte, and 4 scales."""


class KeyFormat(StrEnum):
    """The format of one kind of keys in the caches."""

    BF16 = "bf16"
    """The activations' dtype: BF16 on a GPU."""
    FP8 = "fp8"
    """The pages of DeepSeek's published caches: E4M3 with power-of-two scales, rotary channels in BF16."""
    FP4 = "fp4"
    """Pages of E2M1 with a power-of-two scale per 32 channels; index keys alone have them."""


class CacheFormat(StrEnum):
    """The format of the caches, by its name in ``--cache-format``: of window keys and entries, and of index keys."""

    BF16 = "bf16", KeyFormat.BF16, KeyFormat.BF16
    FP8 = "fp8", KeyFormat.FP8, KeyFormat.FP8
    FP4_INDEX = "fp4-index", KeyFormat.FP8, KeyFormat.FP4

    keys: KeyFormat
    index_keys: KeyFormat

    def __new__(cls, name: str, keys: KeyFormat, index_keys: KeyFormat) -> "CacheFormat":
        member = str.__new__(cls, name)
        member._value_, member.keys, member.index_keys = name, keys, index_keys
        return member

    @property
    def in_pages(self) -> bool:
        """True if keys lie in pages, which round them."""
        return self.keys is not KeyFormat.BF16
