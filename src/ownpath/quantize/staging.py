"""The unfinished files of a run: finished shards, each with a note of its bytes, so that an interrupted run can go on.

A shard is finished when its note is there. The note holds the shard's size and SHA-256, and the digest of the run that
made it: a shard that was cut, changed or exchanged since, or that another run made, is made again.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.writer import fingerprint_of, write_shard
from ownpath.files import FileError, is_present, read_json_object, sync_folder, write_json
from ownpath.quantize.convert import Counts

STAGING, PLAN = ".quantizing", "plan.json"


@dataclass(frozen=True)
class Shard:
    """A finished shard: tensor names with their bytes, and counts of its conversions."""

    tensors: dict[str, int]
    counts: Counts


class UnfinishedRun:
    """The folder ``.quantizing`` of one target, held by one run at a time.

    redone: final names of shards that an earlier run had finished and that are no longer what it wrote.
    """

    def __init__(self, target: Path, plan: Mapping[str, object]) -> None:
        """Opens or makes the folder. Errors: CheckpointError where it is another run's, or not to be trusted."""
        self.target, self.folder = target, target / STAGING
        self.redone: list[str] = []
        self._run = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
        _make_real_folder(target)
        _make_real_folder(self.folder)
        self._descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            self._hold()
            if not is_present(self.folder / PLAN):
                write_json(self.folder / PLAN, dict(plan))
            elif _read(self.folder / PLAN) != plan:
                raise CheckpointError(
                    f"{self.folder} holds an unfinished run of another source or other options: delete it first"
                )
        except BaseException:
            self.close()
            raise

    def _hold(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{self.folder}: another run is writing this checkpoint") from None
        except OSError:  # a file system without locks
            return

    def close(self) -> None:
        """Lets another run have the folder."""
        os.close(self._descriptor)

    def find_finished(self, number: int, final: str, names: Sequence[str]) -> Shard | None:
        """Returns an earlier run's shard if it is still what its note says. final: its name in the finished checkpoint.

        names: of the tensors that it must hold.
        """
        if not is_present(self._note(number)):
            return None
        try:
            fields = _read(self._note(number))
            shard, written = _shard_of(fields), (fields["num_bytes"], fields["sha256"])
            is_ours = fields["run"] == self._run and list(shard.tensors) == list(names)
            if is_ours and fingerprint_of(self._place(number, final)) == written:
                return shard
        except (FileError, KeyError, TypeError, AttributeError, OSError):
            pass
        self.redone.append(final)
        return None

    def write_shard(self, number: int, tensors: Mapping[str, torch.Tensor], counts: Counts) -> Shard:
        """Writes a shard and then its note. Errors: FileError naming the file."""
        written = write_shard(self._shard(number), tensors)
        shard = Shard({name: tensor.nbytes for name, tensor in tensors.items()}, counts)
        note = {"run": self._run, **written._asdict(), "tensors": shard.tensors, "counts": asdict(counts)}
        write_json(self._note(number), note)
        return shard

    def release(self, finals: Sequence[str]) -> None:
        """Gives the shards, which are all finished, their names in the target."""
        for number, final in enumerate(finals):
            if is_present(self._shard(number)):
                self._shard(number).replace(self.target / final)
        sync_folder(self.target)

    def remove(self) -> None:
        """Removes the folder of a complete run: first what would make another run go on from here."""
        (self.folder / PLAN).unlink()
        sync_folder(self.folder)
        shutil.rmtree(self.folder)

    def _shard(self, number: int) -> Path:
        return self.folder / f"{number}.safetensors"

    def _note(self, number: int) -> Path:
        return self.folder / f"{number}.json"

    def _place(self, number: int, final: str) -> Path:
        """Returns where a finished shard is: here, or already in the target."""
        return self._shard(number) if is_present(self._shard(number)) else self.target / final


def is_unfinished(target: Path) -> bool:
    """Returns True if the target holds a run that can go on."""
    return not (target / STAGING).is_symlink() and is_present(target / STAGING / PLAN)


def _make_real_folder(path: Path) -> None:
    """Makes a folder that is missing. Errors: CheckpointError for a link or anything else of that name."""
    if path.is_symlink():
        raise CheckpointError(f"{path}: is a link; give the folder itself, nothing is written through a link")
    if is_present(path) and not path.is_dir():
        raise CheckpointError(f"{path}: is there and no folder")
    if not path.is_dir():
        path.mkdir(parents=True)
        sync_folder(path.parent)


def _read(path: Path) -> dict[str, object]:
    return read_json_object(path, follow_links=False)


def _shard_of(fields: Mapping[str, object]) -> Shard:
    """Parses a note. Errors: KeyError, TypeError, AttributeError for what is none."""
    tensors, counts = fields["tensors"], fields["counts"]
    if not isinstance(tensors, dict) or not isinstance(counts, dict):
        raise TypeError("tensors and counts are objects")
    if any(type(value) is not int or value < 0 for value in (*tensors.values(), *counts.values())):
        raise TypeError("sizes and counts are whole numbers")
    return Shard(tensors, Counts(**counts))
