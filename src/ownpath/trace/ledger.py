"""The ledger: counts the calls of each planned slot, records what runs there, and holds the observers."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

from ownpath.trace.observers import AnyObserver, Observers, SlotCallable, Tap, Watched
from ownpath.trace.uses import Use, use_of


@dataclass
class CapturedCalls:
    """The calls of a captured step, and how often it was replayed: a thousand slots cost a replay one addition."""

    calls: Mapping[str, int]
    num_replays: int = 0


@dataclass
class Ledger:
    """Calls per slot, with the planned runner and kernel.

    uses: runner, kernel and layout of each slot's callable, read from the object. The callable itself is not held, so
        that a dropped layer is freed at once.
    """

    kernels: dict[str, tuple[str, str]]
    uses: dict[str, Use] = field(default_factory=dict)
    observers: Observers = field(default_factory=Observers)
    _made: Counter[str] = field(default_factory=Counter)
    _captured: list["CapturedCalls"] = field(default_factory=list)

    @property
    def calls(self) -> Counter[str]:
        """Returns the calls of each slot, those of replayed steps included."""
        total = self._made.copy()
        for captured in self._captured:
            total.update({slot: count * captured.num_replays for slot, count in captured.calls.items()})
        return +total

    def watch(self, slot: str, runner: SlotCallable) -> Watched:
        """Wraps a runner so that its calls are counted and observed; the slot must be planned."""
        assert slot in self.kernels, f"{slot} is not planned"
        self.uses[slot] = use_of(runner)
        return Watched(slot, runner, self._made, self.observers)

    def tap(self, name: str) -> Tap:
        """Makes a tap: a named place in the forward whose value observers see."""
        return Tap(name, self.observers)

    def observe(self, observer: AnyObserver) -> AbstractContextManager[AnyObserver]:
        """Attaches an observer for a ``with`` block."""
        return self.observers.during(observer)

    @contextmanager
    def counting_apart(self) -> Iterator[Counter[str]]:
        """Counts the calls of a ``with`` block, such as a step that is captured, in the counter that it yields."""
        before, made = self._made.copy(), Counter[str]()
        yield made
        made.update(self._made - before)
        self._made.clear()
        self._made.update(before)

    def captured(self, calls: Mapping[str, int]) -> "CapturedCalls":
        """Takes in the calls of a captured step, none of which has been made. Each replay counts them all at once."""
        self._captured.append(CapturedCalls(calls))
        return self._captured[-1]

    def clear(self) -> None:
        """Clears counts and records. Observers stay attached."""
        self._made.clear()
        for captured in self._captured:
            captured.num_replays = 0
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
