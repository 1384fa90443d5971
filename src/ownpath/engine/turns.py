"""Whose turn it is to begin: waiting requests, by priority, client and party. Pure bookkeeping.

Requests that were added together (the prompts of one HTTP request) are a party, and parties belong to clients. Of the
waiting requests the next is, in this order:

1. of the lowest priority number;
2. one that has run already and was sent back, the first of them that began;
3. of the client with the fewest running; among such clients, of the one whose last turn is the longest ago;
4. of its parties, of the one with the fewest running, the oldest first.

A party that has its fill of the sequences waits, so that another one can always begin. Example: a client with 100
requests runs 4, as many as there are sequences; then another client sends one. It gets the next sequence that is free.
"""

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ownpath.engine.request import Request


@dataclass(eq=False)
class Party:
    """Requests that were added together. number: its age; the oldest has the lowest."""

    number: int
    client: str
    waiting: deque[Request] = field(default_factory=deque)


class WaitingLine:
    """Requests that wait to begin, or to begin again. most_of_party: running requests that one party may have."""

    def __init__(self, most_of_party: int) -> None:
        self._most_of_party = most_of_party
        self._num_turns = 0
        self._last_turn: dict[str, int] = {}
        self._began: dict[Request, int] = {}
        self._waiting: list[Party] = []

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def join(self, party: Party, requests: Iterable[Request]) -> None:
        """Queues requests of a party behind its others."""
        party.waiting.extend(requests)
        self._enlist(party)

    def rejoin(self, party: Party, request: Request) -> None:
        """Queues a request that has run, in front of all of its priority. Call for the newest first."""
        party.waiting.appendleft(request)
        self._enlist(party)

    def next(self, running: Sequence[Party]) -> tuple[Party, Request] | None:
        """Returns whose turn it is; ``None`` if all that wait belong to parties that have their fill.

        running: the party of each running request.
        """
        of_party, of_client = Counter(running), Counter(party.client for party in running)

        def order(party: Party) -> tuple[int, ...]:
            first = party.waiting[0]
            began = self._began.get(first)
            if began is not None:
                return first.priority, 0, began
            turn = self._last_turn.get(party.client, 0)
            return first.priority, 1, of_client[party.client], turn, of_party[party], party.number

        entitled = [party for party in self._waiting if of_party[party] < self._most_of_party]
        if not entitled:
            return None
        party = min(entitled, key=order)
        return party, party.waiting[0]

    def begin(self, party: Party) -> None:
        """Takes a party's first request out: it begins."""
        request = party.waiting.popleft()
        self._num_turns += 1
        self._began.setdefault(request, self._num_turns)
        self._last_turn[party.client] = self._num_turns
        self._strike(party)

    def leave(self, party: Party, request: Request) -> None:
        """Forgets a request, waiting or not."""
        self._began.pop(request, None)
        if request in party.waiting:
            party.waiting.remove(request)
            self._strike(party)

    def forget(self, client: str) -> None:
        """Forgets when a client had its last turn. Call when it has no request left."""
        self._last_turn.pop(client, None)

    def _enlist(self, party: Party) -> None:
        if party not in self._waiting:
            self._waiting.append(party)

    def _strike(self, party: Party) -> None:
        if not party.waiting:
            self._waiting.remove(party)
