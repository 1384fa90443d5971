"""Writes the quantised checkpoint shard by shard, so that an interrupted run can continue.

Shards are written to ``.quantizing`` inside the target, each with a note of its contents; the next run finds them there
and continues. When all are done the target gets its ``config.json`` and, last, its index: before that, no loader takes
it for a checkpoint.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.reader import TensorReader
from ownpath.checkpoint.writer import INDEX_NAME
from ownpath.config import ModelConfig
from ownpath.quantize.convert import Counts, step_tensors
from ownpath.quantize.describe import config_fields, quant_config_fields
from ownpath.quantize.steps import Convert, QuantizeScope, WriteStep, plan_shards, plan_steps

STAGING = ".quantizing"
PLAN, CONFIG, QUANT_CONFIG = "plan.json", "config.json", "hf_quant_config.json"
VERSION = 1
"""Version of a step's output: a run does not continue from the shards of another version."""

ShowProgress = Callable[[int, int, int], None]


@dataclass(frozen=True)
class Options:
    """Settings of a run. input_scales: of calibrated weights, by module."""

    scope: QuantizeScope = QuantizeScope.EXPERTS
    max_shard_bytes: int = 4 * 10**9
    input_scales: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Shard:
    """A finished shard: tensor names with their bytes, and counts of its conversions."""

    tensors: dict[str, int]
    counts: Counts


@dataclass(frozen=True)
class QuantizeReport:
    """Totals of a finished run."""

    num_shards: int
    num_bytes: int
    num_converted: int
    counts: Counts


def quantize_checkpoint(
    source: Path, target: Path, options: Options, show: ShowProgress | None = None
) -> QuantizeReport:
    """Quantises ``source`` into ``target``, or continues an interrupted run.

    show: called with (finished shards, all shards, bytes read and written so far).
    Memory: one shard. Errors: CheckpointError or ConfigError naming the file, field or tensor; ``target`` is then not a
    checkpoint, and finished shards are kept.
    """
    require_free(target)
    config = ModelConfig.from_file(source / CONFIG)
    index = CheckpointIndex.open(source)
    steps = plan_steps(index, config, options.scope)
    shards = plan_shards(steps, options.max_shard_bytes)
    staging = _open_staging(target, _plan(index, options))
    done: list[Shard] = []
    for number, shard in enumerate(shards):
        done.append(_find_finished(staging, number) or _make_shard(staging / str(number), shard, index, options))
        if show:
            show(len(done), len(shards), sum(sum(one.tensors.values()) for one in done))
    converts = [step for step in steps if isinstance(step, Convert)]
    _finish(source, target, done, (options.scope, converts))
    num_bytes = sum(sum(shard.tensors.values()) for shard in done)
    num_converted = sum(len(convert.modules) for convert in converts)
    return QuantizeReport(len(done), num_bytes, num_converted, sum((shard.counts for shard in done), Counts()))


def require_free(target: Path) -> None:
    """Refuses a target that holds a checkpoint. Errors: CheckpointError."""
    for name in (INDEX_NAME, CONFIG, "model.safetensors"):
        if (target / name).exists() and not (target / STAGING / PLAN).exists():
            raise CheckpointError(f"{target / name} exists; a checkpoint is never overwritten")


def _plan(index: CheckpointIndex, options: Options) -> dict[str, object]:
    """Returns all inputs that decide the bytes of the result."""
    files = sorted({info.file for info in index.tensors.values()})
    files.append(index.folder / CONFIG)
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    digests = {
        name: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
        for name, value in (("source", facts), ("input_scales", dict(options.input_scales)))
    }
    settings = {"version": VERSION, "scope": options.scope.value, "max_shard_bytes": options.max_shard_bytes}
    return {**settings, **digests}


def _open_staging(target: Path, plan: dict[str, object]) -> Path:
    """Opens the folder for shards. Errors: CheckpointError where an unfinished run with other inputs is."""
    staging = target / STAGING
    staging.mkdir(parents=True, exist_ok=True)
    if not (staging / PLAN).exists():
        _write_json(staging / PLAN, plan)
    elif json.loads((staging / PLAN).read_text(encoding="utf-8")) != plan:
        raise CheckpointError(f"{staging} holds an unfinished run of another source or other options: delete it first")
    return staging


def _find_finished(staging: Path, number: int) -> Shard | None:
    """Returns an earlier run's shard if its note, which is written after its data, exists."""
    note = staging / f"{number}.json"
    if not note.exists():
        return None
    fields = json.loads(note.read_text(encoding="utf-8"))
    return Shard(fields["tensors"], Counts(**fields["counts"]))


def _make_shard(stem: Path, steps: Sequence[WriteStep], index: CheckpointIndex, options: Options) -> Shard:
    tensors: dict[str, torch.Tensor] = {}
    counts = Counts()
    with TensorReader(index) as read:
        for step in steps:
            made, counted = step_tensors(step, read, options.input_scales)
            tensors |= made
            counts += counted
    scratch = stem.with_suffix(".tmp")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, scratch, metadata={"format": "pt"})
    scratch.replace(stem.with_suffix(".safetensors"))
    shard = Shard({name: tensor.nbytes for name, tensor in tensors.items()}, counts)
    _write_json(stem.with_suffix(".json"), {"tensors": shard.tensors, "counts": asdict(counts)})
    return shard


def _finish(source: Path, target: Path, shards: Sequence[Shard], what: tuple[QuantizeScope, list[Convert]]) -> None:
    """Renames the shards, writes the config files and, last, the index."""
    staging = target / STAGING
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
    """Returns the tokenizer's and other files beside the weights, without those that describe the source's weights."""
    written = {INDEX_NAME, CONFIG, QUANT_CONFIG}
    return [
        path
        for path in sorted(source.iterdir())
        if path.is_file() and path.suffix != ".safetensors" and path.name not in written
    ]


def _write_json(path: Path, fields: dict[str, object]) -> None:
    """Writes JSON atomically: a reader sees all of it or nothing."""
    scratch = path.with_suffix(".writing")
    scratch.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
    scratch.replace(path)
