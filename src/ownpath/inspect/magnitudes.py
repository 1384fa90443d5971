"""Measures how large each weight's values are, decoded with all their scales, from a few rows of each.

Every matrix and every parameter of floats is sampled, whatever its format: rows spread evenly over it, read by position
together with the block scales that belong to them. A wrong global scale shows in any row; wrong block scales show where
enough of them are wrong to move the sample.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.schema import ParamSpec
from ownpath.checkpoint.tensor_info import TensorInfo
from ownpath.finding import Finding
from ownpath.formats import FP32, Format
from ownpath.inspect.scalars import Scalar
from ownpath.inspect.tensor_bytes import ByteRange, read_ranges
from ownpath.numerics import dequantize
from ownpath.plan.census import StoredModule
from ownpath.qtensor import QuantTensor

EXPERT_ROWS = 4
"""Rows sampled of each routed expert's matrix: there are tens of thousands of them."""
ROWS = 16
"""Rows sampled of each other tensor."""

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MAX_ROWS = 1024
"""Rows decoded together."""


@dataclass(frozen=True)
class Magnitude:
    """The size of one tensor's sampled values.

    name: the module, or a parameter's key. width: how many products one output sums up, K of a matrix [N, K]; 1 for a
    parameter. rms, largest: of the ``num_values`` values decoded; NaN where one of them is no number.
    """

    name: str
    width: int
    rms: float
    largest: float
    num_values: int


@dataclass(frozen=True)
class _SampledRow:
    """One row to decode: its codes, its block scales and the multiplier of its matrix."""

    name: str
    format: Format
    codes: ByteRange
    scale: ByteRange | None
    multiplier: float

    @property
    def kind(self) -> tuple[object, ...]:
        """The facts that the rows of one batch share."""
        scale = () if self.scale is None else (self.scale.info.dtype, self.scale.length)
        return self.format, self.codes.info.dtype, self.codes.length, scale


def read_magnitudes(
    modules: Sequence[StoredModule],
    params: Iterable[ParamSpec],
    scalars: Iterable[Scalar],
    index: CheckpointIndex,
    broken: frozenset[Path],
    problems: list[Finding],
) -> tuple[Magnitude, ...]:
    """Samples every module and every parameter of floats; shards that cannot be read are added to ``problems``.

    Modules whose global scale is no multiplier are left out: they are reported as such.
    """
    multipliers = {scalar.module: scalar.value for scalar in scalars if scalar.role == "global_scale"}
    widths = {stored.spec.name: stored.spec.shape[1] for stored in modules}
    sums: dict[str, list[tuple[float, float, int]]] = defaultdict(list)
    for _, layer in groupby(modules, key=lambda stored: stored.slot):
        rows = [row for stored in layer for row in _module_rows(stored, multipliers, index)]
        for name, *measured in _measured(rows, broken, problems):
            sums[name].append((measured[0], measured[1], int(measured[2])))
    floats = [index[param.key] for param in params if index[param.key].dtype in _FLOATS]
    for name, *measured in _measured([row for info in floats for row in _param_rows(info)], broken, problems):
        sums[name].append((measured[0], measured[1], int(measured[2])))
    return tuple(_sum_up(name, widths.get(name, 1), found) for name, found in sums.items())


def _module_rows(stored: StoredModule, multipliers: dict[str, float], index: CheckpointIndex) -> Iterator[_SampledRow]:
    name, fmt = stored.spec.name, stored.encoding.format
    if fmt.has_global_scale and name not in multipliers:
        return
    codes = stored.info(index, "qdata")
    scale = None if fmt.block is None else stored.info(index, "scale")
    for row in _spread(stored.spec.shape[0], EXPERT_ROWS if ".ffn.experts." in name else ROWS):
        scale_row = None if scale is None or fmt.block is None else _range(scale, row // fmt.block[0])
        yield _SampledRow(name, fmt, _range(codes, row), scale_row, multipliers.get(name, 1.0))


def _param_rows(info: TensorInfo) -> Iterator[_SampledRow]:
    rows = _spread(info.shape[0], ROWS) if len(info.shape) > 1 else ()
    for row in rows:
        yield _SampledRow(info.name, FP32, _range(info, row), None, 1.0)
    if len(info.shape) == 1:
        yield _SampledRow(info.name, FP32, ByteRange(info, 0, info.num_bytes), None, 1.0)


def _spread(num_rows: int, wanted: int) -> list[int]:
    """Returns ``wanted`` rows in the middles of as many equal parts; all of fewer."""
    if num_rows <= wanted:
        return list(range(num_rows))
    return [(2 * part + 1) * num_rows // (2 * wanted) for part in range(wanted)]


def _range(info: TensorInfo, row: int) -> ByteRange:
    length = info.num_bytes // info.shape[0]
    return ByteRange(info, row * length, length)


def _measured(
    rows: Sequence[_SampledRow], broken: frozenset[Path], problems: list[Finding]
) -> Iterator[tuple[str, float, float, int]]:
    """Yields each row's module, sum of squares, largest magnitude and width."""
    wanted = {
        (part.info.name, part.offset): part for row in rows for part in (row.codes, row.scale) if part is not None
    }
    data = {(part.info.name, part.offset): found for part, found in read_ranges(wanted.values(), broken, problems)}
    kinds: dict[tuple[object, ...], list[_SampledRow]] = defaultdict(list)
    for row in rows:
        if all((part.info.name, part.offset) in data for part in (row.codes, row.scale) if part is not None):
            kinds[row.kind].append(row)
    for alike in kinds.values():
        for start in range(0, len(alike), _MAX_ROWS):
            batch = alike[start : start + _MAX_ROWS]
            values = _decoded(batch, data)
            squares, largest = values.square().sum(dim=1).tolist(), values.abs().amax(dim=1).tolist()
            for row, square, top in zip(batch, squares, largest, strict=True):
                yield row.name, square, top, values.shape[1]


def _decoded(rows: Sequence[_SampledRow], data: dict[tuple[str, int], bytes]) -> Tensor:
    """Decodes rows of one kind as a stack of matrices of one row each: float32 [rows, K]."""
    codes = _tensor([row.codes for row in rows], data)
    if rows[0].scale is None:
        return codes.flatten(1).float()
    scale = _tensor([row.scale for row in rows if row.scale is not None], data)
    if scale.dtype is torch.uint8:  # a power of two, by its exponent
        scale = scale.view(torch.float8_e8m0fnu)
    elif scale.dtype in (torch.float16, torch.float64):
        scale = scale.float()
    multiplier = torch.tensor([row.multiplier for row in rows]) if rows[0].format.has_global_scale else None
    return dequantize(QuantTensor(codes, scale, multiplier, rows[0].format)).flatten(1)


_STORED = _FLOATS | {"F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu}


def _tensor(parts: Sequence[ByteRange], data: dict[tuple[str, int], bytes]) -> Tensor:
    """Returns ranges of one dtype and length as [ranges, 1, elements]; packed codes as bytes."""
    joined = bytearray().join(data[part.info.name, part.offset] for part in parts)
    dtype = _STORED.get(parts[0].info.dtype, torch.uint8)
    return torch.frombuffer(joined, dtype=dtype).view(len(parts), 1, -1)


def _sum_up(name: str, width: int, rows: list[tuple[float, float, int]]) -> Magnitude:
    num_values = sum(count for _, _, count in rows)
    rms = math.sqrt(math.fsum(square for square, _, _ in rows) / num_values)
    largest = max((top for _, top, _ in rows), key=lambda top: (math.isnan(top), top))
    return Magnitude(name, width, rms, largest, num_values)
