"""What one layer of the engine computed in a run, by the names that the reference has for the same values.

A slot's result goes under the slot's name; a boundary's streams and normed input under ``<slot>.x`` and ``.h``; the
router's under ``.ids`` and ``.weights``. What lies between slots is seen where attention takes it: rotated queries and
keys, and which compressed entries each query saw.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from ownpath.kernels.hyper.ref import HyperOut
from ownpath.model.attention import Projected
from ownpath.runners import SharedKeyAttention


@dataclass
class SoftmaxTap:
    """A layer's softmax; while ``visible`` is a list, each call's mask is added to it."""

    softmax: SharedKeyAttention
    visible: list[torch.Tensor] | None = None

    def __call__(self, q_tNH: torch.Tensor, keys_KH: torch.Tensor, visible_tK: torch.Tensor) -> torch.Tensor:
        if self.visible is not None:
            self.visible.append(visible_tK)
        return self.softmax(q_tNH, keys_KH, visible_tK)


@dataclass
class Record:
    """Told of every call of a layer's slots in one or more steps.

    parts: rows in the order of the calls. dtypes: first input's and first output's, by slot. visible: attention's
    masks, one for each span and step. ends: how many tokens the span's sequence had after each.
    """

    parts: dict[str, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))
    dtypes: dict[str, tuple[str, str]] = field(default_factory=dict)
    visible: list[torch.Tensor] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    def __call__(self, slot: str, args: tuple[Any, ...], result: Any) -> None:
        if isinstance(result, HyperOut):
            values = {"x": result.x_TSD, "h": result.h_TD}
        elif isinstance(result, tuple):
            values = {"ids": result[0], "weights": result[1]}
        else:
            values = {"": result}
        for name, value in values.items():
            self.parts[f"{slot}.{name}" if name else slot].append(value)
        taken = args[0].q_TNH if isinstance(args[0], Projected) else args[0]
        self.dtypes[slot] = _name(taken), _name(list(values.values())[-1])
        if slot.endswith(".key_quantizer"):
            self.parts[f"{slot}.in"].append(args[0])
        if isinstance(args[0], Projected):
            self._see_attention(slot.removesuffix(".core"), args[0], args[1])

    def _see_attention(self, attn: str, projected: Projected, span: Any) -> None:
        rows = slice(span.start, span.stop)
        self.ends.append(span.position + span.stop - span.start)
        self.parts[f"{attn}.q"].append(projected.q_TNH[rows])
        self.parts[f"{attn}.kv"].append(projected.kv_TH[rows])
        if projected.index_q_TIH is not None and projected.index_weights_TI is not None:
            self.parts[f"{attn}.indexer.q"].append(projected.index_q_TIH[rows])
            self.parts[f"{attn}.indexer.weights"].append(projected.index_weights_TI[rows])

    def value(self, name: str) -> torch.Tensor:
        """All rows of a value."""
        found = self.parts[name]
        return found[0] if len(found) == 1 else torch.cat(found)

    def values(self) -> dict[str, torch.Tensor]:
        """All rows of every value."""
        return {name: self.value(name) for name in self.parts}

    def of_span(self, span_idx: int, rows: slice) -> "Record":
        """One sequence's share of a single step's record."""
        num_spans = len(self.visible)
        per_span = {name: len(found) == num_spans and num_spans > 1 for name, found in self.parts.items()}
        parts = {n: [found[span_idx] if per_span[n] else found[0][rows]] for n, found in self.parts.items()}
        return Record(parts, self.dtypes, [self.visible[span_idx]], [self.ends[span_idx]])

    def index_mask(self, ratio: int, num_entries: int) -> torch.Tensor:
        """Which compressed entries each row saw [T, C]: a mask's last columns, behind those of the window's keys."""
        masks = [mask[:, mask.shape[1] - end // ratio :] for mask, end in zip(self.visible, self.ends, strict=True)]
        return torch.cat([F.pad(mask, (0, num_entries - mask.shape[1])) for mask in masks])


def _name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
