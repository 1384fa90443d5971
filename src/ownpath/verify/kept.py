"""Findings of the parts of a checkpoint that a stage is done with, so that a stopped run does not look at them again.

One JSON file a stage in the work folder, written anew behind each part: beside its final name, flushed, renamed. It is
used by a run with the same key alone: a digest of everything that findings depend on. A part with a failure is not
kept, because what failed is looked at again.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ownpath.finding import Finding, failed, finding_fields, finding_from
from ownpath.verify.subject import Subject
from ownpath.versions import versions

_FORMAT = 1


def digest_of(subject: Subject, **more: Any) -> str:
    """SHA-256 over headers (names, places, sizes and times of the shards), configuration, plan and selection.

    more: what else a stage's findings depend on, as JSON can say it.
    """
    selection = subject.selection
    shards = {info.file for info in subject.index.tensors.values()}
    parts: dict[str, Any] = more | {
        "format": _FORMAT,
        "versions": versions(),
        "device": subject.plan.caps.name,
        "config": repr(subject.config),
        "engine": repr(subject.engine),
        "plan": sorted(subject.plan.slots.items()),
        "layers": subject.layer_ids,
        "experts": [selection.num_experts, selection.seed],
        "tensors": [(t.name, t.dtype, t.shape, t.file.name, t.start) for t in subject.index.tensors.values()],
        "shards": sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in shards),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


@dataclass
class Kept:
    """What is known of one stage's parts. path: ``None`` where nothing is kept."""

    path: Path | None
    key: str
    parts: dict[str, list[Finding]] = field(default_factory=dict)

    @classmethod
    def of(cls, work: Path | None, stage: str, subject: Subject) -> "Kept":
        """With what an earlier run of the same key left; without it where the file is another run's or torn."""
        if work is None:
            return cls(None, "")
        path, key = work / f"{stage}.json", digest_of(subject)
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["key"] == key:
                parts: Mapping[str, Any] = stored["parts"]
                return cls(path, key, {name: [finding_from(found) for found in part] for name, part in parts.items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass
        return cls(path, key)

    def part(self, name: str, look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
        """The findings of a part: those that are kept, or what ``look`` finds, which is kept from then on."""
        if name in self.parts:
            yield from self.parts[name]
            return
        found: list[Finding] = []
        for finding in look():
            found.append(finding)
            yield finding
        if self.path is not None and not failed(found):
            self.parts[name] = found
            self._write(self.path)

    def _write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        parts = {name: [finding_fields(finding) for finding in found] for name, found in self.parts.items()}
        beside = path.with_name(f".{path.name}.writing")
        with beside.open("w", encoding="utf-8") as file:
            json.dump({"key": self.key, "parts": parts}, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
