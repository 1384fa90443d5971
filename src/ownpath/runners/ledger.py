"""Which runner really ran: one counter per slot, added to on every call."""

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from ownpath.runners.records import Records
from ownpath.runners.uses import Use, use_of


@dataclass
class Ledger:
    """Calls per slot, beside the runner and the kernel that the plan names for it.

    mark: entered around every call, with the slot's name; a recorder of launched kernels puts its own here.
    see: told of every call before it runs, with the slot's name and the arguments; a calibration puts its own here.
    saw: told of every call after it ran, with the slot's name, the arguments and the result; a proof puts its own here.
    records: what calls looked like, for whoever asked for it; ``None`` costs a call nothing but this question.
    uses: what the callable behind each slot really is, by its own account. Not the callable: runners hold ledgers, and
        a layer that is dropped must be gone at once.
    """

    kernels: dict[str, tuple[str, str]]
    calls: Counter[str] = field(default_factory=Counter)
    mark: Callable[[str], AbstractContextManager[object]] = nullcontext
    see: Callable[[str, tuple[Any, ...]], None] | None = None
    saw: Callable[[str, tuple[Any, ...], Any], None] | None = None
    records: Records | None = None
    uses: dict[str, Use] = field(default_factory=dict)

    def watch(self, slot: str, runner: Callable[..., Any]) -> "Watched":
        """A callable that counts and runs; the slot must be one of the plan."""
        assert slot in self.kernels, f"{slot} is not planned"
        self.uses[slot] = use_of(runner)
        return Watched(slot, runner, self)

    def clear(self) -> None:
        """Starts anew: no calls, no records. Who listens goes on listening."""
        self.calls.clear()
        if self.records is not None:
            self.records.clear()

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
        if self.ledger.see:
            self.ledger.see(self.slot, args)
        with self.ledger.mark(self.slot):
            result = self.runner(*args)
        if self.ledger.saw:
            self.ledger.saw(self.slot, args, result)
        records = self.ledger.records  # once: a server's thread may take it away meanwhile
        if records is not None:
            records.add(self.slot, self.runner, args, result)
        return result
