"""Folds the same fault of many layers into one line: the layers, then the message."""

import re
from collections.abc import Iterable

from ownpath.plan.show import ranges

_LAYER = re.compile(r"(layers|mtp)\.(\d+)\.(.*)")
_RUN = r"[0-9]{1,3}(?:-[0-9]{1,3})?"
_FOLDED = re.compile(rf"(layers|mtp)\.\{{({_RUN}(?:,{_RUN}){{0,99}})\}}(.*)")
"""Bounded, since a name from a file may look like it."""


def fold_layers(faults: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Merges (slot, message) pairs that differ in the layer alone: ``layers.{0-4}.ffn.experts``."""
    found: dict[tuple[str, str, str], list[int]] = {}
    for slot, message in faults:
        match = _LAYER.fullmatch(slot)
        key = (match[1], match[3], message) if match else ("", slot, message)
        found.setdefault(key, []).extend([int(match[2])] if match else [])
    return [
        (f"{stack}.{ranges(tuple(sorted(layers)))}.{module}" if layers else module, message)
        for (stack, module, message), layers in found.items()
    ]


def unfold_layers(where: str) -> list[str]:
    """Returns what ``fold_layers`` merged: ``layers.{0-1,4}.ffn`` -> layers.0.ffn, layers.1.ffn, layers.4.ffn."""
    match = _FOLDED.fullmatch(where)
    if not match:
        return [where]
    bounds = (run.partition("-") for run in match[2].split(","))
    layers = {idx for first, _, last in bounds for idx in range(int(first), int(last or first) + 1)}
    return [f"{match[1]}.{idx}{match[3]}" for idx in sorted(layers)]
