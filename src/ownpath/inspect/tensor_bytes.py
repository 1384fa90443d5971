"""Reads the few bytes an inspection needs, in the order they lie on disk, and never past a tensor's end."""

from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.index import TensorInfo
from ownpath.checkpoint.positioned import PositionedReader
from ownpath.checkpoint.problems import make_problem
from ownpath.finding import Finding


def read_values(
    infos: Iterable[TensorInfo], broken: frozenset[Path], problems: list[Finding], max_bytes: int | None = None
) -> Iterator[tuple[TensorInfo, bytes]]:
    """Yields each tensor's first ``max_bytes`` (all of them: ``None``); shards that are ``broken`` are left out.

    A shard that cannot be read after all is added to ``problems``, once.
    """
    shards = PositionedReader()
    readable = sorted((i for i in infos if i.file not in broken), key=lambda info: (info.file, info.start))
    for file, group in groupby(readable, key=lambda info: info.file):
        try:
            for info in group:
                data = bytearray(info.num_bytes if max_bytes is None else min(info.num_bytes, max_bytes))
                shards.read(info, 0, memoryview(data))
                yield info, bytes(data)
        except CheckpointError as error:
            problems.append(make_problem("shard", file.name, str(error)))
