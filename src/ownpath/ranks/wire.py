"""Several tensors as the bytes that one rank sends another: a header of fixed size, then the tensors' bytes.

The header says which exchange of how many it is, so that ranks that have come apart are found before anything is read:
[number, name, tensors, then for each its dtype, its dimensions and their sizes], int64.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_DTYPES = (
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool),
)
_MOST_TENSORS, _MOST_DIMS = 4, 4
_WIDTH = 2 + _MOST_DIMS
HEADER_SIZE = 3 + _MOST_TENSORS * _WIDTH
"""Elements of a header."""


@dataclass(frozen=True)
class WireHeader:
    """number: of exchanges before this one. name: a number of the slot's. shapes, dtypes: of the tensors."""

    number: int
    name: int
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]

    @classmethod
    def of(cls, number: int, slot: str, tensors: Sequence[Tensor]) -> "WireHeader":
        """Describes what is sent."""
        assert len(tensors) <= _MOST_TENSORS, slot
        assert all(tensor.ndim <= _MOST_DIMS for tensor in tensors), slot
        shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        return cls(number, zlib.crc32(slot.encode()), shapes, tuple(tensor.dtype for tensor in tensors))

    @classmethod
    def read(cls, values: Tensor) -> "WireHeader":
        """Reads what ``values`` wrote."""
        number, name, count, *rest = values.tolist()
        tensors = [rest[at * _WIDTH : (at + 1) * _WIDTH] for at in range(count)]
        shapes = tuple(tuple(sizes[:ndim]) for _, ndim, *sizes in tensors)
        return cls(number, name, shapes, tuple(_DTYPES[dtype] for dtype, *_ in tensors))

    def values(self) -> Tensor:
        """Returns the header, int64 [HEADER_SIZE]."""
        values = torch.zeros(HEADER_SIZE, dtype=torch.int64)
        values[:3] = torch.tensor((self.number, self.name, len(self.shapes)))
        for at, (shape, dtype) in enumerate(zip(self.shapes, self.dtypes, strict=True)):
            entry = torch.tensor((_DTYPES.index(dtype), len(shape), *shape))
            values[3 + at * _WIDTH : 3 + at * _WIDTH + len(entry)] = entry
        return values

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each tensor."""
        shapes = (torch.Size(shape).numel() for shape in self.shapes)
        return tuple(count * dtype.itemsize for count, dtype in zip(shapes, self.dtypes, strict=True))


def packed(tensors: Sequence[Tensor]) -> Tensor:
    """Returns the bytes of tensors in host memory, one behind the other."""
    return torch.cat([tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in tensors])


def unpacked(data: Tensor, header: WireHeader) -> tuple[Tensor, ...]:
    """Returns the tensors that ``packed`` made bytes of."""
    parts = data.split(header.sizes)
    described = zip(parts, header.dtypes, header.shapes, strict=True)
    return tuple(part.clone().view(dtype).view(shape) for part, dtype, shape in described)
