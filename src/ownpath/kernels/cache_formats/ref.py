"""Torch reference of the rounding of keys and index vectors in DeepSeek's published inference code.

Shape suffixes: T tokens, H head dim.
"""

import torch

from ownpath.kernels.reference import Reference
from ownpath.numerics import fake_quantize_fp4, fake_quantize_fp8, hadamard

KV_BLOCK = 64
INDEX_BLOCK = 32


def fp8_keys(kv_TH: torch.Tensor, num_rotary: int) -> torch.Tensor:
    """Rounds keys to the FP8 cache's format: E4M3 in blocks of 64, except the last ``num_rotary`` channels.

    Shapes: kv [T, H] -> the same, in its dtype.
    """
    num_plain = kv_TH.shape[-1] - num_rotary
    plain, rotary = kv_TH.split((num_plain, num_rotary), dim=-1)
    return torch.cat((fake_quantize_fp8(plain, KV_BLOCK), rotary), dim=-1)


def fp4_index(x: torch.Tensor) -> torch.Tensor:
    """Multiplies index queries or keys by the Hadamard matrix and rounds to E2M1, a power-of-two scale per 32 channels.

    Shapes: x [..., H], H a power of two -> the same, in its dtype.
    """
    return fake_quantize_fp4(hadamard(x), INDEX_BLOCK)


class KeyQuantizerReference(Reference):
    """``fp8_keys`` as a kernel. The operand is the number of rotary channels."""

    def prepare(self, num_rotary: int) -> int:
        """Returns the number of rotary channels."""
        return num_rotary

    def variant(self, kv_TH: torch.Tensor, operand: int) -> None:
        """Returns ``None``: the kernel has no variants."""

    def run(self, kv_TH: torch.Tensor, operand: int) -> torch.Tensor:
        """Rounds keys and reads them back."""
        return fp8_keys(kv_TH, operand)


class IndexQuantizerReference(Reference):
    """``fp4_index`` as a kernel. There is no operand."""

    def prepare(self, weights: None = None) -> None:
        """Returns ``None``: there is no operand."""

    def variant(self, x: torch.Tensor, operand: None) -> None:
        """Returns ``None``: the kernel has no variants."""

    def run(self, x: torch.Tensor, operand: None = None) -> torch.Tensor:
        """Transforms and rounds index queries or keys and reads them back."""
        return fp4_index(x)


FP8_KEYS = KeyQuantizerReference()
FP4_INDEX = IndexQuantizerReference()
