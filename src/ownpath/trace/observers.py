"""Observers are called for every planned slot's call and for every value that the model taps.

The ledger holds the one list of observers. An observer overrides the methods it needs and must not change the values it
is shown. Without observers, a call costs one check and a tap returns its value.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, TypeVar

from torch import Tensor

CallArguments = tuple[Any, ...]
SlotCallable = Callable[..., Any]
"""A runner, or another callable in its place; each slot has its own signature."""


class Observer:
    """Base class. Calls nest (a router calls its gate): the inner one ends before the outer one."""

    def before(self, call: "Watched", args: CallArguments) -> None:
        """Called before a slot's runner runs."""

    def after(self, call: "Watched", args: CallArguments, result: object) -> None:
        """Called after a slot's runner has returned, not if it raised."""

    def tapped(self, name: str, value: Tensor) -> None:
        """Called when a value passes the tap of this name."""

    def clear(self) -> None:
        """Clears what was recorded."""


AnyObserver = TypeVar("AnyObserver", bound=Observer)


@dataclass
class Observers:
    """The attached observers. Any thread may attach and detach while another runs the model.

    attached: replaced, never changed in place. A call reads it once, so that each observer gets both ``before`` and
        ``after``.
    """

    attached: tuple[Observer, ...] = ()
    _lock: Lock = field(default_factory=Lock, repr=False)

    def attach(self, observer: Observer) -> None:
        """Adds an observer behind the others."""
        with self._lock:
            self.attached = (*self.attached, observer)

    def detach(self, observer: Observer) -> None:
        """Removes an observer, if it is attached."""
        with self._lock:
            self.attached = tuple(other for other in self.attached if other is not observer)

    @contextmanager
    def during(self, observer: AnyObserver) -> Iterator[AnyObserver]:
        """Attaches an observer for a ``with`` block and yields it."""
        self.attach(observer)
        try:
            yield observer
        finally:
            self.detach(observer)


@dataclass(frozen=True)
class Watched:
    """A slot's runner whose calls the ledger counts and observers see."""

    slot: str
    runner: SlotCallable
    calls: Counter[str]
    observers: Observers

    def __call__(self, *args: Any) -> Any:
        self.calls[self.slot] += 1
        observers = self.observers.attached  # once: another thread may attach or detach meanwhile
        if not observers:
            return self.runner(*args)
        for observer in observers:
            observer.before(self, args)
        result = self.runner(*args)
        for observer in reversed(observers):
            observer.after(self, args, result)
        return result


@dataclass(frozen=True)
class Tap:
    """A named place in the forward, such as ``layers.3.attn.q``: shows its value to observers and returns it."""

    name: str
    observers: Observers

    def __call__(self, value: Tensor) -> Tensor:
        for observer in self.observers.attached:
            observer.tapped(self.name, value)
        return value
