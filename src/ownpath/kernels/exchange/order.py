"""The order of a window's exchanges, by which the epoch of one that was given up tells its name. Pure.

Every exchange of a window counts its epoch up by one, and is launched by the host, alone or in a graph.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

_MOST_REMEMBERED = 4096
_EPOCHS = 1 << 32


@dataclass
class ExchangeOrder:
    """The slots of the exchanges that were launched last. count: of all so far."""

    count: int = 0
    _launched: deque[tuple[int, Sequence[str]]] = field(default_factory=lambda: deque(maxlen=_MOST_REMEMBERED))
    _captured: list[str] = field(default_factory=list)

    def note(self, slot: str, is_captured: bool) -> None:
        """Notes an exchange; one that a graph captures is not launched yet."""
        if is_captured:
            self._captured.append(slot)
        else:
            self.replayed((slot,))

    def take_captured(self) -> Sequence[str]:
        """Returns the exchanges of the graph that was captured last, in its order."""
        captured, self._captured = tuple(self._captured), []
        return captured

    def replayed(self, slots: Sequence[str]) -> None:
        """Notes that exchanges are launched."""
        self.count += len(slots)
        self._launched.append((self.count, slots))

    def slot_of(self, epoch: int) -> str | None:
        """Returns the slot of an epoch, as int32 counts it; ``None`` for one that is long past, or not known here."""
        num_since = (self.count - epoch) % _EPOCHS
        for count, slots in reversed(self._launched):
            first = count - len(slots)
            if self.count - num_since > first:
                at = self.count - num_since - first - 1
                return slots[at] if at < len(slots) else None
        return None
