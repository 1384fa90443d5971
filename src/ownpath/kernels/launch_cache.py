"""A cache of prepared launches for the sizes of calls that a kernel has seen."""

from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Prepared = TypeVar("Prepared")
MAX_LAUNCHES = 512
"""Sizes of calls that an operand keeps: prompts come in any length, so the cache needs a limit."""


class LaunchCache(dict[Key, Prepared], Generic[Key, Prepared]):
    """Prepared launches by key. A full cache is cleared."""

    def add(self, key: Key, launch: Prepared) -> Prepared:
        """Adds a prepared launch and returns it."""
        if len(self) >= MAX_LAUNCHES:
            self.clear()
        self[key] = launch
        return launch
