"""Index scores that are not finite, read after a step: the layers flag rows on the device, and the requests are told.

A step that draws no token is not waited for, so its flags are read with those of a later step.
"""

from bisect import bisect_right
from collections.abc import Sequence

from ownpath.cache.tables import StepTables, first_flagged
from ownpath.engine.request import Request


class IndexFlags:
    """The flags of steps that have not been read yet."""

    def __init__(self) -> None:
        self._unread: list[tuple[StepTables, Sequence[Request]]] = []

    def note(self, tables: StepTables, requests: Sequence[Request]) -> None:
        """Keeps the flags of a step of these requests."""
        self._unread.append((tables, requests))

    def read(self) -> None:
        """Tells the requests of all steps so far. Waits for the device."""
        for tables, requests in self._unread:
            if bool(tables.flags_LT.any()):  # seldom: only then are they worth a transfer
                for row, layer_idx in first_flagged(tables.flags_LT.numpy(force=True)).items():
                    _tell(requests[bisect_right(tables.row_ends, row)], layer_idx)
        self._unread.clear()


def tell_flagged(layer_of: dict[int, int], requests: Sequence[Request]) -> None:
    """Tells the requests of a decode step, which have one row each."""
    for row, layer_idx in layer_of.items():
        _tell(requests[row], layer_idx)


def _tell(request: Request, layer_idx: int) -> None:
    """Notes the first layer that a request hears of."""
    if request.flagged_layer is None:
        request.flagged_layer = layer_idx
