"""Writes the quantised checkpoint shard by shard; what is finished stays finished, and only the end looks like one.

Shards are made in ``.quantizing`` inside the target, each with a note of what it holds; a run that was interrupted
finds them there and goes on. The target gets its ``config.json`` and, last, its index when all of them are done:
before that no loader takes it for a checkpoint.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.writer import INDEX_NAME
from ownpath.config import ModelConfig
from ownpath.quantize.convert import Counts, step_tensors
from ownpath.quantize.describe import config_fields, quant_config_fields
from ownpath.quantize.steps import Convert, Scope, Step, plan_shards, plan_steps

STAGING = ".quantizing"
PLAN, CONFIG, QUANT_CONFIG = "plan.json", "config.json", "hf_quant_config.json"
VERSION = 1
"""Of what a step writes: another version does not go on with an older one's shards."""

ShowProgress = Callable[[int, int, int], None]


@dataclass(frozen=True)
class Shard:
    """A finished shard: tensor names with their bytes, and what was converted in it."""

    tensors: dict[str, int]
    counts: Counts


@dataclass(frozen=True)
class Report:
    """What was written."""

    num_shards: int
    num_bytes: int
    num_converted: int
    counts: Counts


def quantize_checkpoint(
    source: Path, target: Path, scope: Scope, max_shard_bytes: int, show: ShowProgress | None = None
) -> Report:
    """Quantises ``source`` into ``target``, or goes on where an interrupted run stopped.

    show: called with (finished shards, all shards, bytes read and written so far).
    Memory: one shard. Errors: CheckpointError or ConfigError naming the file, field or tensor; ``target`` is then no
    checkpoint, and what was finished is kept.
    """
    config = ModelConfig.from_file(source / CONFIG)
    index = CheckpointIndex.open(source)
    steps = plan_steps(index, config, scope)
    shards = plan_shards(steps, max_shard_bytes)
    staging = _open_staging(target, _plan(index, scope, max_shard_bytes))
    done: list[Shard] = []
    for number, shard in enumerate(shards):
        done.append(_finished(staging, number) or _make_shard(staging, number, shard, index))
        if show:
            show(len(done), len(shards), sum(sum(one.tensors.values()) for one in done))
    converts = [step for step in steps if isinstance(step, Convert)]
    _finish(source, target, staging, done, (scope, converts))
    num_bytes = sum(sum(shard.tensors.values()) for shard in done)
    num_converted = sum(len(convert.modules) for convert in converts)
    return Report(len(done), num_bytes, num_converted, sum((shard.counts for shard in done), Counts()))


def _plan(index: CheckpointIndex, scope: Scope, max_shard_bytes: int) -> dict[str, Any]:
    """What decides every byte of the result."""
    files = sorted({info.file for info in index.tensors.values()})
    files.append(index.folder / CONFIG)
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return {"version": VERSION, "scope": scope.value, "max_shard_bytes": max_shard_bytes, "source": digest}


def _open_staging(target: Path, plan: dict[str, Any]) -> Path:
    """Errors: CheckpointError where a checkpoint is already, or an unfinished one of other inputs."""
    for name in (INDEX_NAME, CONFIG, "model.safetensors"):
        if (target / name).exists() and not (target / STAGING / PLAN).exists():
            raise CheckpointError(f"{target / name} exists; a checkpoint is never overwritten")
    staging = target / STAGING
    staging.mkdir(parents=True, exist_ok=True)
    if not (staging / PLAN).exists():
        _write_json(staging / PLAN, plan)
    elif json.loads((staging / PLAN).read_text(encoding="utf-8")) != plan:
        raise CheckpointError(f"{staging} holds an unfinished run of another source or other options: delete it first")
    return staging


def _finished(staging: Path, number: int) -> Shard | None:
    """A shard of an earlier run: its note is written after its data."""
    note = staging / f"{number}.json"
    if not note.exists():
        return None
    fields = json.loads(note.read_text(encoding="utf-8"))
    return Shard(fields["tensors"], Counts(**fields["counts"]))


def _make_shard(staging: Path, number: int, steps: Sequence[Step], index: CheckpointIndex) -> Shard:
    tensors: dict[str, torch.Tensor] = {}
    counts = Counts()
    with _Reader(index) as read:
        for step in steps:
            made, counted = step_tensors(step, read)
            tensors |= made
            counts += counted
    scratch = staging / f"{number}.tmp"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, scratch, metadata={"format": "pt"})
    scratch.replace(staging / f"{number}.safetensors")
    shard = Shard({name: tensor.nbytes for name, tensor in tensors.items()}, counts)
    _write_json(staging / f"{number}.json", {"tensors": shard.tensors, "counts": asdict(counts)})
    return shard


class _Reader:
    """Tensors by name, out of shards that stay open until the end of the block."""

    def __init__(self, index: CheckpointIndex) -> None:
        self._index = index
        self._open: dict[Path, Any] = {}

    def __enter__(self) -> "_Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()

    def __call__(self, key: str) -> torch.Tensor:
        file = self._index[key].file
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt")
        tensor: torch.Tensor = self._open[file].get_tensor(key)
        return tensor


def _finish(
    source: Path, target: Path, staging: Path, shards: Sequence[Shard], what: tuple[Scope, list[Convert]]
) -> None:
    """Names the shards, writes what describes them, and the index last."""
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards):
        final = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        if (staging / f"{number}.safetensors").exists():
            (staging / f"{number}.safetensors").replace(target / final)
        weight_map.update(dict.fromkeys(shard.tensors, final))
    for path in _companions(source):
        shutil.copy2(path, target / path.name)
    fields = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    _write_json(target / QUANT_CONFIG, quant_config_fields(*what))
    _write_json(target / CONFIG, config_fields(fields, *what))
    total_bytes = sum(sum(shard.tensors.values()) for shard in shards)
    _write_json(target / INDEX_NAME, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
    shutil.rmtree(staging)


def _companions(source: Path) -> list[Path]:
    """Tokenizer and other files beside the weights; what describes the source's own weights is written anew."""
    written = {INDEX_NAME, CONFIG, QUANT_CONFIG}
    return [
        path
        for path in sorted(source.iterdir())
        if path.is_file() and path.suffix != ".safetensors" and path.name not in written
    ]


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    """So that a reader sees all of it or nothing."""
    scratch = path.with_suffix(".writing")
    scratch.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
    scratch.replace(path)
