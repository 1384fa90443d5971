"""Decides how a module is stored, and says everything that is wrong where no encoding fits. Decided here and only here.

The plan stops at the first fault, an inspection collects all: both get them from ``examine``.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.names import BESIDE_WEIGHTS
from ownpath.checkpoint.needless import needless_reason
from ownpath.checkpoint.schema import ENCODINGS, Encoding, ModuleSpec, PartSpec
from ownpath.checkpoint.spelling import BYTE_SCALES, BYTES
from ownpath.checkpoint.tensor_info import TensorInfo


@dataclass(frozen=True)
class StorageFault:
    """One thing that is wrong with a module's tensors. check: the name of a problem; where: the tensor or module."""

    check: str
    where: str
    message: str


@dataclass(frozen=True)
class Examined:
    """A module's nearest encoding, without the input scale where there is none to read, and what does not fit it."""

    encoding: Encoding
    faults: tuple[StorageFault, ...]


def detect(index: CheckpointIndex, module: ModuleSpec) -> Encoding:
    """Returns the encoding of ``module``, decided from its tensors' names, dtypes and shapes.

    Errors: CheckpointError naming the tensor that is missing, or that no known encoding has so.
    """
    examined = examine(index, module)
    if examined.faults:
        raise CheckpointError(examined.faults[0].message)
    return examined.encoding


def examine(index: CheckpointIndex, module: ModuleSpec) -> Examined:
    """Finds the nearest encoding of ``module`` and every fault; an input scale of another form counts as absent."""
    nearest = _nearest(index, module)
    faults = tuple(_faults(index, module, nearest.without_input_scale))
    if faults:
        unknown = _unknown_layout(index, module, nearest)
        faults = faults if unknown is None else (unknown,)
    return Examined(nearest if _has_input_scale(index, module, nearest) else nearest.without_input_scale, faults)


def tensors_of(index: CheckpointIndex, module: str) -> list[TensorInfo]:
    """Returns every tensor that is named as a part of ``module``, whether an encoding knows it or not."""
    return [index[f"{module}.{ending}"] for ending in index.endings.get(module, ())]


def _nearest(index: CheckpointIndex, module: ModuleSpec) -> Encoding:
    """Returns the encoding whose weight is there with its dtype and which the module's other tensors differ least from.

    Without such a weight, all encodings are compared: the scales tell which was meant.
    """
    for encoding in ENCODINGS:
        is_there = _has_weight(index, module, encoding)
        if is_there and next(_faults(index, module, encoding.without_input_scale), None) is None:
            return encoding
    having = [encoding for encoding in ENCODINGS if _has_weight(index, module, encoding)]
    return min(having or ENCODINGS, key=lambda encoding: _distance(index, module, encoding))


def _has_weight(index: CheckpointIndex, module: ModuleSpec, encoding: Encoding) -> bool:
    weight = encoding.weight
    info = index.tensors.get(f"{module.name}.{weight.suffix}")
    return info is not None and info.dtype in weight.dtypes


def _distance(index: CheckpointIndex, module: ModuleSpec, encoding: Encoding) -> tuple[int, int]:
    """Returns how much a module's tensors differ from an encoding's, and how many are missing.

    A tensor that is missing or left over, or a wrong dtype, tells more than a shape, which another config.json may
    explain: they count 2 and 1. A format that cannot have the module's width counts 3.
    """
    num_missing, difference = 0, 0 if _fits_width(module, encoding) else 3
    for part in encoding.without_input_scale.parts:
        info = index.tensors.get(f"{module.name}.{part.suffix}")
        if info is None:
            num_missing += 1
        else:
            is_dtype = info.dtype in part.dtypes or (info.dtype in BYTES and bool(BYTE_SCALES & set(part.dtypes)))
            difference += 2 * (not is_dtype) + (info.shape != part.shape(*module.shape))
    own = {part.suffix for part in encoding.parts}
    num_left = sum(
        ending not in own and needless_reason(f"{module.name}.{ending}") is None
        for ending in index.endings.get(module.name, ())
    )
    return difference + 2 * (num_missing + num_left), num_missing


