"""Reads bytes of shards by position: the one way in which bytes of tensors come from a file.

Nothing is mapped. A shard that is cut short, replaced or taken away meanwhile is an error that names the tensor, where
a mapping would end the process with a bus error; and no page of the file counts as this process's memory.
"""

import os
from collections.abc import Callable
from pathlib import Path

from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.tensor_info import TensorInfo
from ownpath.files import FileError, open_descriptor

MAX_READ_BYTES = 2**30
"""Limit of one call of the operating system, which may return less than was asked for beyond 2 GiB."""


class PositionedReader:
    """Reads by file and position, with one shard open at a time."""

    def __init__(self) -> None:
        self._file: Path | None = None
        self._descriptor = -1

    def fill(self, file: Path, start: int, buffer: memoryview, info_at: Callable[[int], TensorInfo]) -> None:
        """Fills a buffer of bytes from byte ``start`` of a file. info_at: the tensor that a byte of the buffer is of.

        Errors: CheckpointError naming the tensor that cannot be read.
        """
        done = 0
        try:
            if file is not self._file and file != self._file:  # mostly the same object
                self.close()
                self._descriptor, self._file = open_descriptor(file), file
            while done < len(buffer):
                part = buffer[done : done + MAX_READ_BYTES]
                count = os.preadv(self._descriptor, [part], start + done)
                if not count:
                    raise CheckpointError(f"tensor {info_at(done)}: the file ends inside it")
                done += count
        except (OSError, FileError) as error:
            raise CheckpointError(f"tensor {info_at(done)} cannot be read ({error})") from None

    def read(self, info: TensorInfo, first: int, buffer: memoryview) -> None:
        """Fills a buffer with a tensor's bytes from its byte ``first`` on. Errors: as ``fill``."""
        self.fill(info.file, info.start + first, buffer, lambda _: info)

    def close(self) -> None:
        """Closes the shard that is open, if any."""
        if self._file is not None:
            os.close(self._descriptor)
            self._file = None

    def __del__(self) -> None:
        self.close()
