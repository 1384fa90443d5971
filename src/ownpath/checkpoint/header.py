"""Reads the header of one safetensors file defensively: every fault is reported, nothing raises.

A safetensors file is 8 bytes (little-endian length of the header), the header (a JSON object: tensor name -> dtype,
shape, data_offsets), and the tensors' bytes. Offsets count from the end of the header; tensors must tile the rest of
the file without gap or overlap. Source: the format's description in the safetensors repository.
"""

import json
import os
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeGuard

from ownpath.checkpoint.problems import make_problem
from ownpath.finding import Finding

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit. Nothing longer is ever read."""
MAX_DIMS = 32

DTYPE_BITS = MappingProxyType(
    {"F64": 64, "F32": 32, "BF16": 16, "F16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "C64": 64}
    | {"F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}
    | {"I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8}
)


class HeaderEntry(NamedTuple):
    """One tensor of a header. start, stop: its bytes in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """One shard's tensors by its header. A shard with problems may still name tensors, but their bytes mean nothing."""

    entries: tuple[HeaderEntry, ...]
    problems: tuple[Finding, ...]


def read_header(path: Path) -> Header:
    """Reads and checks the header of ``path``: at most ``MAX_HEADER_BYTES`` and none of the tensors' bytes."""
    problems = _Problems(path)
    try:
        if not path.is_file():
            return problems.header("shard", "it is not a regular file")
        with path.open("rb") as file:
            num_bytes = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if num_bytes < 8 or (length <= MAX_HEADER_BYTES and 8 + length > num_bytes):
                return problems.header("truncated-shard", f"{num_bytes} bytes do not hold its header")
            if length > MAX_HEADER_BYTES:
                limit = f"the format allows {MAX_HEADER_BYTES}"
                return problems.header("header-bomb", f"its header claims {length} bytes; {limit}")
            text = file.read(length)
    except OSError as error:
        return problems.header("shard", str(error))
    content = _parse(text, problems)
    entries = [] if content is None else _entries(content, 8 + length, problems)
    if not problems.found:
        _check_tiling(entries, 8 + length, num_bytes, problems)
    return Header(tuple(entries), tuple(problems.found))


class _Problems:
    """Collects what is wrong with one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: list[Finding] = []

    def add(self, check: str, detail: str) -> None:
        message = f"{self.path}: not a complete safetensors file ({detail})"
        self.found.append(make_problem(check, self.path.name, message))

    def header(self, check: str, detail: str) -> Header:
        self.add(check, detail)
        return Header((), tuple(self.found))


def _parse(text: bytes, problems: _Problems) -> dict[str, Any] | None:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        content = dict(pairs)
        if len(content) != len(pairs):
            twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            problems.add("duplicated-tensor", f"its header names {twice!r} twice")
        return content

    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        problems.add("shard", f"its header is not JSON: {error}")
        return None
    if not isinstance(content, dict) or not text.startswith(b"{"):
        problems.add("shard", "its header is not a JSON object")
        return None
    metadata = content.pop("__metadata__", None)
    is_text = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    if metadata is not None and not is_text:
        problems.add("shard", "its __metadata__ is not an object of strings")
    return content


def _entries(content: dict[str, Any], data_start: int, problems: _Problems) -> list[HeaderEntry]:
    entries = []
    for name, fields in content.items():
        detail = _entry_fault(fields)
        if detail is not None:
            problems.add("shard", f"tensor {name!r} {detail}")
            continue
        start, stop = fields["data_offsets"]
        entries.append(
            HeaderEntry(name, fields["dtype"], tuple(fields["shape"]), data_start + start, data_start + stop)
        )
    return entries


def _entry_fault(fields: object) -> str | None:
    """Returns what is wrong with a header entry, or ``None`` for a valid tensor."""
    if not isinstance(fields, dict):
        return "is not described by an object"
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        return f"has the unknown dtype {dtype!r}"
    if not _are_sizes(shape) or len(shape) > MAX_DIMS:
        return "has a shape that is not a list of sizes"
    if prod(size for size in shape if size) >= 2**63:  # even where another size is 0: readers multiply sizes one by one
        return f"has a shape of more elements than can be counted: {shape}"
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return "has data_offsets that are not [start, stop]"
    num_bits = prod(shape) * DTYPE_BITS[dtype]
    if num_bits != 8 * (offsets[1] - offsets[0]):
        return f"({dtype} {shape}) needs {-(-num_bits // 8)} bytes, but has {offsets[1] - offsets[0]}"
    return None


def _are_sizes(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_tiling(entries: list[HeaderEntry], data_start: int, num_bytes: int, problems: _Problems) -> None:
    end, last = data_start, "the header"
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.stop)):
        if entry.start < end:
            problems.add("overlapping-tensors", f"tensor {entry.name!r} overlaps {last!r}")
        elif entry.start > end:
            problems.add("shard", f"{entry.start - end} bytes before tensor {entry.name!r} belong to none")
        if entry.stop > end:
            end, last = entry.stop, entry.name
    if end > num_bytes:
        problems.add("truncated-shard", f"tensor {last!r} ends at byte {end}, the file at {num_bytes}")
    elif end < num_bytes:
        problems.add("over-long-shard", f"{num_bytes - end} bytes follow its last tensor")
