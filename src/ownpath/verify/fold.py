"""Folds the same fault of many layers into one line: the layers, then the message."""

import re
from collections.abc import Iterable

from ownpath.plan.show import ranges

_LAYER = re.compile(r"(layers|mtp)\.(\d+)\.(.*)")


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
