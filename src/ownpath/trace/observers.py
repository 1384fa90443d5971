"""Observers: told of every planned slot's call and of every value that the model taps.

There is one list of them, held by the ledger. An observer overrides what interests it and changes nothing: what it is
shown goes on as it is. With none attached, a call asks one question and a tap returns its value.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, TypeVar

from torch import Tensor

CallArguments = tuple[Any, ...]


class Observer:
    """Sees a run. Calls nest (a router calls its gate): the inner one ends before the outer one."""

    def before(self, call: "Watched", args: CallArguments) -> None:
        """A slot is about to be called."""

    def after(self, call: "Watched", args: CallArguments, result: Any) -> None:
        """A slot's call has returned; not told where it raised."""

    def tapped(self, name: str, value: Tensor) -> None:
        """A value has passed the tap of this name."""

    def clear(self) -> None:
        """Forgets what was seen."""


AnyObserver = TypeVar("AnyObserver", bound=Observer)


@dataclass
class Observers:
    """The attached observers. Any thread may attach and detach while another runs the model.

    attached: replaced, never changed in place. A call reads it once: whoever was told ``before`` is told ``after``.
    """

    attached: tuple[Observer, ...] = ()
    _lock: Lock = field(default_factory=Lock, repr=False)

    def attach(self, observer: Observer) -> None:
        """Adds one, behind those that are there."""
        with self._lock:
            self.attached = (*self.attached, observer)

    def detach(self, observer: Observer) -> None:
        """Removes one; one that is not attached is no error."""
        with self._lock:
            self.attached = tuple(other for other in self.attached if other is not observer)

    @contextmanager
    def during(self, observer: AnyObserver) -> Iterator[AnyObserver]:
        """Attaches one for the length of a ``with`` block, and gives it."""
        self.attach(observer)
        try:
            yield observer
        finally:
            self.detach(observer)


@dataclass(frozen=True)
class Watched:
    """A slot's runner; the ledger counts its calls and observers see them."""

    slot: str
    runner: Callable[..., Any]
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
    """A named value of the forward, such as ``layers.3.attn.q``: returned as it is, after observers have seen it."""

    name: str
    observers: Observers

    def __call__(self, value: Tensor) -> Tensor:
        for observer in self.observers.attached:
            observer.tapped(self.name, value)
        return value
