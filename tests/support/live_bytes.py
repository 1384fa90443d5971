"""Counts the bytes of tensors that live at once while torch works: every storage from its creation to its release."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class PeakBytes(TorchDispatchMode):
    """``peak``: the most bytes that were alive at once of all that was made inside the ``with``."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        # By address; a weak reference keeps an address from being given to another storage.
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self._given: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in map(torch.Tensor.untyped_storage, _tensors((args, kwargs))):
            if storage._cdata not in self._made:
                self._given.setdefault(storage._cdata, StorageWeakRef(storage))
        result = func(*args, **(kwargs or {}))
        self._made = {key: held for key, held in self._made.items() if not held[0].expired()}
        for storage in map(torch.Tensor.untyped_storage, _tensors(result)):
            if storage._cdata not in self._given:
                self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(num_bytes for _, num_bytes in self._made.values()))
        return result


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
