"""Reads the header of one safetensors file defensively: every fault is reported, nothing raises.

A safetensors file is 8 bytes (little-endian length of the header), the header (a JSON object: tensor name -> dtype,
shape, data_offsets), and the tensors' bytes. Offsets count from the end of the header; tensors must tile the rest of
the file without gap or overlap. Source: the format's description in the safetensors repository.
"""

import os
import sys
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, TypeGuard

from ownpath.checkpoint.problems import make_problem
from ownpath.files import FileError, open_regular, parse_json, shorten
from ownpath.finding import Finding

MAX_HEADER_BYTES = 64 * 2**20
"""Limit of the headers of one checkpoint together. The format allows 100,000,000 bytes for one; V4-Pro's take 40 MB."""
MAX_TENSORS = 400_000
"""Limit of the tensors of one checkpoint. V4-Pro has 290,000: 61 layers x 384 experts x 3 matrices x 4 tensors."""
MAX_NAME_CHARS = 512
MAX_PROBLEMS = 1000
"""Limit of the problems that one file is told with; the others are counted."""
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
    """One shard's tensors by its header. A shard with problems may still name tensors, but their bytes mean nothing.

    metadata: the header's own texts, by key.
    """

    entries: tuple[HeaderEntry, ...]
    problems: tuple[Finding, ...]
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass
class HeaderBudget:
    """The bytes of headers and the tensors that a checkpoint may still have: all of its shards draw on one."""

    num_bytes: int = MAX_HEADER_BYTES
    num_tensors: int = MAX_TENSORS


def read_header(path: Path, budget: HeaderBudget | None = None) -> Header:
    """Reads and checks the header of ``path``: no more than the budget allows, and none of the tensors' bytes."""
    budget = budget or HeaderBudget()
    problems = _Problems(path)
    try:
        with open_regular(path) as descriptor:
            num_bytes = os.fstat(descriptor).st_size
            length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
            if num_bytes < 8 or (length <= budget.num_bytes and 8 + length > num_bytes):
                return problems.header("truncated-shard", f"{num_bytes} bytes do not hold its header")
            if length > budget.num_bytes:
                limit = f"the headers of a checkpoint may have {MAX_HEADER_BYTES}, and {budget.num_bytes} are left"
                return problems.header("header-bomb", f"its header claims {length} bytes; {limit}")
            text = os.pread(descriptor, length, 8)
    except (FileError, OSError) as error:
        return problems.header("shard", str(error))
    if len(text) < length:
        return problems.header("truncated-shard", f"it ends inside its header, after {8 + len(text)} bytes")
    budget.num_bytes -= length
    content, metadata = _parse(text, problems)
    if len(content) > budget.num_tensors:
        limit = f"a checkpoint may have {MAX_TENSORS}, and {budget.num_tensors} are left"
        return problems.header("header-bomb", f"its header names {len(content)} tensors; {limit}")
    budget.num_tensors -= len(content)
    del text
    entries = _entries(content, 8 + length, problems)
    if not problems.found:
        _check_tiling(entries, 8 + length, num_bytes, problems)
    return Header(tuple(entries), problems.all(), metadata)


class _Problems:
    """Collects what is wrong with one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: list[Finding] = []
        self.num_more = 0

    def add(self, check: str, detail: str) -> None:
        if len(self.found) >= MAX_PROBLEMS:
            self.num_more += 1
            return
        message = f"{self.path}: not a complete safetensors file ({detail})"
        self.found.append(make_problem(check, self.path.name, message))

    def all(self) -> tuple[Finding, ...]:
        if not self.num_more:
            return tuple(self.found)
        more = f"{self.path}: {self.num_more} more problems in this file, which are not listed"
        return (*self.found, make_problem("shard", self.path.name, more))

    def header(self, check: str, detail: str) -> Header:
        self.add(check, detail)
        return Header((), self.all())


def _parse(text: bytes, problems: _Problems) -> tuple[dict[str, object], dict[str, str]]:
    """Returns a header's entries and metadata; empty where it is no JSON object."""

    def report_twice(name: str) -> None:
        problems.add("duplicated-tensor", f"its header names {shorten(name)} twice")

    try:
        content = parse_json(text, "its header", report_twice)
    except FileError as error:
        problems.add("shard", str(error))
        return {}, {}
    if not isinstance(content, dict) or not text.startswith(b"{"):
        problems.add("shard", "its header is not a JSON object")
        return {}, {}
    metadata = content.pop("__metadata__", None)
    if metadata is None:
        return content, {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        problems.add("shard", "its __metadata__ is not an object of strings")
        return content, {}
    return content, metadata


def _entries(content: dict[str, object], data_start: int, problems: _Problems) -> list[HeaderEntry]:
    """Takes each entry out of ``content``, whose memory is freed meanwhile."""
    entries: list[HeaderEntry] = []
    while content:
        name, fields = content.popitem()
        detail = f"has a name of {len(name)} characters" if len(name) > MAX_NAME_CHARS else _entry_fault(fields)
        if detail is not None or not isinstance(fields, dict):
            problems.add("shard", f"tensor {shorten(name)} {detail}")
            continue
        start, stop = fields["data_offsets"]
        dtype, shape = sys.intern(fields["dtype"]), tuple(fields["shape"])
        entries.append(HeaderEntry(name, dtype, shape, data_start + start, data_start + stop))
    entries.reverse()
    return entries


def _entry_fault(fields: object) -> str | None:
    """Returns what is wrong with a header entry, or ``None`` for a valid tensor."""
    if not isinstance(fields, dict):
        return "is not described by an object"
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        return f"has the unknown dtype {shorten(dtype)}"
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
