"""Torch reference of what keys and index vectors are rounded to, as DeepSeek's published inference code does.

Shape suffixes: T tokens, H head dim.
"""

import torch

from ownpath.kernels.reference import Reference
from ownpath.numerics import fake_quantize_fp4, fake_quantize_fp8, hadamard

KV_BLOCK = 64
INDEX_BLOCK = 32


def fp8_keys(kv_TH: torch.Tensor, num_rotary: int) -> torch.Tensor:
    """Keys as the FP8 cache would hold them: all but the last ``num_rotary`` channels in E4M3, blocks of 64.

    Shapes: kv [T, H] -> the same, in its dtype.
    """
    num_plain = kv_TH.shape[-1] - num_rotary
    plain, rotary = kv_TH.split((num_plain, num_rotary), dim=-1)
    return torch.cat((fake_quantize_fp8(plain, KV_BLOCK), rotary), dim=-1)


def fp4_index(x: torch.Tensor) -> torch.Tensor:
    """Index queries or keys, rotated by Hadamard's matrix and in E2M1 with a power-of-two scale per 32 channels.

    Shapes: x [..., H], H a power of two -> the same, in its dtype.
    """
    return fake_quantize_fp4(hadamard(x), INDEX_BLOCK)


class KeyQuantizerReference(Reference):
    """``fp8_keys`` as a kernel. The operand is the number of rotary channels."""

    def prepare(self, num_rotary: int) -> int:
        """The number of rotary channels."""
        return num_rotary

    def variant(self, kv_TH: torch.Tensor, operand: int) -> None:
        """There is one form."""

    def run(self, kv_TH: torch.Tensor, operand: int) -> torch.Tensor:
        """Keys, rounded and read back."""
        return fp8_keys(kv_TH, operand)


class IndexQuantizerReference(Reference):
    """``fp4_index`` as a kernel. There is no operand."""

    def prepare(self, weights: None = None) -> None:
        """Nothing is kept."""

    def variant(self, x: torch.Tensor, operand: None) -> None:
        """There is one form."""

    def run(self, x: torch.Tensor, operand: None = None) -> torch.Tensor:
        """Index queries or keys, rotated, rounded and read back."""
        return fp4_index(x)


FP8_KEYS = KeyQuantizerReference()
FP4_INDEX = IndexQuantizerReference()
