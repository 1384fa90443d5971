"""One stored tensor, as its shard's header describes it."""

from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

from ownpath.checkpoint.header import DTYPE_BITS


@dataclass(frozen=True)
class Source:
    """A tensor's place in its file: its key there, and of a tensor that holds several, the expert and the first row."""

    key: str
    expert: int | None = None
    first_row: int = 0


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor: its dtype by safetensors' name, its shape, and its shard and first byte there.

    source: its place in the shard, if it is not stored whole under its own name.
    header: dtype and shape as the header has them, where they are only another way to write this dtype and shape.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int = 0
    source: Source | None = None
    header: str = ""

    @cached_property
    def num_bytes(self) -> int:
        return prod(self.shape) * DTYPE_BITS.get(self.dtype, 8) // 8

    def __str__(self) -> str:
        key = "" if self.source is None else repr(self.source.key)
        there = ", there " + " ".join(filter(None, (key, self.header))) if key or self.header else ""
        return f"{self.name!r} ({self.dtype} {list(self.shape)} in {self.file.name}{there})"
