"""Checks block scales: bytes that no quantiser writes, blocks that vanished or overflowed, and casts from MXFP4."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ownpath.checkpoint.dtypes import FLOATS, TORCH_DTYPES
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.problems import make_problem
from ownpath.checkpoint.tensor_info import TensorInfo
from ownpath.finding import Finding
from ownpath.formats import MXFP4, NVFP4
from ownpath.inspect.scalars import Scalar
from ownpath.inspect.tensor_bytes import read_values
from ownpath.plan.census import StoredModule
from ownpath.weights.lossless import is_lossless_cast

SAMPLE_BYTES = 4096
"""Bytes read of every module's block scales, unless all are asked for: one page of the file."""
MAX_VANISHED_SHARE = 1 / 8
"""Blocks too small for E4M3 beside their tensor's largest are rare; an eighth of all is an export's fault."""
MAX_SATURATED_SHARE = 1 / 8
"""A tensor's largest block is scaled to E4M3's largest number, 448; an eighth of all blocks is not, unless the global
scale was taken from smaller values."""

_BATCH_BYTES = 2**18
_BITS = {"F8_E4M3": torch.uint8, "F8_E8M0": torch.uint8, "F32": torch.int32, "BF16": torch.int16, "F16": torch.int16}
_MANTISSAS = {"F32": 0x7FFFFF, "BF16": 0x7F, "F16": 0x3FF}
"""Bits that are zero in powers of two."""
_LARGEST = {"F8_E4M3": b"\x7e", "F8_E8M0": b"\xfe"}
_LEGAL = {"F8_E4M3": bytes(range(0x7F)), "F8_E8M0": bytes(range(0xFF))}
"""Above the largest number lie NaN and, for E4M3, the negative numbers: no block scale is one."""


@dataclass
class BlockReport:
    """num_zero, num_saturated: of the ``num_blocks`` scales that were read, in ``num_modules`` modules.

    cast_slots: slot -> whether the scales read of all its modules look like a lossless cast from MXFP4.
    largest: module -> the largest of its scales, where all of them were read.
    num_rough: module -> how many scales stored as floats are no power of two.
    exponents: MXFP4 module -> the smallest and the largest byte of its scales.
    """

    num_modules: int = 0
    num_blocks: int = 0
    num_zero: int = 0
    num_saturated: int = 0
    cast_slots: dict[str, bool] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)
    num_rough: dict[str, int] = field(default_factory=dict)
    exponents: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def lossless_casts(self) -> tuple[str, ...]:
        return tuple(slot for slot, is_cast in self.cast_slots.items() if is_cast)


@dataclass(frozen=True)
class _ScaleScan:
    num_bad: int
    num_zero: int
    num_saturated: int
    largest: float
    num_rough: int = 0


def read_blocks(
    modules: Iterable[StoredModule],
    scalars: Iterable[Scalar],
    index: CheckpointIndex,
    broken: frozenset[Path],
    problems: list[Finding],
    max_bytes: Callable[[StoredModule], int | None],
) -> BlockReport:
    """Reads the first ``max_bytes`` (``None``: all) of each module's block scales; faults go to ``problems``."""
    global_scales = {scalar.module: scalar.value for scalar in scalars if scalar.role == "global_scale"}
    owners = {stored.info(index, "scale").name: stored for stored in modules if stored.encoding.format.block}
    report = BlockReport()
    casts = _Casts(global_scales)
    limits = {key: max_bytes(stored) for key, stored in owners.items()}
    read = (
        values
        for limit in dict.fromkeys(limits.values())
        for values in read_values((index[key] for key in owners if limits[key] == limit), broken, problems, limit)
    )
    for info, data in read:
        stored = owners[info.name]
        found = _scan(info.dtype, data)
        num_blocks = len(data) // TORCH_DTYPES[info.dtype].itemsize
        problems += _faults(info, found, num_blocks)
        if found.num_zero:
            problems += _zero_faults(stored, index, data, broken)
        report.num_modules += 1
        report.num_blocks += num_blocks
        report.num_zero += found.num_zero
        report.num_saturated += found.num_saturated
        if len(data) == info.num_bytes:
            report.largest[stored.spec.name] = found.largest
        if info.dtype in _MANTISSAS:
            report.num_rough[stored.spec.name] = found.num_rough
        if stored.encoding.format is NVFP4:
            casts.add(stored, info, data)
        if stored.encoding.format is MXFP4:
            codes = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            report.exponents[stored.spec.name] = int(codes.amin()), int(codes.amax())
    report.cast_slots = casts.finish()
    return report


