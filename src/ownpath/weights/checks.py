"""Checks of loaded bytes: weights finite, block scales neither NaN nor negative, global scales valid.

Reader threads check bytes right after reading, while they are in the cache. A float is NaN or infinite where its bits,
as a signed integer, reach those of +infinity, or, as an unsigned one, those of -infinity: one reduction each, no copy.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from ownpath.checkpoint.chunks import Piece
from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.index import TensorInfo
from ownpath.checkpoint.scales import scale_fault

Bytes = NDArray[np.uint8]

_NOT_FINITE = {
    "F8_E4M3": (np.int8, 0x7F, np.uint8, 0xFF),  # no infinity; 0x7F with either sign is NaN
    "BF16": (np.int16, 0x7F80, np.uint16, 0xFF80),
    "F32": (np.int32, 0x7F800000, np.uint32, 0xFF800000),
}
"""dtype -> the smallest bits, as signed and as unsigned integers, of NaN and infinity."""
_BAD_SCALE_BYTE = {"F8_E8M0": 0xFF, "F8_E4M3": 0x7F}  # NaN; for E4M3 also a sign bit, which no block scale has
_WIDE_SCALES = {"F32": torch.float32, "BF16": torch.bfloat16}


def check_finite(piece: Piece, data: Bytes) -> None:
    """Checks stored weights and parameters. Errors: CheckpointError naming the tensor that holds NaN or infinity."""
    limits = _NOT_FINITE.get(piece.info.dtype)
    if limits is None:
        return
    signed, positive, unsigned, negative = limits
    if np.maximum.reduce(data.view(signed)) >= positive or np.maximum.reduce(data.view(unsigned)) >= negative:
        raise CheckpointError(f"tensor {piece.info} holds NaN or infinity")


def check_block_scales(piece: Piece, data: Bytes) -> None:
    """Checks block scales. Errors: CheckpointError naming the tensor and place of the first NaN or negative scale."""
    info = piece.info
    if info.dtype in _WIDE_SCALES:
        values = torch.from_numpy(data.copy()).view(_WIDE_SCALES[info.dtype])
        is_bad = (~(torch.isfinite(values) & (values >= 0))).numpy()
    elif np.maximum.reduce(data) < _BAD_SCALE_BYTE[info.dtype]:
        return
    else:
        is_bad = data >= _BAD_SCALE_BYTE[info.dtype]
    if is_bad.any():
        item_bytes = data.size // is_bad.size
        where = np.unravel_index(piece.first // item_bytes + int(is_bad.argmax()), info.shape)
        raise CheckpointError(f"tensor {info}: block scale {[int(i) for i in where]} is NaN or negative")


def check_global_scale(info: TensorInfo, value: float, is_divisor: bool) -> None:
    """Checks a global scale. Errors: CheckpointError naming a tensor that is not a valid multiplier or divisor."""
    fault = scale_fault(value, is_divisor)
    if fault is not None:
        raise CheckpointError(f"tensor {info}: {fault[1]}")


def check_expert_ids(key: str, table: torch.Tensor, num_experts: int) -> None:
    """Checks a token table. Errors: CheckpointError naming the table with an id that no expert has."""
    if not ((table >= 0) & (table < num_experts)).all():
        raise CheckpointError(f"tensor {key!r} names experts outside 0..{num_experts - 1}")
