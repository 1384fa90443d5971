"""Fills planned operands from whole tensors that another program reads, in any order, as the loader does from shards.

The index says where each planned tensor lies in what the other reads, so that names, dtypes and cuts are the loader's
own: a tensor is taken by its name in the file, and what is not planned of it is not copied. Every value is checked on
the way (``fill``).
"""

from collections import Counter
from typing import Any

import torch

from ownpath.checkpoint.chunks import Bytes, FileChunk, Piece
from ownpath.checkpoint.dtypes import TORCH_DTYPES
from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.tensor_info import TensorInfo
from ownpath.plan.plan import Plan
from ownpath.weights.fill import check_expert_ids, check_finite
from ownpath.weights.load import LoadedWeights, reserve_weights


def file_key(info: TensorInfo) -> str:
    """Returns the name that a tensor, or the one it is a part of, has in its file."""
    return info.name if info.source is None else info.source.key


def check_given(info: TensorInfo, tensor: torch.Tensor, num_experts: int) -> None:
    """Checks a parameter or an unquantised weight that somebody else takes.

    Errors: CheckpointError naming a tensor that holds NaN or infinity, or a table that names no expert.
    """
    data = given_bytes(tensor)
    check_finite(Piece(info, 0, 0, data.size), data)
    if tensor.dtype in (torch.int32, torch.int64):
        check_expert_ids(info.name, tensor, num_experts)


def given_bytes(tensor: torch.Tensor) -> Bytes:
    """Returns a tensor's bytes in host memory."""
    data: Bytes = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return data


class GivenBytes:
    """Staging of bytes that someone else has read."""

    def __init__(self, data: Bytes) -> None:
        self._data = data

    def next_buffer(self) -> Bytes:
        """Returns the bytes."""
        return self._data

    def copy(self, start: int, stop: int, flat: Any, first: int) -> None:
        """See ``Staging``."""
        self.write(torch.from_numpy(self._data[start:stop]), flat, first)

    def write(self, values: torch.Tensor, flat: Any, first: int) -> None:
        """See ``Staging``."""
        place, given = flat[first : first + values.nbytes], values.view(torch.uint8)
        if isinstance(place, torch.Tensor):
            place.copy_(given)
        else:
            place[:] = given.numpy()

    def close(self) -> None:
        """Does nothing: no copy is pending."""


class Feed:
    """Takes the tensors of one plan, each once, from whoever reads them; then ``finish``.

    device: of the operands. Tensors may be on any device; those that are not in host memory are copied there first.
    """

    def __init__(self, plan: Plan, index: CheckpointIndex, device: torch.device) -> None:
        self._reserved = reserve_weights(plan, index, device)
        self._wanted: dict[str, list[TensorInfo]] = {}
        for info in self._reserved.infos:
            self._wanted.setdefault(file_key(info), []).append(info)
        self._num_bytes, self._starts = Counter[str](), dict[str, int]()
        for info in index.tensors.values():
            key = file_key(info)
            if key in self._wanted:
                self._num_bytes[key] += info.num_bytes
                self._starts[key] = min(info.start, self._starts.get(key, info.start))
        self._missing = dict.fromkeys(self._wanted)

    def wants(self, key: str) -> bool:
        """Returns True if something of the tensor that has this name in its file is planned."""
        return key in self._wanted

    def take(self, key: str, tensor: torch.Tensor) -> None:
        """Checks a tensor and copies what is planned of it.

        Errors: CheckpointError naming the tensor: given twice, not as its header says, or with a bad value.
        """
        infos = self._wanted[key]
        if key not in self._missing:
            raise CheckpointError(f"tensor {key!r} was given twice")
        del self._missing[key]
        self._check(key, tensor)
        data = given_bytes(tensor)
        for info in infos:
            first = info.start - self._starts[key]
            part = data[first : first + info.num_bytes]
            target = self._reserved.fill.targets.matrices.get(info.name)
            if target is not None and not target.is_one_stretch:
                part = part.copy()  # its columns are joined in place, and the bytes are somebody else's
            chunk = FileChunk(info.file, info.start, part.size, (Piece(info, 0, 0, part.size),))
            self._reserved.fill(chunk, part, GivenBytes(part))

    def _check(self, key: str, tensor: torch.Tensor) -> None:
        info = self._wanted[key][0]
        stored = TORCH_DTYPES.get(info.header.partition(" ")[0] or info.dtype, tensor.dtype)
        if tensor.nbytes != self._num_bytes[key] or tensor.dtype != stored:
            given = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            raise CheckpointError(f"tensor {info}: given as {given}, not as its header says")

    def finish(self) -> LoadedWeights:
        """Returns the filled operands. Errors: CheckpointError naming a tensor that was not given."""
        for key in self._missing:
            info = self._wanted[key][0]
            raise CheckpointError(f"tensor {info} was not given; {len(self._missing)} planned tensors were not")
        return self._reserved.finish()