def _scan(dtype: str, data: bytes) -> _ScaleScan:
    if dtype in FLOATS:
        values = torch.frombuffer(bytearray(data), dtype=TORCH_DTYPES[dtype])
        is_bad = ~(torch.isfinite(values) & (values >= 0))
        num_rough = int((values.view(_BITS[dtype]) & _MANTISSAS[dtype]).count_nonzero())
        largest = float(values.masked_fill(is_bad, 0).amax())
        return _ScaleScan(int(is_bad.sum()), int((values == 0).sum()), 0, largest, num_rough)
    num_bad = len(data.translate(None, _LEGAL[dtype]))
    codes = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    legal = codes.masked_fill(codes > _LARGEST[dtype][0], 0) if num_bad else codes
    largest = float(legal.amax().view(TORCH_DTYPES[dtype]).double())
    return _ScaleScan(num_bad, data.count(b"\0"), data.count(_LARGEST[dtype]), largest)


def _faults(info: TensorInfo, found: _ScaleScan, num_blocks: int) -> Iterator[Finding]:
    of_all = f"of {num_blocks} block scales read"
    if found.num_bad:
        message = f"tensor {info}: {found.num_bad} {of_all} are NaN, infinite or negative"
        yield make_problem("block-scale", info.name, message)
    allowed = 0 if info.dtype == "F8_E8M0" else max(1, int(MAX_SATURATED_SHARE * num_blocks))
    if found.num_saturated > allowed:
        message = f"tensor {info}: {found.num_saturated} {of_all} are the largest {info.dtype} number"
        yield make_problem("saturated-block-scale", info.name, message)


def _zero_faults(
    stored: StoredModule, index: CheckpointIndex, data: bytes, broken: frozenset[Path]
) -> Iterator[Finding]:
    """Yields wrong zero scales. Zero is right for a block of zeros, wrong over other codes, and wrong for all blocks
    read."""
    info = stored.info(index, "scale")
    is_zero = torch.frombuffer(bytearray(data), dtype=TORCH_DTYPES[info.dtype]).view(_BITS[info.dtype]) == 0
    if is_zero.all():
        yield make_problem("zero-block-scale", info.name, f"tensor {info}: every block scale read is zero")
        return
    lost = is_zero & _has_codes(stored, index, len(is_zero), broken)
    if lost.any():
        where = f"{int(lost.sum())} of {len(lost)} block scales read are zero over values that are not"
        message = f"tensor {info}: {where}, the first at block {int(lost.nonzero()[0])}"
        kind = "zero-block-scale" if int(lost.sum()) > MAX_VANISHED_SHARE * len(lost) else "vanished-blocks"
        yield make_problem(kind, info.name, message)


def _has_codes(stored: StoredModule, index: CheckpointIndex, num_blocks: int, broken: frozenset[Path]) -> torch.Tensor:
    """Tells for each of a module's first blocks whether it holds anything but zeros; unreadable blocks count as
    nonzero."""
    rows, columns = stored.encoding.format.block or (1, 1)
    if rows == 1 and stored.encoding.format.bits == 4:
        num_bytes = columns // 2
        for _, codes in read_values([stored.info(index, "qdata")], broken, [], num_blocks * num_bytes):
            magnitudes = torch.frombuffer(bytearray(codes), dtype=torch.uint8).view(num_blocks, num_bytes) & 0x77
            return magnitudes.any(dim=1)
    return torch.ones(num_blocks, dtype=torch.bool)


class _Casts:
    """Tells whether each slot's scales are a lossless cast; several modules' scales are looked at in one go."""

    def __init__(self, global_scales: dict[str, float]) -> None:
        self.global_scales = global_scales
        self.verdicts: dict[str, bool] = {}
        self.waiting: dict[str, tuple[bytearray, list[float]]] = {}

    def add(self, stored: StoredModule, info: TensorInfo, data: bytes) -> None:
        """Adds a module's scales. A cast's rows are whole pairs; the bytes read may end inside a row, not inside a
        pair."""
        slot, global_scale = stored.slot, self.global_scales.get(stored.spec.name)
        if not self.verdicts.setdefault(slot, True):
            return
        if info.shape[-1] % 2 or global_scale is None:
            self.verdicts[slot] = False
            return
        scales, global_scales = self.waiting.setdefault(slot, (bytearray(), []))
        scales += data
        global_scales.append(global_scale)
        if len(scales) >= _BATCH_BYTES:
            self._decide(slot)

    def finish(self) -> dict[str, bool]:
        for slot in list(self.waiting):
            self._decide(slot)
        return self.verdicts

    def _decide(self, slot: str) -> None:
        scales, global_scales = self.waiting.pop(slot)
        pairs = torch.frombuffer(scales, dtype=torch.uint8).view(-1, 2).view(torch.float8_e4m3fn)
        self.verdicts[slot] &= is_lossless_cast(pairs, torch.tensor(global_scales))