def _fits_width(module: ModuleSpec, encoding: Encoding) -> bool:
    block = encoding.format.block
    return block is None or block[0] > 1 or module.shape[1] % block[1] == 0


def _faults(index: CheckpointIndex, module: ModuleSpec, encoding: Encoding) -> Iterator[StorageFault]:
    if not _fits_width(module, encoding):
        key, width = encoding.key(module.name, "qdata"), encoding.format.block
        assert width is not None, encoding
        yield StorageFault("wrong-shape", key, f"tensor {key!r}: {encoding.format} cannot hold a width of "
                           f"{module.shape[1]}: its blocks are {width[1]} wide")  # fmt: skip
        return
    for part in encoding.parts:
        fault = _part_fault(index, module, encoding, part)
        if fault is not None:
            yield fault


def _part_fault(index: CheckpointIndex, module: ModuleSpec, encoding: Encoding, part: PartSpec) -> StorageFault | None:
    key = f"{module.name}.{part.suffix}"
    info = index.tensors.get(key)
    if info is None:
        message = f"{index.folder}: tensor {key!r} is missing ({encoding.name} stores it)"
        return StorageFault("missing-tensor", key, message)
    is_spelling = part.role == "scale" and info.dtype in BYTES and BYTE_SCALES & set(part.dtypes)
    if info.dtype not in part.dtypes and not is_spelling:
        return StorageFault("wrong-dtype", key, f"tensor {info}: {encoding.name} stores {' or '.join(part.dtypes)}")
    expected = part.shape(*module.shape)
    if info.shape != expected or is_spelling:  # bytes in this shape would have been read as the scales that they are
        message = f"tensor {info}: a weight {list(module.shape)} needs shape {list(expected)}"
        return StorageFault("wrong-shape", key, message)
    return None


def _unknown_layout(index: CheckpointIndex, module: ModuleSpec, nearest: Encoding) -> StorageFault | None:
    """Returns the one fault of a module in a layout of another kind; ``None``: it is ``nearest``, with faults."""
    found = tensors_of(index, module.name)
    known = {part.suffix for encoding in ENCODINGS for part in encoding.parts}
    weights = [info for info in found if info.name.rpartition(".")[2] in ("weight_packed", "weight")]
    known |= BESIDE_WEIGHTS
    others = [info for info in found if info.name.rpartition(".")[2] not in known and not needless_reason(info.name)]
    if weights and not any(_has_weight(index, module, encoding) for encoding in ENCODINGS):
        known_dtypes = dict.fromkeys(dtype for encoding in ENCODINGS for dtype in encoding.part("qdata").dtypes)
        message = f"tensor {weights[0]}: no known encoding has this dtype (known: {', '.join(known_dtypes)})"
        return StorageFault("wrong-dtype", weights[0].name, message)
    if others:
        listed = ", ".join(f"{info.name.rpartition('.')[2]} ({info.dtype} {list(info.shape)})" for info in found)
        names = " and ".join(repr(info.name.rpartition(".")[2]) for info in others)
        message = f"module {module.name!r} is stored as {listed}: no known encoding has {names}"
        return StorageFault("unknown-encoding", module.name, message)
    if weights and nearest.format.bits == 4 and weights[0].shape == module.shape:
        message = (
            f"tensor {weights[0]}: no known encoding has this dtype and shape: codes of four bits would be "
            f"{list(nearest.part('qdata').shape(*module.shape))}, and integers of eight bits are not read"
        )
        return StorageFault("unknown-encoding", weights[0].name, message)
    return None


def _has_input_scale(index: CheckpointIndex, module: ModuleSpec, encoding: Encoding) -> bool:
    """Returns True if the encoding's input scale is there, as a scalar."""
    part = next((part for part in encoding.parts if part.role == "input_scale"), None)
    return part is not None and _part_fault(index, module, encoding, part) is None
