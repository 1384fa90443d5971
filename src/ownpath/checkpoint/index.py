"""The index of a checkpoint's tensors, read from safetensors headers alone: no weight byte is read."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

from ownpath.checkpoint.drawn import DrawnValues
from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.header import MAX_PROBLEMS, MAX_TENSORS, HeaderBudget, read_header
from ownpath.checkpoint.needless import may_stay_unread
from ownpath.checkpoint.problems import make_problem
from ownpath.checkpoint.spelling import plainly_spelled
from ownpath.checkpoint.tensor_info import Source
from ownpath.checkpoint.tensor_info import TensorInfo as TensorInfo
from ownpath.checkpoint.transformers_names import native_name, native_tensors
from ownpath.checkpoint.writer import INDEX_NAME
from ownpath.files import FileError, is_present, read_json_object, shorten
from ownpath.finding import Finding

SINGLE_NAME = "model.safetensors"
MAX_SHARDS = 10_000
"""Limit of the shards that an index may name. V4-Pro has about 160."""


@dataclass(frozen=True)
class CheckpointIndex:
    """Every tensor of a checkpoint by its DeepSeek name.

    absent: tensors that the index file lists and no shard holds, with the shard, where they may stay unread.
    drawn: makes the tensors' values, where they are stored nowhere.
    """

    folder: Path
    tensors: MappingProxyType[str, TensorInfo]
    absent: Mapping[str, str] = field(default_factory=dict)
    drawn: DrawnValues | None = None

    @cached_property
    def endings(self) -> dict[str, list[str]]:
        """module -> the endings of its tensors' names."""
        found: dict[str, list[str]] = {}
        for name in self.tensors:
            stem, _, ending = name.rpartition(".")
            found.setdefault(stem, []).append(ending)
        return found

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
    if is_present(index_path):
        scanner.read_index(index_path)
    elif is_present(folder / SINGLE_NAME):
        scanner.read_single(folder / SINGLE_NAME)
    else:
        scanner.add("folder", folder.name, f"{folder}: found neither {INDEX_NAME} nor {SINGLE_NAME}")
    if not scanner.tensors and not scanner.problems:
        scanner.add("folder", folder.name, f"{folder}: its shards hold no tensors")
    scanner.rename()
    tensors = MappingProxyType(plainly_spelled(scanner.tensors))
    index = CheckpointIndex(folder, tensors, MappingProxyType(scanner.absent))
    return Scan(index, scanner.found(), frozenset(scanner.broken), bool(scanner.tensors))


def is_inside(path: Path, folder: Path) -> bool:
    """Returns True if a file, with every link followed, lies in the folder or in the blobs of the folder's hub cache.

    A model hub's cache keeps snapshots/<revision>/ as links into the blobs/ two folders up.
    """
    home, there = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    is_blob = home.parent.name == "snapshots" and there.parent == home.parent.parent / "blobs"
    return is_blob or there.is_relative_to(home)


def _part_of(info: TensorInfo, name: str, shape: tuple[int, ...], source: Source) -> TensorInfo:
    """Returns the tensor of this name in a stored one: all of it, or rows of an expert's or of gate above up."""
    start = info.start
    if source.expert is not None:
        start += source.expert * (info.num_bytes // info.shape[0])
        start += source.first_row * (info.num_bytes // (info.shape[0] * info.shape[1]))
    elif source.first_row:
        start += source.first_row * (info.num_bytes // info.shape[0])
    return TensorInfo(name, info.dtype, shape, info.file, start, source)


class _Scanner:
    """Collects the tensors and problems of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        self.problems: list[Finding] = []
        self.broken: set[Path] = set()
        self.absent: dict[str, str] = {}
        self._num_found: Counter[str] = Counter()
        self._budget = HeaderBudget()

    def add(self, check: str, where: str, message: str) -> None:
        self._num_found[check] += 1
        if self._num_found[check] <= MAX_PROBLEMS:
            self.problems.append(make_problem(check, where, message))

    def found(self) -> tuple[Finding, ...]:
        """Returns the problems, and for each kind the number of those that are too many to list."""
        more = ((check, count - MAX_PROBLEMS) for check, count in self._num_found.items() if count > MAX_PROBLEMS)
        words = "more problems of this kind, which are not listed"
        told = [make_problem(check, self.folder.name, f"{self.folder}: {count} {words}") for check, count in more]
        return (*self.problems, *told)

    def read_single(self, path: Path) -> None:
        """Reads the one shard of a folder without an index."""
        if self._shard_path(path.name, path, is_needed=True) is not None:
            self.read_shards([path])

    def read_index(self, path: Path) -> None:
        weight_map = self._weight_map(path)
        names = sorted(set(weight_map.values()))
        if len(names) > MAX_SHARDS:
            self.add("index", path.name, f"{path}: names {len(names)} shards; at most {MAX_SHARDS} are read")
            return
        needed = {file for name, file in weight_map.items() if not may_stay_unread(native_name(name))}
        shards = {name: shard for name in names if (shard := self._shard_path(name, path, name in needed)) is not None}
        self.read_shards(list(shards.values()))
        self._compare(weight_map, set(names) - set(shards), path)

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
        """Renames transformers' names to native ones and splits tensors that hold several weights."""
        stored, self.tensors = self.tensors, {}
        for key, info in stored.items():
            for name, shape, source in native_tensors(key, info.shape):
                native = info if source is None else _part_of(info, name, shape, source)
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

    def _shard_path(self, name: str, index_path: Path, is_needed: bool) -> Path | None:
        """Returns the path of a shard, a plain file name beside its index; refuses names that could point elsewhere.

        is_needed: it holds a tensor that must be read. A shard that is not there is no problem otherwise.
        """
        if name in ("", ".", "..") or any(char in name for char in "/\\\0"):
            message = f"{index_path}: shard {name!r} is not a file name inside the checkpoint folder"
            self.add("escaping-shard", name, message)
            return None
        path = self.folder / name
        try:
            exists = path.exists()
        except OSError:  # not a possible file name
            exists = False
        if not exists and not is_needed:
            return None
        if not exists:
            self.add("missing-shard", name, f"{index_path}: shard {name!r} does not exist")
            return None
        if not is_inside(path, self.folder):
            message = f"{index_path}: shard {name!r} is a link out of the checkpoint folder"
            self.add("escaping-shard", name, message)
            return None
        return path

    def _compare(self, weight_map: dict[str, str], missing: set[str], index_path: Path) -> None:
        """Compares index and shards in both directions; tensors of an unreadable shard are covered by its problem."""
        broken = {shard.name for shard in self.broken}
        for name, file in weight_map.items():
            if name not in self.tensors:
                if file in broken:
                    continue
                if may_stay_unread(native_name(name)):
                    self.absent[native_name(name)] = file
                elif file not in missing:
                    message = f"{index_path}: tensor {name!r} is listed but in no shard"
                    self.add("missing-tensor", name, message)
            elif self.tensors[name].file.name != file:
                self.add("index", name, f"{index_path}: tensor {self.tensors[name]} is listed in {file!r}")
        for name, info in self.tensors.items():
            if name not in weight_map:
                self.add("unlisted-tensor", name, f"{index_path}: tensor {info} is not listed")
