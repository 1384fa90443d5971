"""Decides which requests run in a step, and how many of their tokens. Pure bookkeeping: no tensor, no model, no clock.

Requests that were added together (the prompts of one HTTP request) are a party. A step costs time with every token in
it, so each step has two limits: ``max_num_seqs`` sequences and ``max_prefill_tokens`` prompt tokens. The rules, in
order:

1. A free sequence goes to the waiting party that has the fewest, the oldest first. A party has at most three quarters
   of the sequences (rounded up), so that another one can always begin.
2. Every running request that has read its prompt decodes one token. An answer once begun never waits for a
   newcomer.
3. Of the prefill limit the oldest party with an unread prompt gets half, the others equal shares of the rest, and
   what one does not need goes to the oldest. Within a party the prompts are read one after the other.

Example: 2 sequences, 4 prefill tokens. A has a 6-token prompt, B a 3-token one, C waits.

    step 1: A reads 2, B reads 2
    step 2: A reads 3, B reads 1 (its prompt is complete: its first token is sampled)
    step 3: B decodes 1, A reads 1
    step 4: A and B decode 1 each; C waits until one of them ends

Nobody starves: the oldest unread prompt always gets half the limit, so it ends after finitely many steps; every other
party moves in every step, as far as there are tokens; and parties begin in the order in which they came.
"""

from collections import Counter, deque
from collections.abc import Sequence
from typing import NamedTuple

from ownpath.engine.request import Request


class ScheduledChunk(NamedTuple):
    """A request's share of one step: its next ``num_tokens`` tokens."""

    request: Request
    num_tokens: int

    def cut(self) -> "ScheduledChunk":
        """Returns the chunk without what its request does not need, or not before its next snapshot."""
        return self if self.num_tokens <= self.request.most_next else self._replace(num_tokens=self.request.most_next)

    @property
    def reaches_end(self) -> bool:
        """True if no known token is left after this chunk, so that its last row predicts the next token."""
        return self.num_tokens == self.request.num_pending


class Scheduler:
    """Continuous batching with chunked prefill, in turns between parties."""

    def __init__(self, max_num_seqs: int, max_prefill_tokens: int) -> None:
        if max_num_seqs < 1 or max_prefill_tokens < 1:
            raise ValueError("max_num_seqs and max_prefill_tokens must be at least 1")
        self._max_num_seqs = max_num_seqs
        self._max_of_party = max_num_seqs - max_num_seqs // 4
        self._max_prefill_tokens = max_prefill_tokens
        self._num_parties = 0
        # A party's number is its age: the oldest has the lowest.
        self._party_of: dict[Request, int] = {}
        self._single: dict[Request, ScheduledChunk] = {}
        self._waiting: dict[int, deque[Request]] = {}
        self.running: list[Request] = []

    @property
    def has_work(self) -> bool:
        return bool(self._party_of)

    @property
    def num_waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._party_of) - len(self.running)

    def add(self, *requests: Request) -> None:
        """Queues the requests as one party behind all others."""
        self._num_parties += 1
        for request in requests:
            assert request.num_computed == 0, "a request is added once, before anything of it has run"
            assert request.prompt_ids, "an empty prompt has no row to sample from"
            self._party_of[request] = self._num_parties
            self._single[request] = ScheduledChunk(request, 1)
        self._waiting[self._num_parties] = deque(requests)

    def remove(self, request: Request) -> bool:
        """Forgets a finished or aborted request, queued or running. Returns whether it was known."""
        party = self._party_of.pop(request, None)
        if party is None:
            return False
        del self._single[request]
        if request in self.running:
            self.running.remove(request)
        else:
            self._waiting[party].remove(request)
            self._forget_if_empty(party)
        return True

    def schedule(self) -> list[ScheduledChunk]:
        """Plans the next step. Its requests stay in ``running`` until they are removed."""
        self._admit()
        chunks: list[ScheduledChunk] = []
        unread: dict[int, list[Request]] = {}
        for request in self.running:
            if request.is_prefilling:
                unread.setdefault(self._party_of[request], []).append(request)
            else:
                chunks.append(self._single[request])
        parties = [unread[party] for party in sorted(unread)]
        wanted = [sum(request.most_next for request in party) for party in parties]
        for party, share in zip(parties, share_tokens(self._max_prefill_tokens, wanted), strict=True):
            for request in party:
                num_tokens = min(share, request.most_next)
                share -= num_tokens
                chunks += [ScheduledChunk(request, num_tokens)] if num_tokens else []
        return chunks

    def _admit(self) -> None:
        """Gives free sequences to waiting parties."""
        if not self._waiting:
            return
        num_running = Counter(self._party_of[request] for request in self.running)
        while self._waiting and len(self.running) < self._max_num_seqs:
            party = min(self._waiting, key=lambda number: (num_running[number], number))
            if num_running[party] >= self._max_of_party:
                return
            self.running.append(self._waiting[party].popleft())
            num_running[party] += 1
            self._forget_if_empty(party)

    def _forget_if_empty(self, party: int) -> None:
        if not self._waiting[party]:
            del self._waiting[party]


def share_tokens(limit: int, wanted: Sequence[int]) -> list[int]:
    """Shares prompt tokens among parties, oldest first: to the first at least half of the limit, if it wants as many,
    to the others equal shares of what is left, and the remainder to the oldest that want more."""
    shares: list[int] = []
    for index, want in enumerate(wanted):
        left = limit - sum(shares)
        fair = -(-left // 2) if index == 0 else -(-left // (len(wanted) - index))
        shares.append(min(want, fair))
    for index, want in enumerate(wanted):
        shares[index] += min(want - shares[index], limit - sum(shares))
    return shares
