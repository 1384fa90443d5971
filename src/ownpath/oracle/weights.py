"""Decodes a checkpoint's tensors on demand: the oracle's own reading, independent of ``numerics`` and ``weights``.

Legend: N rows, K columns of a matrix; B bytes.
"""

import torch
from torch import Tensor

from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.reader import TensorReader
from ownpath.checkpoint.schema import Encoding
from ownpath.formats import BF16, FP8_BLOCK, FP32, MXFP4, MXFP8, NVFP4
from ownpath.oracle.formats import ByteValue, decode, e2m1_pair_of, e4m3_of, e8m0_of

_FP8_BLOCK_SIZE = 128
_DIVISORS = ("weight_global_scale", "input_global_scale")
"""Tensors that hold 1 / the multiplier: only compressed-tensors stores scales so."""


class StoredWeights:
    """One checkpoint's weights in one dtype on one device. Nothing is cached: every call reads and decodes anew.

    dtype: float64 or float32, which holds every code times block scale exactly and rounds the global scale's product.
    Errors: CheckpointError naming a tensor that the checkpoint does not hold.
    """

    def __init__(self, index: CheckpointIndex, device: torch.device, dtype: torch.dtype = torch.float64) -> None:
        self.index, self.device, self.dtype = index, device, dtype
        self._read = TensorReader(index, device)

    def param(self, key: str) -> Tensor:
        """Reads a tensor that is used as it is stored: floats in ``dtype``, integers in int64."""
        stored = self._read(key).to(self.device)
        return stored.to(self.dtype if stored.is_floating_point() else torch.int64)

    def rows(self, key: str, row_ids: Tensor) -> Tensor:
        """Reads some rows of such a tensor, in the order of ``row_ids``; the others are not read."""
        stored = self._read.rows(key, row_ids).to(self.device)
        return stored.to(self.dtype if stored.is_floating_point() else torch.int64)

    def matrix(self, module: str, encoding: Encoding) -> Tensor:
        """Decodes the matrix of ``module`` with all its scales: [N, K]."""
        blocks_NK, global_scale = self.factors(module, encoding)
        return blocks_NK if global_scale is None else blocks_NK * global_scale.to(self.dtype)

    def factors(self, module: str, encoding: Encoding) -> tuple[Tensor, Tensor | None]:
        """Returns codes times block scales [N, K], exact, and the global scale as a multiplier, float32 [] (NVFP4
        alone)."""
        raw, stored = self._read(encoding.key(module, "qdata")), encoding.format
        if stored in (BF16, FP32):
            return raw.to(self.device).to(self.dtype), None
        if stored is FP8_BLOCK:
            return self._fp8(raw, self._read(encoding.key(module, "scale"))), None
        assert stored in (NVFP4, MXFP4, MXFP8), stored
        scale = self._read(encoding.key(module, "scale"))
        if stored is MXFP8:
            return self._decode(raw, e4m3_of) * self._decode(scale, e8m0_of).repeat_interleave(32, dim=1), None
        if stored is MXFP4:
            return self._fp4(raw, self._decode(scale, e8m0_of), 32), None
        return self._fp4(raw, self._decode(scale, e4m3_of), 16), self._scalar(module, encoding, "global_scale")

    def input_scale(self, module: str, encoding: Encoding) -> Tensor | None:
        """Returns the calibrated scale of activations in front of ``module``, as a multiplier: float32 [], or
        ``None``."""
        has_one = any(part.role == "input_scale" for part in encoding.parts)
        return self._scalar(module, encoding, "input_scale") if has_one else None

    def _scalar(self, module: str, encoding: Encoding, role: str) -> Tensor:
        """Reads a scalar as a multiplier; a divisor is inverted by one float32 division (docs/checkpoint.md)."""
        key = encoding.key(module, role)
        scalar = self._read(key).to(self.device).float().reshape(())
        return torch.ones_like(scalar) / scalar if key.endswith(_DIVISORS) else scalar

    def _fp4(self, raw_NB: Tensor, scale: Tensor, width: int) -> Tensor:
        """Decodes two codes a byte, with one scale for ``width`` codes of a row."""
        values = self._decode(raw_NB, e2m1_pair_of).flatten(-2)
        scaled: Tensor = values.unflatten(-1, (-1, width)) * scale[..., None]
        return scaled.flatten(-2)

    def _fp8(self, raw_NK: Tensor, stored_scale: Tensor) -> Tensor:
        """Decodes codes with one scale for 128 x 128, fewer at the edges; its dtype tells whether it is E8M0 or a
        float."""
        is_byte = stored_scale.element_size() == 1
        scale = self._decode(stored_scale, e8m0_of) if is_byte else stored_scale.to(self.device).to(self.dtype)
        return self._decode(raw_NK, e4m3_of) * spread_blocks(scale, raw_NK.shape)

    def _decode(self, raw: Tensor, value_of: ByteValue) -> Tensor:
        return decode(raw.to(self.device), value_of, self.dtype)


def spread_blocks(scale: Tensor, shape: torch.Size) -> Tensor:
    """Repeats the scale of each 128 x 128 block for every element of a matrix [N, K]."""
    rows, cols = (torch.arange(n, device=scale.device) // _FP8_BLOCK_SIZE for n in shape)
    return scale[rows][:, cols]
