"""Which runner really ran: one counter per slot, added to on every call."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Ledger:
    """Calls per slot, and the runner and kernel behind each slot."""

    kernels: dict[str, tuple[str, str]] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)

    def watch(self, slot: str, runner_name: str, kernel_name: str, runner: Callable[..., Any]) -> "Watched":
        """Registers a slot; the returned callable counts and runs it."""
        self.kernels[slot] = (runner_name, kernel_name)
        return Watched(slot, runner, self)

    def summary(self) -> list[tuple[str, str, int, int]]:
        """(runner, kernel, modules that ran, calls) for each runner and kernel that ran at least once."""
        modules: Counter[tuple[str, str]] = Counter()
        calls: Counter[tuple[str, str]] = Counter()
        for slot, count in self.calls.items():
            modules[self.kernels[slot]] += 1
            calls[self.kernels[slot]] += count
        return [(*key, modules[key], calls[key]) for key in sorted(modules)]


@dataclass(frozen=True)
class Watched:
    """A runner that tells the ledger of every call."""

    slot: str
    runner: Callable[..., Any]
    ledger: Ledger

    def __call__(self, *args: Any) -> Any:
        self.ledger.calls[self.slot] += 1
        return self.runner(*args)
