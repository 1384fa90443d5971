"""The index of a checkpoint's tensors, read from safetensors headers alone: no weight byte is read."""

import json
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from types import MappingProxyType

from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.header import DTYPE_BITS, MAX_HEADER_BYTES, read_header
from ownpath.checkpoint.problems import make_problem
from ownpath.checkpoint.transformers_names import Source, are_transformers_names, native_tensors
from ownpath.checkpoint.writer import INDEX_NAME
from ownpath.finding import Finding

SINGLE_NAME = "model.safetensors"
MAX_INDEX_BYTES = MAX_HEADER_BYTES


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor: its safetensors dtype name, its shape, and its shard and first byte there.

    source: its place in the shard, if it is not stored whole under its own name.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int = 0
    source: Source | None = None

    @cached_property
    def num_bytes(self) -> int:
        return prod(self.shape) * DTYPE_BITS.get(self.dtype, 8) // 8

    def __str__(self) -> str:
        there = f", there {self.source.key!r}" if self.source is not None else ""
        return f"{self.name!r} ({self.dtype} {list(self.shape)} in {self.file.name}{there})"


@dataclass(frozen=True)
class CheckpointIndex:
    """Every tensor of a checkpoint by its DeepSeek name."""

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
        scan = scan_checkpoint(folder)
        if scan.problems:
            raise CheckpointError(scan.problems[0].message)
        return scan.index


@dataclass(frozen=True)
class Scan:
    """The headers of a folder and all problems found in them.

    broken: shards whose bytes mean nothing. has_tensors: an index or a shard was found.
    """

    index: CheckpointIndex
    problems: tuple[Finding, ...]
    broken: frozenset[Path]
    has_tensors: bool


def scan_checkpoint(folder: Path) -> Scan:
    """Reads the headers of a checkpoint folder and collects every problem; nothing raises."""
    scanner = _Scanner(folder)
    index_path = folder / INDEX_NAME
    if index_path.exists():
        scanner.read_index(index_path)
    elif (folder / SINGLE_NAME).exists():
        scanner.read_shards([folder / SINGLE_NAME])
    else:
        scanner.add("folder", folder.name, f"{folder}: found neither {INDEX_NAME} nor {SINGLE_NAME}")
    if are_transformers_names(scanner.tensors):
        scanner.rename()
    index = CheckpointIndex(folder, MappingProxyType(scanner.tensors))
    return Scan(index, tuple(scanner.problems), frozenset(scanner.broken), bool(scanner.tensors))


class _Scanner:
    """Collects the tensors and problems of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        self.problems: list[Finding] = []
        self.broken: set[Path] = set()

    def add(self, check: str, where: str, message: str) -> None:
        self.problems.append(make_problem(check, where, message))

    def read_index(self, path: Path) -> None:
        weight_map = self._weight_map(path)
        names = sorted(set(weight_map.values()))
        shards = {name: shard for name in names if (shard := self._shard_path(name, path)) is not None}
        self.read_shards(list(shards.values()))
        unread = {shard.name for shard in self.broken} | (set(names) - set(shards))
        self._compare(weight_map, unread, path)

    def read_shards(self, paths: list[Path]) -> None:
        for path in paths:
            header = read_header(path)
            self.problems += header.problems
            if header.problems:
                self.broken.add(path)
            for entry in header.entries:
                info = TensorInfo(entry.name, entry.dtype, entry.shape, path, entry.start)
                if entry.name in self.tensors:
                    other = self.tensors[entry.name].file.name
                    self.add("duplicated-tensor", entry.name, f"tensor {info} also lies in {other}")
                else:
                    self.tensors[entry.name] = info

    def rename(self) -> None:
        """Renames transformers' names to native ones and splits stacked experts into one tensor each."""
        stored, self.tensors = self.tensors, {}
        for key, info in stored.items():
            start = info.start
            # Experts' slices come in the order of the file, one behind the other.
            for name, shape, source in native_tensors(key, info.shape):
                native = TensorInfo(name, info.dtype, shape, info.file, start, source)
                start += native.num_bytes
                if name in self.tensors:
                    where = f"is also stored as {key!r} in {info.file.name}"
                    self.add("duplicated-tensor", name, f"tensor {self.tensors[name]} {where}")
                else:
                    self.tensors[name] = native

    def _weight_map(self, path: Path) -> dict[str, str]:
        """Returns the index's map from tensor to shard; other entries are reported and left out."""
        content = self._read_object(path)
        if content is None:
            return {}
        weight_map = content.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            self.add("index", path.name, f"{path}: no 'weight_map' object")
            return {}
        for name, file in weight_map.items():
            if not isinstance(file, str):
                self.add("index", name, f"{path}: tensor {name!r} is mapped to {file!r}, not to a file name")
        return {name: file for name, file in weight_map.items() if isinstance(file, str)}

    def _read_object(self, path: Path) -> dict[str, object] | None:
        """Returns the file's JSON object, or reports a problem and returns ``None``."""

        def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
            content: dict[str, object] = {}
            for name, value in pairs:
                if name in content:
                    self.add("duplicated-tensor", name, f"{path}: names {name!r} twice")
                content[name] = value
            return content

        try:
            if not path.is_file() or path.stat().st_size > MAX_INDEX_BYTES:
                self.add("index", path.name, f"{path}: not a regular file of at most {MAX_INDEX_BYTES} bytes")
                return None
            content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
        except (ValueError, RecursionError, OSError) as error:
            self.add("index", path.name, f"{path}: not readable as JSON ({error})")
            return None
        if not isinstance(content, dict):
            self.add("index", path.name, f"{path}: not a JSON object")
            return None
        return content

    def _shard_path(self, name: str, index_path: Path) -> Path | None:
        """Returns the path of a shard, a plain file name beside its index; refuses names that could point elsewhere."""
        if name in ("", ".", "..") or any(char in name for char in "/\\\0"):
            message = f"{index_path}: shard {name!r} is not a file name inside the checkpoint folder"
            self.add("escaping-shard", name, message)
            return None
        path = self.folder / name
        try:
            exists = path.exists()
        except OSError:  # not a possible file name
            exists = False
        if not exists:
            self.add("missing-shard", name, f"{index_path}: shard {name!r} does not exist")
            return None
        home = self.folder.resolve()
        # A model hub's cache keeps snapshots/<revision>/ as links into the blobs/ two folders up.
        if path.resolve().parent not in (home, home.parent.parent / "blobs"):
            message = f"{index_path}: shard {name!r} is a link out of the checkpoint folder"
            self.add("escaping-shard", name, message)
            return None
        return path

    def _compare(self, weight_map: dict[str, str], unread: set[str], index_path: Path) -> None:
        """Compares index and shards in both directions; tensors of an unreadable shard are covered by its problem."""
        for name, file in weight_map.items():
            if name not in self.tensors:
                if file not in unread:
                    message = f"{index_path}: tensor {name!r} is listed but in no shard"
                    self.add("missing-tensor", name, message)
            elif self.tensors[name].file.name != file:
                self.add("index", name, f"{index_path}: tensor {self.tensors[name]} is listed in {file!r}")
        for name, info in self.tensors.items():
            if name not in weight_map:
                self.add("unlisted-tensor", name, f"{index_path}: tensor {info} is not listed")
