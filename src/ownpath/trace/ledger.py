"""The ledger: how often each planned slot was called, what runs there, and who else watches."""

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from ownpath.trace.observers import AnyObserver, Observers, Tap, Watched
from ownpath.trace.uses import Use, use_of


@dataclass
class Ledger:
    """Calls per slot, beside the runner and the kernel that the plan names for it.

    uses: what the callable behind each slot is, by its own account. The callable itself is not held: a layer that is
        dropped must be gone at once.
    """

    kernels: dict[str, tuple[str, str]]
    calls: Counter[str] = field(default_factory=Counter)
    uses: dict[str, Use] = field(default_factory=dict)
    observers: Observers = field(default_factory=Observers)

    def watch(self, slot: str, runner: Callable[..., Any]) -> Watched:
        """A callable that counts and runs; the slot must be one of the plan."""
        assert slot in self.kernels, f"{slot} is not planned"
        self.uses[slot] = use_of(runner)
        return Watched(slot, runner, self.calls, self.observers)

    def tap(self, name: str) -> Tap:
        """A place of the forward whose value observers see."""
        return Tap(name, self.observers)

    def observe(self, observer: AnyObserver) -> AbstractContextManager[AnyObserver]:
        """Attaches an observer for the length of a ``with`` block."""
        return self.observers.during(observer)

    def clear(self) -> None:
        """Clears counts and records. Observers stay attached."""
        self.calls.clear()
        for observer in self.observers.attached:
            observer.clear()

    def summary(self) -> list[tuple[str, str, int, int]]:
        """(runner, kernel, modules that ran, calls) for each runner and kernel that ran at least once."""
        modules: Counter[tuple[str, str]] = Counter()
        calls: Counter[tuple[str, str]] = Counter()
        for slot, count in self.calls.items():
            modules[self.kernels[slot]] += 1
            calls[self.kernels[slot]] += count
        return [(*key, modules[key], calls[key]) for key in sorted(modules)]
