"""Draws the weights of a checkpoint that is stored nowhere straight into the planned operands, this rank's part alone.

Nothing is read or exists twice: beside the operands there is memory for a few tensors at a time.
"""

import time
from collections.abc import Iterator, Sequence

import torch

from ownpath.checkpoint.drawn import DrawnValues
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.tensor_info import TensorInfo
from ownpath.plan.sharding import Region
from ownpath.terminal.console import tell
from ownpath.weights.readers import LoadProgress
from ownpath.weights.targets import CopyTarget, CopyTargets

BATCH_BYTES = 2**26
"""Of tensors that are drawn together; their words take three times as much for a moment."""
TOLD_BYTES = 10**9
"""The least that is worth a line."""


def draw_targets(
    targets: CopyTargets,
    index: CheckpointIndex,
    drawn: DrawnValues,
    device: torch.device,
    progress: LoadProgress | None = None,
) -> None:
    """Fills every destination of a plan on ``device``, and tells how long much of it took.

    progress: called with (bytes drawn, total bytes).
    """
    progress, start = progress or (lambda *_: None), time.perf_counter()
    done, total = 0, sum(target.destination.target.nbytes for target in targets.matrices.values())
    for batch in _batches(list(targets.matrices.values())):
        progress(done, total)
        _draw(batch, index, drawn)
        done += sum(target.destination.target.nbytes for target in batch)
    stored = drawn.scalars([index[key] for key in targets.scalars])  # in the order of their numbers
    for scalars in targets.buffers:
        scalars.fill(stored)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    progress(total, total)
    if total >= TOLD_BYTES:
        tell(f"weights drawn: {total / 1e9:.2f} GB on {device} in {time.perf_counter() - start:.1f} s")


def _batches(targets: Sequence[CopyTarget]) -> Iterator[list[CopyTarget]]:
    """Groups targets that follow each other in a buffer and are alike, up to ``BATCH_BYTES``."""
    batch: list[CopyTarget] = []
    num_bytes = 0
    for target in targets:
        size = target.destination.target.nbytes
        if batch and (num_bytes + size > BATCH_BYTES or not _are_alike(batch[-1], target)):
            yield batch
            batch, num_bytes = [], 0
        batch.append(target)
        num_bytes += size
    if batch:
        yield batch


def _are_alike(before: CopyTarget, target: CopyTarget) -> bool:
    """Returns True if one drawing makes both: experts' matrices of one kind."""
    one, other = before.destination, target.destination
    follows = before.first + one.target.nbytes == target.first and before.flat is target.flat
    same = before.info.shape == target.info.shape and before.info.dtype == target.info.dtype
    return follows and same and one.region == other.region and one.part is not None and one.part is other.part


def _draw(batch: Sequence[CopyTarget], index: CheckpointIndex, drawn: DrawnValues) -> None:
    """Draws tensors that are alike, in parts of some rows if they are large."""
    first, destination = batch[0], batch[0].destination
    infos, memory = [index[target.destination.key] for target in batch], destination.target
    rows, columns = _part(infos[0], destination.region)
    num_rows = len(rows)
    step = num_rows if len(batch) > 1 else max(1, num_rows * BATCH_BYTES // max(memory.nbytes, BATCH_BYTES))
    flat = torch.as_tensor(first.flat)
    for start in range(0, num_rows, step):
        part = drawn.parts(infos, rows[start : start + step], columns, memory.device)
        values = (part if first.widened is None else part.to(memory.dtype)).contiguous().view(-1).view(torch.uint8)
        at = first.first + start * (memory.nbytes // num_rows)
        flat[at : at + values.nbytes].copy_(values)


def _part(info: TensorInfo, region: Region | None) -> tuple[range, range]:
    """Returns the rows and columns that are wanted of a tensor."""
    num_rows = info.shape[0] if info.shape else 1
    num_columns = info.shape[1] if len(info.shape) == 2 else 1
    whole = range(num_rows), range(num_columns)
    if region is None:
        return whole
    wanted = range(region.start, region.stop)
    return (wanted, whole[1]) if region.dim == 0 else (whole[0], wanted)
