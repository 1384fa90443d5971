"""Resumes a stopped run: one file per stage in the work folder, rewritten after each part of a checkpoint.

A safetensors file holds tensors and, as metadata, the run's key and a JSON value. It is written beside its final name,
flushed and renamed: it holds the state after one part or after the next, never half of one. Only a run with the same
key uses it; the key digests everything that findings depend on. A part with a failure is not saved, because failed
parts are checked again.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ownpath.checkpoint.reader import read_file
from ownpath.checkpoint.writer import write_shard
from ownpath.files import is_present
from ownpath.finding import Finding, failed, finding_fields, finding_from
from ownpath.verify.subject import Subject
from ownpath.versions import versions

_FORMAT = 2
Decoded = TypeVar("Decoded")


def digest_of(subject: Subject, **more: object) -> str:
    """Digests headers (names, places, sizes and times of the shards), configuration, plan and selection with SHA-256.

    more: other values that a stage's findings depend on, JSON-serialisable.
    """
    selection = subject.selection
    drawn, infos = subject.index.drawn, subject.index.tensors.values()
    shards = {info.file for info in infos} if drawn is None else set()
    parts: dict[str, object] = more | {
        "format": _FORMAT,
        "versions": versions(),
        "device": subject.plan.caps.name,
        "config": repr(subject.config),
        "engine": repr(subject.engine),
        "plan": sorted(subject.plan.slots.items()),
        "layers": subject.layer_ids,
        "experts": [selection.num_experts, selection.seed],
        "tensors": [(t.name, t.dtype, t.shape, t.file.name, t.start) for t in infos],
        "drawn": None if drawn is None else drawn.seed,
        "shards": sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in shards),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


class SavedState(Enum):
    """The state of a file in a work folder."""

    NOTHING = "nothing"
    OTHER = "what is there is of another run, or cannot be read"
    SAME = "this run, as far as it came"


def write_state(path: Path, key: str, value: object, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Writes a JSON value and tensors under the run's key. Errors: FileError naming the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_shard(path, tensors or {}, {"key": key, "value": json.dumps(value)})


def read_state(
    path: Path, key: str, decode: Callable[[Any, dict[str, Tensor]], Decoded], device: torch.device | None = None
) -> tuple[SavedState, Decoded | None]:
    """Reads a file of a run with this key, through ``decode(value, tensors)``, whose errors mean a torn file."""
    if not is_present(path):
        return SavedState.NOTHING, None
    try:
        metadata, tensors = read_file(path, lambda found: found.get("key") == key)
        if metadata.get("key") != key:
            return SavedState.OTHER, None
        on_device = {name: tensor.to(device or "cpu") for name, tensor in tensors.items()}
        return SavedState.SAME, decode(json.loads(metadata["value"]), on_device)
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return SavedState.OTHER, None


@dataclass
class FinishedParts:
    """The findings of a stage's finished parts, by the parts' names. path: ``None``: nothing is saved."""

    path: Path | None
    key: str
    parts: dict[str, list[Finding]] = field(default_factory=dict)

    @classmethod
    def of(cls, work: Path | None, stage: str, subject: Subject) -> "FinishedParts":
        """Starts from an earlier run with the same key; empty where the file is another run's or torn."""
        if work is None:
            return cls(None, "")
        path, key = work / f"{stage}.safetensors", digest_of(subject)
        _, parts = read_state(path, key, _parts_from)
        return cls(path, key, parts or {})

    def part(self, name: str, look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
        """Yields a part's saved findings, or those of ``look``, which it then saves."""
        if name in self.parts:
            yield from self.parts[name]
            return
        found: list[Finding] = []
        for finding in look():
            found.append(finding)
            yield finding
        if self.path is not None and not failed(found):
            self.parts[name] = found
            value = {name: [finding_fields(finding) for finding in part] for name, part in self.parts.items()}
            write_state(self.path, self.key, value)


def _parts_from(value: Any, _: dict[str, Tensor]) -> dict[str, list[Finding]]:
    return {name: [finding_from(fields) for fields in part] for name, part in value.items()}
