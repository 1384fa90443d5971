"""Records a model's calls: for each slot one record per distinct signature, with a count.

Shapes and dtypes are compared on every call; runner, kernel and variant are looked up when a signature is new. A slot
keeps at most ``max_per_slot`` records; calls with further signatures are counted together.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass

import torch

from ownpath.trace.observers import CallArguments, Observer, Watched
from ownpath.trace.uses import Use, use_of, variant_of

MAX_PER_SLOT = 32
_Signature = tuple[tuple[torch.Size, torch.dtype], ...]


@dataclass(frozen=True)
class Record:
    """Calls of one slot with the same signature.

    variant: the variants that were launched; for a kernel without variants, the path of its implementation.
    arguments, results: their tensors in order, such as ``bfloat16[3, 256]``. num_calls: number of such calls.
    """

    slot: str
    use: Use
    variant: str
    arguments: tuple[str, ...]
    results: tuple[str, ...]
    num_calls: int


@dataclass
class _RecordCount:
    use: Use
    variant: str
    num_calls: int = 0


class Records(Observer):
    """An observer that records the distinct calls of every slot. One thread adds; any thread may read."""

    def __init__(self, max_per_slot: int = MAX_PER_SLOT) -> None:
        self._max_per_slot = max_per_slot
        self._entries: dict[str, dict[tuple[_Signature, _Signature], _RecordCount]] = defaultdict(dict)
        self._unlisted: Counter[str] = Counter()

    def after(self, call: Watched, args: CallArguments, result: object) -> None:
        """Counts one call."""
        key = signature(args), signature((result,))
        entries = self._entries[call.slot]
        entry = entries.get(key)
        if entry is None:
            if len(entries) >= self._max_per_slot:
                self._unlisted[call.slot] += 1
                return
            entry = entries[key] = _RecordCount(use_of(call.runner), variant_of(call.runner, args))
        entry.num_calls += 1

    def listed(self, slot: str) -> list[Record]:
        """Returns one slot's records, in the order in which they were first seen."""
        # Copied in one step: the thread that runs the model may add meanwhile.
        found = list(self._entries.get(slot, {}).items())
        return [
            Record(slot, entry.use, entry.variant, _spell(args), _spell(results), entry.num_calls)
            for (args, results), entry in found
        ]

    def __iter__(self) -> Iterator[Record]:
        for slot in list(self._entries):
            yield from self.listed(slot)

    def num_unlisted(self, slot: str) -> int:
        """Returns the number of calls that did not fit into the slot's records."""
        return self._unlisted[slot]

    def clear(self) -> None:
        """Clears all records."""
        self._entries.clear()
        self._unlisted.clear()


def signature(values: Iterable[object]) -> _Signature:
    """Returns shape and dtype of every tensor among the values, also inside tuples, lists and dataclasses, in order."""
    found: list[tuple[torch.Size, torch.dtype]] = []
    _collect(values, found)
    return tuple(found)


def _collect(values: Iterable[object], found: list[tuple[torch.Size, torch.dtype]]) -> None:
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append((value.shape, value.dtype))
        elif isinstance(value, (tuple, list)):
            _collect(value, found)
        elif is_dataclass(value):
            _collect((getattr(value, field.name) for field in fields(value)), found)


def _spell(tensors: _Signature) -> tuple[str, ...]:
    return tuple(f"{str(dtype).removeprefix('torch.')}{list(shape)}" for shape, dtype in tensors)
