"""Index scores that are not finite, read after a step: the layers flag rows on the device, and the requests are told.

A step that draws no token is not waited for, so its flags are read with those of a later step.
"""

from collections.abc import Sequence

import torch

from ownpath.cache.tables import StepTables, first_flagged
from ownpath.engine.request import Request


class IndexFlags:
    """The flags of steps that have not been read yet."""

    def __init__(self) -> None:
        self._unread: list[tuple[torch.Tensor, list[Request]]] = []

    def note(self, tables: StepTables, requests: Sequence[Request]) -> None:
        """Keeps the flags of a step of these requests."""
        pairs = zip(requests, tables.rows, strict=True)
        owners = [request for request, rows in pairs for _ in range(rows.start, rows.stop)]
        self._unread.append((tables.flags_LT, owners))

    def read(self) -> None:
        """Tells the requests of all steps so far. Waits for the device."""
        for flags_LT, owners in self._unread:
            tell_flagged(first_flagged(flags_LT.numpy(force=True)), owners)
        self._unread.clear()


def tell_flagged(layer_of: dict[int, int], owners: Sequence[Request]) -> None:
    """Notes the first flagged layer in the requests that own these rows."""
    for row, layer_idx in layer_of.items():
        if owners[row].flagged_layer is None:
            owners[row].flagged_layer = layer_idx
