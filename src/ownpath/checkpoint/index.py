"""The index of a checkpoint's tensors, read from safetensors headers alone: no weight byte is read."""

import os
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from types import MappingProxyType

from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.header import DTYPE_BITS, MAX_PROBLEMS, MAX_TENSORS, HeaderBudget, read_header
from ownpath.checkpoint.problems import make_problem
from ownpath.checkpoint.transformers_names import Source, are_transformers_names, native_tensors
from ownpath.checkpoint.writer import INDEX_NAME
from ownpath.files import FileError, is_there, read_json_object, shorten
from ownpath.finding import Finding

SINGLE_NAME = "model.safetensors"
MAX_SHARDS = 10_000
"""Limit of the shards that an index may name. V4-Pro has about 160."""


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
    if is_there(index_path):
        scanner.read_index(index_path)
    elif is_there(folder / SINGLE_NAME):
        scanner.read_single(folder / SINGLE_NAME)
    else:
        scanner.add("folder", folder.name, f"{folder}: found neither {INDEX_NAME} nor {SINGLE_NAME}")
    if are_transformers_names(scanner.tensors):
        scanner.rename()
    index = CheckpointIndex(folder, MappingProxyType(scanner.tensors))
    return Scan(index, scanner.found(), frozenset(scanner.broken), bool(scanner.tensors))


def is_inside(path: Path, folder: Path) -> bool:
    """Returns True if a file, with every link followed, lies in the folder or in the blobs of the folder's hub cache.

    A model hub's cache keeps snapshots/<revision>/ as links into the blobs/ two folders up.
    """
    home, there = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    is_blob = home.parent.name == "snapshots" and there.parent == home.parent.parent / "blobs"
    return is_blob or there.is_relative_to(home)


class _Scanner:
    """Collects the tensors and problems of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        self.problems: list[Finding] = []
        self.broken: set[Path] = set()
        self._num_found: Counter[str] = Counter()
        self._budget = HeaderBudget()

    def add(self, check: str, where: str, message: str) -> None:
        self._num_found[check] += 1
        if self._num_found[check] <= MAX_PROBLEMS:
            self.problems.append(make_problem(check, where, message))

    def found(self) -> tuple[Finding, ...]:
        """Returns the problems, and for each kind the number of those that are too many to list."""
        more = ((check, count - MAX_PROBLEMS) for check, count in self._num_found.items() if count > MAX_PROBLEMS)
        told = [make_problem(kind, self.folder.name, f"{self.folder}: {n} more problems of this kind") for kind, n in more]
        return (*self.problems, *told)

    def read_single(self, path: Path) -> None:
        """Reads the one shard of a folder without an index."""
        if self._shard_path(path.name, path) is not None:
            self.read_shards([path])

    def read_index(self, path: Path) -> None:
        weight_map = self._weight_map(path)
        names = sorted(set(weight_map.values()))
        if len(names) > MAX_SHARDS:
            self.add("index", path.name, f"{path}: names {len(names)} shards; at most {MAX_SHARDS} are read")
            return
        shards = {name: shard for name in names if (shard := self._shard_path(name, path)) is not None}
        self.read_shards(list(shards.values()))
        unread = {shard.name for shard in self.broken} | (set(names) - set(shards))
        self._compare(weight_map, unread, path)

    def read_shards(self, paths: list[Path]) -> None:
        for path in paths:
            header = read_header(path, self._budget)
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
        if len(weight_map) > MAX_TENSORS:
            self.add("index", path.name, f"{path}: lists {len(weight_map)} tensors; at most {MAX_TENSORS} are read")
            return {}
        for name, file in weight_map.items():
            if not isinstance(file, str):
                self.add("index", name, f"{path}: tensor {name!r} is mapped to {shorten(file)}, not to a file name")
        return {name: file for name, file in weight_map.items() if isinstance(file, str)}

    def _read_object(self, path: Path) -> dict[str, object] | None:
        """Returns the file's JSON object, or reports a problem and returns ``None``."""

        def report_twice(name: str) -> None:
            self.add("duplicated-tensor", name, f"{path}: names {name!r} twice")

        try:
            return read_json_object(path, report_twice)
        except FileError as error:
            self.add("index", path.name, str(error))
            return None

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
        if not is_inside(path, self.folder):
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
