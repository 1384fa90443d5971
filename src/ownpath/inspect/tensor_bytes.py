"""Reads the few bytes an inspection needs, in the order they lie on disk, and never past a tensor's end."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.positioned import PositionedReader
from ownpath.checkpoint.problems import make_problem
from ownpath.checkpoint.tensor_info import TensorInfo
from ownpath.finding import Finding


@dataclass(frozen=True)
class ByteRange:
    """Bytes ``offset`` to ``offset + length`` of a tensor."""

    info: TensorInfo
    offset: int
    length: int


def read_values(
    infos: Iterable[TensorInfo], broken: frozenset[Path], problems: list[Finding], max_bytes: int | None = None
) -> Iterator[tuple[TensorInfo, bytes]]:
    """Yields each tensor's first ``max_bytes`` (all of them: ``None``); shards that are ``broken`` are left out.

    A shard that cannot be read after all is added to ``problems``, once.
    """
    whole = (ByteRange(i, 0, i.num_bytes if max_bytes is None else min(i.num_bytes, max_bytes)) for i in infos)
    for part, data in read_ranges(whole, broken, problems):
        yield part.info, data


def read_ranges(
    ranges: Iterable[ByteRange], broken: frozenset[Path], problems: list[Finding]
) -> Iterator[tuple[ByteRange, bytes]]:
    """Yields the bytes of each range; for shards that are ``broken`` or cannot be read, as ``read_values``."""
    shards = PositionedReader()
    readable = [(str(r.info.file), r.info.start + r.offset, r) for r in ranges if r.info.file not in broken]
    readable.sort(key=lambda placed: placed[:2])
    try:
        for _, group in groupby(readable, key=lambda placed: placed[0]):
            parts = [part for _, _, part in group]
            try:
                for part in parts:
                    data = bytearray(part.length)
                    shards.read(part.info, part.offset, memoryview(data))
                    yield part, bytes(data)
            except CheckpointError as error:
                problems.append(make_problem("shard", parts[0].info.file.name, str(error)))
    finally:
        shards.close()
