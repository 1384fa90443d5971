"""Fits ``max_tokens`` to what the context has left, and remembers what the request asked for differently."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ownpath.server.labels import ADJUSTED_HEADER
from ownpath.server.prompts import Prompt


@dataclass
class Adjustments:
    """Fields of one request that were given another value. refuses_excess: leave the limits as they are.

    values: field -> the value that counts.
    """

    refuses_excess: bool = False
    values: dict[str, object] = field(default_factory=dict)

    def fit(self, name: str | None, wanted: int, prompts: Sequence[Prompt], max_model_len: int) -> list[int]:
        """Returns each prompt's limit on generated tokens; -1 asks for all the room that its prompt leaves.

        name: the field that gave the limit; None for a default, which always shrinks. A limit does not shrink to 0:
        without room for one token the engine refuses the request, with the numbers.
        """
        rooms = [max(max_model_len - len(prompt.ids), 1) for prompt in prompts]
        if wanted == -1:
            return rooms
        if name is not None and self.refuses_excess:
            return [wanted] * len(rooms)
        limits = [min(wanted, room) for room in rooms]
        if name is not None and min(limits) < wanted:
            self.values[name] = min(limits)
        return limits

    def renamed(self, names: Mapping[str, str]) -> "Adjustments":
        """Returns the same under other names of the fields."""
        return Adjustments(self.refuses_excess, {names.get(name, name): it for name, it in self.values.items()})

    def headers(self) -> dict[str, str]:
        """Returns the header that names them with their values; none if there are none."""
        said = ", ".join(f"{name}={value}" for name, value in self.values.items())
        return {ADJUSTED_HEADER: said} if said else {}
