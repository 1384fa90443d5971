"""Reads the few bytes an inspection needs, in the order they lie on disk, and never past a tensor's end."""

import os
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from ownpath.checkpoint.index import TensorInfo
from ownpath.checkpoint.problems import make_problem
from ownpath.finding import Finding


def read_values(
    infos: Iterable[TensorInfo], broken: frozenset[Path], problems: list[Finding], max_bytes: int | None = None
) -> Iterator[tuple[TensorInfo, bytes]]:
    """Yields each tensor's first ``max_bytes`` (all of them: ``None``); shards that are ``broken`` are left out.

    A shard that cannot be read after all is added to ``problems``, once.
    """
    readable = sorted((i for i in infos if i.file not in broken), key=lambda info: (info.file, info.start))
    for file, group in groupby(readable, key=lambda info: info.file):
        try:
            with file.open("rb", buffering=0) as shard:
                for info in group:
                    length = info.num_bytes if max_bytes is None else min(info.num_bytes, max_bytes)
                    yield info, _read(shard.fileno(), info, length)
        except OSError as error:
            problems.append(make_problem("shard", file.name, f"{file}: {error}"))


def _read(descriptor: int, info: TensorInfo, length: int) -> bytes:
    data = os.pread(descriptor, length, info.start)
    while len(data) < length:  # one call returns at most 2 GiB
        more = os.pread(descriptor, length - len(data), info.start + len(data))
        if not more:
            raise OSError(f"{info}: the file ends inside it")
        data += more
    return data
