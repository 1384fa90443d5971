"""What a checkpoint holds, read from safetensors headers alone: no weight byte moves."""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors import SafetensorError, safe_open

from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.renamed import Source, are_renamed, native_tensors
from ownpath.checkpoint.writer import INDEX_NAME

SINGLE_NAME = "model.safetensors"
DTYPE_BITS = MappingProxyType(
    {"F64": 64, "F32": 32, "BF16": 16, "F16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8}
    | {"I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8}
)


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor: its safetensors dtype name, its shape and the shard it lies in.

    source: where it lies there, if not as a whole under its own name.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    source: Source | None = None

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * DTYPE_BITS.get(self.dtype, 8) // 8

    def __str__(self) -> str:
        there = f", there {self.source.key!r}" if self.source is not None else ""
        return f"{self.name!r} ({self.dtype} {list(self.shape)} in {self.file.name}{there})"


@dataclass(frozen=True)
class CheckpointIndex:
    """Every tensor of a checkpoint by DeepSeek's name for it."""

    folder: Path
    tensors: MappingProxyType[str, TensorInfo]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> TensorInfo:
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.folder}: tensor {name!r} is missing") from None

    @classmethod
    def open(cls, folder: Path) -> "CheckpointIndex":
        """Reads the headers of a checkpoint folder (an index with its shards, or one model.safetensors).

        Errors: CheckpointError naming the file or tensor: no checkpoint, unreadable or truncated shard, an index
        that leaves the folder, and any tensor that index and shards do not agree on.
        """
        index_path = folder / INDEX_NAME
        if index_path.exists():
            weight_map = _read_weight_map(index_path)
            files = sorted(set(weight_map.values()))
            tensors = _read_headers([_shard_path(folder, name, index_path) for name in files])
            _compare(weight_map, tensors, index_path)
        elif (folder / SINGLE_NAME).exists():
            tensors = _read_headers([folder / SINGLE_NAME])
        else:
            raise CheckpointError(f"{folder}: found neither {INDEX_NAME} nor {SINGLE_NAME}")
        return cls(folder, MappingProxyType(_under_native_names(tensors) if are_renamed(tensors) else tensors))


def _read_weight_map(path: Path) -> dict[str, str]:
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: no 'weight_map' object")
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise CheckpointError(f"{path}: tensor {name!r} is mapped to {file!r}, not to a file name")
    return weight_map


def _shard_path(folder: Path, name: str, index_path: Path) -> Path:
    """A shard is a plain file name beside its index; anything that could point elsewhere is refused."""
    if name in ("", ".", "..") or any(char in name for char in "/\\\0"):
        raise CheckpointError(f"{index_path}: shard {name!r} is not a file name inside the checkpoint folder")
    path = folder / name
    if not path.exists():
        raise CheckpointError(f"{index_path}: shard {name!r} does not exist")
    home = folder.resolve()
    # A model hub's cache keeps snapshots/<revision>/ as links into the blobs/ two folders up.
    if path.resolve().parent not in (home, home.parent.parent / "blobs"):
        raise CheckpointError(f"{index_path}: shard {name!r} is a link out of the checkpoint folder")
    return path


def _read_headers(paths: list[Path]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for path in paths:
        for info in _read_header(path):
            if info.name in tensors:
                raise CheckpointError(f"tensor {info} also lies in {tensors[info.name].file.name}")
            tensors[info.name] = info
    return tensors


def _read_header(path: Path) -> list[TensorInfo]:
    try:
        with safe_open(path, framework="pt") as shard:
            slices = [(name, shard.get_slice(name)) for name in shard.keys()]  # noqa: SIM118 (not a dict)
            return [TensorInfo(name, part.get_dtype(), tuple(part.get_shape()), path) for name, part in slices]
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a complete safetensors file ({error})") from None


def _compare(weight_map: dict[str, str], tensors: dict[str, TensorInfo], index_path: Path) -> None:
    for name, file in weight_map.items():
        if name not in tensors:
            raise CheckpointError(f"{index_path}: tensor {name!r} is listed but in no shard")
        if tensors[name].file.name != file:
            raise CheckpointError(f"{index_path}: tensor {tensors[name]} is listed in {file!r}")
    for name in tensors:
        if name not in weight_map:
            raise CheckpointError(f"{index_path}: tensor {tensors[name]} is not listed")


def _under_native_names(tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    native: dict[str, TensorInfo] = {}
    for key, info in tensors.items():
        for name, shape, source in native_tensors(key, info.shape):
            if name in native:
                raise CheckpointError(f"tensor {native[name]} is also stored as {key!r} in {info.file.name}")
            native[name] = TensorInfo(name, info.dtype, shape, info.file, source)
    return native
