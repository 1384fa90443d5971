"""What a kernel keeps of the calls that it has seen: launches with everything in place, by what tells calls apart."""

from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Prepared = TypeVar("Prepared")
MAX_LAUNCHES = 512
"""Distinct sizes that an operand keeps; prompts come in any length, so that there is no end to them."""


class LaunchCache(dict[Key, Prepared], Generic[Key, Prepared]):
    """Launches by key. When it is full it starts anew."""

    def add(self, key: Key, launch: Prepared) -> Prepared:
        """Adds a call and returns it."""
        if len(self) >= MAX_LAUNCHES:
            self.clear()
        self[key] = launch
        return launch
