"""What a kernel keeps of the calls that it has seen: launches with everything in place, by what tells calls apart."""

from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Call = TypeVar("Call")
MAX_CALLS = 512
"""Distinct sizes that an operand keeps; prompts come in any length, so that there is no end to them."""


class Calls(dict[Key, Call], Generic[Key, Call]):
    """Launches by key. When it is full it starts anew."""

    def keep(self, key: Key, call: Call) -> Call:
        """Adds a call and returns it."""
        if len(self) >= MAX_CALLS:
            self.clear()
        self[key] = call
        return call
