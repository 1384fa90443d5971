"""The ledger: counts the calls of each planned slot, records what runs there, and holds the observers."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

from ownpath.trace.observers import AnyObserver, Observers, SlotCallable, Tap, Watched
from ownpath.trace.uses import Use, use_of


@dataclass
class Ledger:
    """Calls per slot, with the planned runner and kernel.

    uses: runner, kernel and layout of each slot's callable, read from the object. The callable itself is not held, so
        that a dropped layer is freed at once.
    """

    kernels: dict[str, tuple[str, str]]
    calls: Counter[str] = field(default_factory=Counter)
    uses: dict[str, Use] = field(default_factory=dict)
    observers: Observers = field(default_factory=Observers)

    def watch(self, slot: str, runner: SlotCallable) -> Watched:
        """Wraps a runner so that its calls are counted and observed; the slot must be planned."""
        assert slot in self.kernels, f"{slot} is not planned"
        self.uses[slot] = use_of(runner)
        return Watched(slot, runner, self.calls, self.observers)

    def tap(self, name: str) -> Tap:
        """Makes a tap: a named place in the forward whose value observers see."""
        return Tap(name, self.observers)

    def observe(self, observer: AnyObserver) -> AbstractContextManager[AnyObserver]:
        """Attaches an observer for a ``with`` block."""
        return self.observers.during(observer)

    @contextmanager
    def counting_apart(self) -> Iterator[Counter[str]]:
        """Counts the calls of a ``with`` block, such as a step that is captured, in the counter that it yields."""
        before, made = self.calls.copy(), Counter[str]()
        yield made
        made.update(self.calls - before)
        self.calls.clear()
        self.calls.update(before)

    def add(self, calls: Mapping[str, int]) -> None:
        """Counts the calls of a captured step that was replayed."""
        self.calls.update(calls)

    def clear(self) -> None:
        """Clears counts and records. Observers stay attached."""
        self.calls.clear()
        for observer in self.observers.attached:
            observer.clear()

    def summary(self) -> list[tuple[str, str, int, int]]:
        """Returns (runner, kernel, modules that ran, calls) for each runner and kernel that ran at least once."""
        modules: Counter[tuple[str, str]] = Counter()
        calls: Counter[tuple[str, str]] = Counter()
        for slot, count in self.calls.items():
            modules[self.kernels[slot]] += 1
            calls[self.kernels[slot]] += count
        return [(*key, modules[key], calls[key]) for key in sorted(modules)]
