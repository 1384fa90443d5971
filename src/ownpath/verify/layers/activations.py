"""Records the values of one layer of the engine, under the reference's names.

A slot's result goes under the slot's name: a boundary's streams and normed input under ``<slot>.x`` and ``.h``, the
router's under ``.ids`` and ``.weights``. Of a slot that joins products, each goes under the name that it has apart.
Values between slots come from the model's taps (``model.taps``).
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from ownpath.ops import OpKind
from ownpath.plan.opspec import CompanionSpec, OpSpec
from ownpath.trace.observers import CallArguments, Observer, Watched
from ownpath.verify.layers.decode_values import decode_values
from ownpath.verify.layers.measure import dtype_name

_RESULTS: Mapping[OpKind, Callable[[Any], dict[str, torch.Tensor]]] = {
    OpKind.HYPER: lambda result: {".x": result.x_TSD, ".h": result.h_TD},
    OpKind.ROUTER: lambda result: {".ids": result[0], ".weights": result[1]},
}
"""Splits the result of slots that return several tensors, by name; the last one has the result's dtype."""
_MASK = ".indexer.mask"
"""The tap that is called once per sequence; all others are called once per step."""


class Activations(Observer):
    """All rows of a layer's values in one or more steps.

    specs: each slot's operation. dtypes: of a slot's first input and of its output.
    """

    def __init__(self, specs: Mapping[str, OpSpec | CompanionSpec]) -> None:
        self.specs = specs
        self.dtypes: dict[str, tuple[str, str]] = {}
        self._parts: dict[str, list[torch.Tensor]] = defaultdict(list)

    def after(self, call: Watched, args: CallArguments, result: Any) -> None:
        slot, spec = call.slot, self.specs[call.slot]
        kind = spec.kind
        if kind.is_of_lines:
            for name, value in decode_values(call, kind, args, result):
                self._parts[name].append(value)
            return
        found = _RESULTS[kind](result) if kind in _RESULTS else {"": result}
        columns = spec.columns if isinstance(spec, OpSpec) else {}
        for part, of_part in columns.items():
            self._parts[part].append(found[""][..., of_part])
        for suffix, value in found.items() if not columns else ():
            self._parts[f"{slot}{suffix}"].append(value)
        taken = args[0].q_TNH if kind is OpKind.ATTENTION else args[0]
        self.dtypes[slot] = dtype_name(taken.dtype), dtype_name(list(found.values())[-1].dtype)
        if kind is OpKind.KEY_QUANTIZER:
            self._parts[f"{slot}.in"].append(taken)

    def tapped(self, name: str, value: torch.Tensor) -> None:
        self._parts[name].append(value)

    def value(self, name: str) -> torch.Tensor:
        """Returns all rows of a value."""
        found = self._parts[name]
        return found[0] if len(found) == 1 else torch.cat(found)

    def values(self) -> dict[str, torch.Tensor]:
        """Returns all rows of every value but the masks, whose widths differ."""
        return {name: self.value(name) for name in self._parts if not name.endswith(_MASK)}

    def of_sequence(self, idx: int, rows: slice) -> "Activations":
        """Returns one sequence's share of a single step."""
        share = Activations(self.specs)
        for name, found in self._parts.items():
            share._parts[name] = [found[idx] if name.endswith(_MASK) else found[0][rows]]
        return share

    def index_mask(self, attn: str, num_entries: int) -> torch.Tensor:
        """Returns the compressed entries that each row of a sequence attends to, bool [T, C]; later steps see more of
        them."""
        masks = self._parts[f"{attn}{_MASK}"]
        return torch.cat([F.pad(mask, (0, num_entries - mask.shape[1])) for mask in masks])
