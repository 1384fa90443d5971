"""What a checkpoint's bytes mean, decoded on demand: an oracle's own reading, beside ``numerics`` and ``weights``.

Values come out of tables that are written down from the formats' bits (docs/numerics.md), one entry for each byte:

    E2M1   s ee m          two in a byte, the low four bits come first
    E4M3   s eeee mmm      0x7F and 0xFF are NaN
    E8M0   eeeeeeee        2^(e - 127), 0xFF is NaN

Legend: N rows, K columns of a matrix; B bytes.
"""

import math
from functools import cached_property

import torch
from torch import Tensor

from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.reader import TensorReader
from ownpath.checkpoint.schema import Encoding
from ownpath.formats import BF16, FP8_BLOCK, FP32, MXFP4, NVFP4

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FP8_BLOCK_SIZE = 128
_DIVISORS = ("weight_global_scale", "input_global_scale")
"""Tensors that hold 1 / the multiplier: compressed-tensors' spelling, and nobody else's."""


def e2m1_of(code: int) -> float:
    """The value of four bits."""
    return -_E2M1[code - 8] if code >= 8 else _E2M1[code]


def e4m3_of(byte: int) -> float:
    """The value of a byte: exponent bias 7, subnormal where the exponent is 0."""
    sign, exponent, mantissa = (-1.0 if byte >> 7 else 1.0), byte >> 3 & 15, byte & 7
    if byte & 0x7F == 0x7F:
        return math.nan
    return sign * (math.ldexp(mantissa, -9) if exponent == 0 else math.ldexp(8 + mantissa, exponent - 10))


def e8m0_of(byte: int) -> float:
    """The value of a byte, which is nothing but an exponent."""
    return math.nan if byte == 255 else math.ldexp(1.0, byte - 127)


class Stored:
    """One checkpoint's weights in one dtype on one device. Nothing is kept: every call reads and decodes anew.

    dtype: float64 or float32, which holds every code times block scale exactly and rounds the global scale's product.
    Errors: CheckpointError naming a tensor that the checkpoint does not hold.
    """

    def __init__(self, index: CheckpointIndex, device: torch.device, dtype: torch.dtype = torch.float64) -> None:
        self.index, self.device, self.dtype = index, device, dtype
        self._read = TensorReader(index)

    def param(self, key: str) -> Tensor:
        """A tensor that is used as it is stored: floats in ``dtype``, integers in int64."""
        stored = self._read(key).to(self.device)
        return stored.to(self.dtype if stored.is_floating_point() else torch.int64)

    def rows(self, key: str, row_ids: Tensor) -> Tensor:
        """Some rows of such a tensor, in the order of ``row_ids``; the others are not read."""
        stored = self._read(key)[row_ids.cpu()].to(self.device)
        return stored.to(self.dtype if stored.is_floating_point() else torch.int64)

    def matrix(self, module: str, encoding: Encoding) -> Tensor:
        """The matrix of ``module`` with all its scales: [N, K]."""
        blocks_NK, global_scale = self.scaled(module, encoding)
        return blocks_NK if global_scale is None else blocks_NK * global_scale.to(self.dtype)

    def scaled(self, module: str, encoding: Encoding) -> tuple[Tensor, Tensor | None]:
        """Codes times block scales [N, K], exact, and the global scale as a multiplier, float32 [] (NVFP4 alone)."""
        raw, stored = self._read(encoding.key(module, "qdata")), encoding.format
        if stored in (BF16, FP32):
            return raw.to(self.device).to(self.dtype), None
        if stored is FP8_BLOCK:
            return self._fp8(raw, self._read(encoding.key(module, "scale"))), None
        assert stored in (NVFP4, MXFP4), stored
        scale = self._read(encoding.key(module, "scale"))
        if stored is MXFP4:
            return self._fp4(raw, self._looked_up(scale, self._e8m0), 32), None
        return self._fp4(raw, self._looked_up(scale, self._e4m3), 16), self._scalar(module, encoding, "global_scale")

    def input_scale(self, module: str, encoding: Encoding) -> Tensor | None:
        """What activations in front of ``module`` are calibrated to, as a multiplier: float32 [], or ``None``."""
        has_one = any(part.role == "input_scale" for part in encoding.parts)
        return self._scalar(module, encoding, "input_scale") if has_one else None

    def _scalar(self, module: str, encoding: Encoding, role: str) -> Tensor:
        """A divisor means one float32 division (docs/checkpoint.md)."""
        key = encoding.key(module, role)
        scalar = self._read(key).to(self.device).reshape(())
        return torch.ones_like(scalar) / scalar if key.endswith(_DIVISORS) else scalar

    def _fp4(self, raw_NB: Tensor, scale: Tensor, width: int) -> Tensor:
        """Two codes a byte, one scale for ``width`` codes of a row."""
        values = self._looked_up(raw_NB, self._e2m1_pairs).flatten(-2)
        scaled: Tensor = values.unflatten(-1, (-1, width)) * scale[..., None]
        return scaled.flatten(-2)

    def _fp8(self, raw_NK: Tensor, stored_scale: Tensor) -> Tensor:
        """One scale for 128 x 128 codes, fewer at the edges; its dtype tells whether it is E8M0 or a float."""
        if stored_scale.element_size() == 1:
            scale = self._looked_up(stored_scale, self._e8m0)
        else:
            scale = stored_scale.to(self.device).to(self.dtype)
        num_rows, num_cols = raw_NK.shape
        rows, cols = (torch.arange(n, device=self.device) // _FP8_BLOCK_SIZE for n in (num_rows, num_cols))
        return self._looked_up(raw_NK, self._e4m3) * scale[rows][:, cols]

    def _looked_up(self, raw: Tensor, table: Tensor) -> Tensor:
        """The table's entries for a tensor's bytes, whatever dtype it has been given."""
        codes = raw.view(torch.uint8).to(self.device).int()
        return table.index_select(0, codes.flatten()).view(*raw.shape, *table.shape[1:])

    @cached_property
    def _e2m1_pairs(self) -> Tensor:
        """Byte -> its two values [256, 2]."""
        return self._table([(e2m1_of(byte & 15), e2m1_of(byte >> 4)) for byte in range(256)])

    @cached_property
    def _e4m3(self) -> Tensor:
        return self._table([e4m3_of(byte) for byte in range(256)])

    @cached_property
    def _e8m0(self) -> Tensor:
        return self._table([e8m0_of(byte) for byte in range(256)])

    def _table(self, values: list[float] | list[tuple[float, float]]) -> Tensor:
        return torch.tensor(values, dtype=self.dtype, device=self.device)
