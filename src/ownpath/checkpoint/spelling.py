"""Reads tensors as what they can only mean: other ways to write one dtype or shape become the one that is used here.

The name's ending, the dtype and the number of elements decide, beside the weight's own shape. Bytes are never changed:

- F4 [N, K] is packed codes, U8 [N, K/2].
- U8 or I8 scales of 4-bit codes are E4M3 where there is one for 16 of K, and E8M0 where there is one for 32. Those of
  E4M3 codes are E8M0.
- A grid of scales may be flattened, or have further dimensions of one. So may a vector, and a scalar may be [1] or
  [1, 1].

What could mean two things stays as it is, for the schema to refuse: a transposed grid, a count that fits no format.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod

from ownpath.checkpoint.tensor_info import TensorInfo

_CODES = ("weight_packed", "weight")
_BLOCK_SCALES = frozenset({"scale", "weight_scale"})
_SCALARS = frozenset({"weight_scale_2", "weight_global_scale", "input_scale", "input_global_scale"})
BYTES = frozenset({"U8", "I8"})
"""Dtypes that are only names for bytes."""
BYTE_SCALES = frozenset({"F8_E4M3", "F8_E8M0"})
"""Dtypes of block scales that bytes may be."""
_VECTOR = re.compile(r"(?:.*[._])?norm\.weight|.*\.attn_sink|.*hc_(?:attn|ffn|head)_(?:base|scale)|.*\.gate\.bias")

Grid = tuple[str, tuple[int, int]]
"""The dtype that bytes of block scales have, and the shape of the scales."""


def plainly_spelled(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Returns the tensors with each dtype and shape in its usual form; those that could mean something else as they
    are."""
    found = {}
    for name, info in tensors.items():
        stem, _, ending = name.rpartition(".")
        dtype, shape = info.dtype, info.shape
        if dtype == "F4" and ending in _CODES and shape and shape[-1] % 2 == 0:
            dtype, shape = "U8", (*shape[:-1], shape[-1] // 2)
        elif ending in _BLOCK_SCALES:
            dtype, shape = _block_scale(info, _weight(tensors, stem))
        elif ending in _SCALARS and prod(shape) == 1:
            shape = ()
        elif len(shape) != 1 and _VECTOR.fullmatch(name) and len(_without_ones(shape)) == 1:
            shape = _without_ones(shape)
        if (dtype, shape) != (info.dtype, info.shape):
            info = replace(info, dtype=dtype, shape=shape, header=f"{info.dtype} {list(info.shape)}")
        found[name] = info
    return found


def _weight(tensors: Mapping[str, TensorInfo], stem: str) -> TensorInfo | None:
    return next((tensors[key] for ending in _CODES if (key := f"{stem}.{ending}") in tensors), None)


def _block_scale(info: TensorInfo, weight: TensorInfo | None) -> tuple[str, tuple[int, ...]]:
    """Returns dtype and shape of block scales, by the weight that they belong to."""
    if weight is not None and len(weight.shape) == 2:
        for dtype, grid in _grids(weight):
            if prod(info.shape) == prod(grid) and _is_in_order(info.shape, grid):
                return (dtype if info.dtype in BYTES else info.dtype), grid
    return info.dtype, info.shape


def _grids(weight: TensorInfo) -> Iterator[Grid]:
    """Yields the grids of scales that a weight's dtype can have."""
    rows, columns = weight.shape
    if weight.dtype in BYTES or weight.dtype == "F4":
        columns *= 1 if weight.dtype == "F4" else 2
        yield "F8_E4M3", (rows, columns // 16)
        yield "F8_E8M0", (rows, columns // 32)
    elif weight.dtype == "F8_E4M3":
        yield "F8_E8M0", (-(-rows // 128), -(-columns // 128))
        yield "F8_E8M0", (rows, columns // 32)


def _is_in_order(shape: tuple[int, ...], grid: tuple[int, int]) -> bool:
    """Returns True if a tensor is the grid but for dimensions of one, or flattened: never transposed."""
    sizes = _without_ones(shape)
    return sizes == _without_ones(grid) or len(shape) == 1


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)
