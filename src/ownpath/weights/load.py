"""Loads a checkpoint into the planned operands: complete, or an error that names the tensor.

Each destination is written exactly once, from the one tensor planned for it; bytes are copied as bytes, never converted
(a numeric copy of an E8M0 scale would turn 2^-7 into 0). Scales are checked while loading, and a stored divisor becomes
a multiplier.

Several threads (``readers``) read the chunks of each shard (``checkpoint.chunks``) through buffers of bounded size.
Bytes are checked and copied straight to their destinations (``targets``, ``fill``).
"""

from dataclasses import dataclass

import torch

from ownpath.checkpoint.chunks import file_chunks
from ownpath.checkpoint.dtypes import TORCH_DTYPES
from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.reader import stream
from ownpath.checkpoint.tensor_info import TensorInfo
from ownpath.formats import NVFP4
from ownpath.plan.ops import PlannedOp
from ownpath.plan.plan import Plan
from ownpath.weights.draw import draw_targets
from ownpath.weights.fill import Filler, check_expert_ids
from ownpath.weights.lossless import is_lossless_cast
from ownpath.weights.operands import Allocate, Destination, OperandBuffers, make_operand, reserve
from ownpath.weights.readers import LoadProgress, ReadOptions, read_chunks
from ownpath.weights.targets import find_targets


@dataclass(frozen=True)
class LoadedWeights:
    """Operands in the order of ``plan.ops``, and the parameters by key.

    lossless_casts: slots whose NVFP4 weights were cast from MXFP4 without loss (see ``lossless``).
    """

    operands: tuple[OperandBuffers, ...]
    params: dict[str, torch.Tensor]
    lossless_casts: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReservedWeights:
    """Operands and parameters that are allocated and not filled, and what fills them.

    infos: what is to be read, each once. fill: takes its bytes. device: of all buffers.
    """

    plan: Plan
    operands: tuple[OperandBuffers, ...]
    params: dict[str, torch.Tensor]
    infos: tuple[TensorInfo, ...]
    fill: Filler
    device: torch.device

    def finish(self) -> LoadedWeights:
        """Returns the weights. Errors: CheckpointError naming what was not written exactly once, or a bad table."""
        self.fill.finish()
        for key, table in self.params.items():
            if not table.is_floating_point():
                check_expert_ids(key, table, self.plan.config.n_routed_experts)
        pairs = zip(self.plan.ops, self.operands, strict=True)
        casts = [op.spec.slot for op, operand in pairs if _is_cast(op, operand)]
        return LoadedWeights(self.operands, self.params, tuple(dict.fromkeys(casts)))


def reserve_weights(
    plan: Plan, index: CheckpointIndex, device: torch.device, allocate: Allocate = reserve
) -> ReservedWeights:
    """Allocates every operand and parameter of a plan on ``device``. allocate: makes each buffer.

    Errors: CheckpointError naming a tensor that the checkpoint lacks.
    """
    stored = {name: info.dtype for name, info in index.tensors.items()}
    operands = tuple(make_operand(op, stored, device, allocate) for op in plan.ops)
    shapes = {spec.key: spec.shape for spec in plan.params}
    shapes |= {key: region.shape(shapes[key]) for key, region in plan.param_regions.items()}
    dtypes = {spec.key: TORCH_DTYPES[spec.memory_dtype(stored[spec.key])] for spec in plan.params}
    params = {key: allocate(shape, dtypes[key], device) for key, shape in shapes.items()}
    destinations = [destination for operand in operands for destination in operand.destinations]
    destinations += [Destination(key, target, region=plan.param_regions.get(key)) for key, target in params.items()]
    buffers = [buffer for operand in operands for parts in operand.buffers.values() for buffer in parts]
    by_key = {destination.key: destination for destination in destinations}
    if len(by_key) != len(destinations):
        twice = next(destination.key for destination in destinations if by_key[destination.key] is not destination)
        raise CheckpointError(f"tensor {twice!r} is planned into two slots")
    targets = find_targets(destinations, [*buffers, *params.values()], index)
    return ReservedWeights(plan, operands, params, targets.infos, Filler(targets), device)


def load_weights(
    plan: Plan,
    index: CheckpointIndex,
    device: torch.device,
    progress: LoadProgress | None = None,
    read_options: ReadOptions | None = None,
    allocate: Allocate = reserve,
) -> LoadedWeights:
    """Allocates every operand on ``device`` and fills it from the checkpoint, or draws what is stored nowhere.

    progress: called with (bytes loaded, total bytes). read_options: ``None`` for the device's default. allocate: makes
        each buffer.
    Memory: beside the weights, ``ReadOptions.staging_bytes`` and the index, whatever the model's size.
    Errors: CheckpointError naming the tensor for a bad scale, an unreadable shard or a destination left unwritten; the
        first fault in the order of the files.
    """
    room = reserve_weights(plan, index, device, allocate)
    if index.drawn is not None:
        draw_targets(room.fill.targets, index, index.drawn, device, progress)
        return LoadedWeights(room.operands, room.params)
    read_options = read_options or ReadOptions.for_device(device)
    total_bytes = sum(info.num_bytes for info in room.infos)

    def report(num_bytes: int) -> None:
        if progress is not None:
            progress(num_bytes, total_bytes)

    read_chunks(file_chunks(room.infos, read_options.chunk_bytes), room.fill, read_options, device, report)
    return room.finish()


def find_lossless_casts(plan: Plan, index: CheckpointIndex) -> tuple[str, ...]:
    """Returns slots whose NVFP4 weights were cast from MXFP4 without loss. Reads scales alone, no weights."""
    return tuple(dict.fromkeys(op.spec.slot for op in plan.ops if _is_stored_cast(op, index)))


def _is_stored_cast(op: PlannedOp, index: CheckpointIndex) -> bool:
    if op.encoding.format is not NVFP4:
        return False
    for module in op.spec.modules:
        keys = [op.encoding.key(module.name, role) for role in ("scale", "global_scale")]
        meant = op.encoding.part("global_scale").meant
        parts: dict[str, list[torch.Tensor]] = {key: [] for key in keys}
        for part in stream(index, keys):
            parts[part.info.name].append(part.data)
        ((global_scale,), scales) = parts[keys[1]], parts[keys[0]]
        if not all(is_lossless_cast(scale, meant(global_scale)) for scale in scales):
            return False
    return True


def _is_cast(op: PlannedOp, operand: OperandBuffers) -> bool:
    """Returns True if all of an op's matrices are NVFP4 cast from MXFP4 without loss."""
    if op.encoding.format is not NVFP4:
        return False
    pairs = (("weight_scale", "weight_scale_2"), ("w13_scale", "w13_scale_2"), ("w2_scale", "w2_scale_2"))
    buffers = operand.buffers
    present = [(buffers[scale], buffers[global_scale]) for scale, global_scale in pairs if scale in buffers]
    return all(is_lossless_cast(s, g) for scales, globals_ in present for s, g in zip(scales, globals_, strict=True))
