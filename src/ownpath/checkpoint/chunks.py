"""Cuts the bytes of many tensors into few large reads: each shard from its first wanted byte to its last, in chunks.

A tensor may span several chunks, and one chunk may hold thousands of scalars. Chunks follow the order of the file, so
that several readers together read each shard sequentially.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ownpath.checkpoint.positioned import PositionedReader
from ownpath.checkpoint.tensor_info import TensorInfo

Bytes = NDArray[np.uint8]

ALIGNMENT_BYTES = 64
"""Tensors are cut at multiples of this, counted from their own first byte: a multiple of every element's size."""


class Piece(NamedTuple):
    """Bytes [start, stop) of a chunk, which hold a tensor's bytes from its byte ``first`` on."""

    info: TensorInfo
    first: int
    start: int
    stop: int


class FileChunk(NamedTuple):
    """Bytes [start, start + num_bytes) of a file, and the pieces of tensors that fill them without a gap."""

    file: Path
    start: int
    num_bytes: int
    pieces: tuple[Piece, ...]


def file_chunks(infos: Iterable[TensorInfo], max_bytes: int) -> Iterator[FileChunk]:
    """Yields every byte of the tensors once, in chunks of at most ``max_bytes``, in the order of files and bytes."""
    assert max_bytes >= ALIGNMENT_BYTES, max_bytes
    by_file: dict[Path, list[TensorInfo]] = {}
    for info in infos:
        by_file.setdefault(info.file, []).append(info)
    for file in sorted(by_file):
        yield from _chunks_of(file, sorted(by_file[file], key=lambda info: info.start), max_bytes)


def _chunks_of(file: Path, infos: list[TensorInfo], max_bytes: int) -> Iterator[FileChunk]:
    pieces: list[Piece] = []
    chunk_start = end = 0
    for info in infos:
        first, num_bytes = 0, info.num_bytes
        while first < num_bytes:
            room = chunk_start + max_bytes - end
            fits = min(num_bytes - first, room)
            if fits < num_bytes - first:
                fits -= fits % ALIGNMENT_BYTES
            if pieces and (fits <= 0 or info.start + first != end):
                yield FileChunk(file, chunk_start, end - chunk_start, tuple(pieces))
                pieces = []
            if not pieces:
                chunk_start = end = info.start + first
                fits = min(num_bytes - first, max_bytes)
                if fits < num_bytes - first:
                    fits -= fits % ALIGNMENT_BYTES
            pieces.append(Piece(info, first, end - chunk_start, end - chunk_start + fits))
            end += fits
            first += fits
    if pieces:
        yield FileChunk(file, chunk_start, end - chunk_start, tuple(pieces))


class ChunkReader:
    """Reads chunks into the caller's buffers, with one shard open at a time."""

    def __init__(self) -> None:
        self._shards = PositionedReader()

    def read(self, chunk: FileChunk, buffer: memoryview) -> None:
        """Fills the beginning of ``buffer``. Errors: CheckpointError naming the tensor that cannot be read."""
        part = buffer[: chunk.num_bytes]
        self._shards.fill(chunk.file, chunk.start, part, lambda position: _info_at(chunk, position))

    def close(self) -> None:
        """Closes the shard that is open, if any."""
        self._shards.close()


def _info_at(chunk: FileChunk, position: int) -> TensorInfo:
    return next(piece.info for piece in chunk.pieces if position < piece.stop)
