"""Writes the quantised checkpoint shard by shard, so that an interrupted run can continue.

Shards are written to ``.quantizing`` inside the target, each with a note of its contents; the next run finds them there
and continues. When all are done the target gets its other files and, last, its index: before that, no loader takes it
for a checkpoint. Every file is on the disk before the index appears.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.index import SINGLE_NAME, CheckpointIndex
from ownpath.checkpoint.reader import TensorReader
from ownpath.checkpoint.schema import MODELOPT_NVFP4
from ownpath.checkpoint.writer import INDEX_NAME
from ownpath.config import ModelConfig
from ownpath.files import is_present, read_json_object, write_json
from ownpath.quantize.companions import CONFIG, QUANT_CONFIG, Companion, copy_companions, find_companions
from ownpath.quantize.convert import Counts, step_tensors
from ownpath.quantize.describe import Described, config_fields, describe, quant_config_fields
from ownpath.quantize.staging import Shard, UnfinishedRun, is_unfinished
from ownpath.quantize.steps import Carry, Convert, QuantizeScope, WriteStep, plan_shards, plan_steps

VERSION = 2
"""Version of a step's output: a run does not continue from the shards of another version."""

ShowProgress = Callable[[int, int, int], None]


@dataclass(frozen=True)
class Options:
    """Settings of a run. input_scales: of calibrated weights, by module."""

    scope: QuantizeScope = QuantizeScope.EXPERTS
    max_shard_bytes: int = 4 * 10**9
    input_scales: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class QuantizeReport:
    """Totals of a finished run.

    redone: shards of an earlier run that had changed and were made again. left_out: files that were not copied.
    """

    num_shards: int
    num_bytes: int
    num_converted: int
    counts: Counts
    redone: tuple[str, ...] = ()
    left_out: tuple[Companion, ...] = ()


def quantize_checkpoint(
    source: Path, target: Path, options: Options, show: ShowProgress | None = None
) -> QuantizeReport:
    """Quantises ``source`` into ``target``, or continues an interrupted run.

    show: called with (finished shards, all shards, bytes read and written so far).
    Memory: one shard. Errors: CheckpointError, ConfigError or FileError naming the file, field or tensor; ``target`` is
    then not a checkpoint, and finished shards are kept.
    """
    require_free(source, target)
    config = ModelConfig.from_file(source / CONFIG)
    index = CheckpointIndex.open(source)
    steps = plan_steps(index, config, options.scope)
    shards = plan_shards(steps, options.max_shard_bytes)
    plan = _plan(index, options)
    finals = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    staging = UnfinishedRun(target, plan)
    try:
        done: list[Shard] = []
        for number, shard in enumerate(shards):
            earlier = staging.find_finished(number, finals[number], _names(shard))
            done.append(earlier or _make_shard(staging, number, shard, index, options))
            if show:
                show(len(done), len(shards), sum(sum(one.tensors.values()) for one in done))
        if _plan(index, options) != plan:
            raise CheckpointError(f"{source} was changed while it was read: delete {staging.folder} and start again")
        staging.release(finals)
        converts = [step for step in steps if isinstance(step, Convert)]
        contents = describe(index, config, options.scope, converts)
        left_out = _finish(source, staging, dict(zip(finals, done, strict=True)), contents)
    finally:
        staging.close()
    num_bytes = sum(sum(shard.tensors.values()) for shard in done)
    num_converted = sum(len(convert.modules) for convert in converts)
    counts = sum((shard.counts for shard in done), Counts())
    return QuantizeReport(len(done), num_bytes, num_converted, counts, tuple(staging.redone), tuple(left_out))


def require_free(source: Path, target: Path) -> None:
    """Refuses a target that is the source, lies in it, or holds a file that the run would write.

    Errors: CheckpointError.
    """
    if target.is_symlink():
        raise CheckpointError(f"{target}: is a link; give the folder itself, nothing is written through a link")
    if is_present(target) and not target.is_dir():
        raise CheckpointError(f"{target}: is there and no folder")
    there, home = Path(os.path.realpath(target)), Path(os.path.realpath(source))
    if there == home or not is_unfinished(target):
        companions = [one.name for one in find_companions(source)] if source.is_dir() else []
        for name in (INDEX_NAME, CONFIG, QUANT_CONFIG, SINGLE_NAME, *companions):
            if is_present(target / name):
                raise CheckpointError(f"{target / name} exists; a checkpoint is never overwritten")
        for path in sorted(target.glob("*.safetensors")):
            raise CheckpointError(f"{path} exists; a checkpoint is never overwritten")
    if there.is_relative_to(home):
        raise CheckpointError(f"{target}: lies in the source; a checkpoint is written beside it")


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


def _names(steps: Sequence[WriteStep]) -> list[str]:
    """Returns the names of the tensors that the steps write, in their order."""
    return [
        name
        for step in steps
        for name in (
            [step.key]
            if isinstance(step, Carry)
            else [key for module in step.modules for key in MODELOPT_NVFP4.keys(module.name)]
        )
    ]


def _make_shard(
    staging: UnfinishedRun, number: int, steps: Sequence[WriteStep], index: CheckpointIndex, options: Options
) -> Shard:
    tensors: dict[str, torch.Tensor] = {}
    counts = Counts()
    with TensorReader(index) as read:
        for step in steps:
            made, counted = step_tensors(step, read, options.input_scales)
            tensors |= made
            counts += counted
    return staging.write_shard(number, tensors, counts)


def _finish(source: Path, staging: UnfinishedRun, shards: Mapping[str, Shard], contents: Described) -> list[Companion]:
    """Writes everything beside the shards, the index last. Returns the companions that were left out."""
    target, scratch = staging.target, staging.folder
    left_out = copy_companions(source, target, scratch)
    write_json(target / QUANT_CONFIG, quant_config_fields(contents), scratch)
    write_json(target / CONFIG, config_fields(read_json_object(source / CONFIG), contents), scratch)
    weight_map = {name: final for final, shard in shards.items() for name in shard.tensors}
    total_bytes = sum(sum(shard.tensors.values()) for shard in shards.values())
    write_json(target / INDEX_NAME, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}, scratch)
    staging.remove()
    return left_out
