"""Decides which requests run in a step, and how many of their tokens. Pure bookkeeping: no tensor, no model, no clock.

A step costs time with every token in it, so each step has two limits: ``max_num_seqs`` sequences and
``max_prefill_tokens`` tokens that are read, those of prompts. The rules, in order:

1. Every running request has room in the caches for its next token. Where there is none left, the running request with
   the highest priority number, of several the one that began last, gives its blocks back and waits in front of all of
   its priority. It reads its prompt and its answer so far again, and goes on as if nothing had been.
2. A free sequence goes to the waiting request whose turn it is (``turns``), if the blocks of its known tokens are free,
   and beyond them one for each running request that may still grow. Otherwise nobody begins: what is next in turn is
   not overtaken by what is smaller. A party, the requests that were added together, has at most three quarters of the
   sequences (rounded up), so that another one can always begin.
3. Every running request that has read its prompt decodes one token. An answer once begun never waits for a newcomer.
4. Of the prefill limit, unread prompts of the lowest priority number get what they need, then those of the next. Of one
   priority, the client whose party is the oldest gets half, the others equal shares of the rest, and what one does not
   need goes to the oldest; a client's share is shared among its parties in the same way. Within a party the prompts are
   read one after the other.

Example: 2 sequences, 4 prefill tokens. A has a 6-token prompt, B a 3-token one, C waits.

    step 1: A reads 2, B reads 2
    step 2: A reads 3, B reads 1 (its prompt is complete: its first token is sampled)
    step 3: B decodes 1, A reads 1
    step 4: A and B decode 1 each; C waits until one of them ends

Where ranks have requests of their own, each has a prefill limit of its own, and whoever needs room makes others of its
rank yield (``Request.rank``).

Nobody of one priority starves: the oldest unread prompt always gets half the limit, or half of its client's half, so it
ends after finitely many steps; every other party moves in every step, as far as there are tokens; the request that
began first never gives its blocks back to a later one; and clients begin in turns.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

from ownpath.engine.request import Request
from ownpath.engine.turns import Party, WaitingLine


class SequenceMemory(Protocol):
    """The caches' memory as the scheduler uses it."""

    @property
    def room_ahead(self) -> int:
        """Tokens behind the known ones that a running request has room for."""

    @property
    def free(self) -> tuple[int, int]:
        """The numbers of free sequences and blocks."""

    def begin(self, request: Request, num_spare: int) -> bool:
        """Gives a request memory for its known tokens, on a rank that it chooses; False if that is not free, and
        ``num_spare`` blocks more."""

    def extend(self, request: Request) -> bool:
        """Gives a running request room for its next tokens; False if none is free."""

    def end(self, request: Request) -> None:
        """Takes back what a request has."""


class ScheduledChunk(NamedTuple):
    """A request's share of one step: its next ``num_tokens`` tokens."""

    request: Request
    num_tokens: int

    @property
    def reaches_end(self) -> bool:
        """True if no known token is left after this chunk, so that its last row predicts the next token."""
        return self.num_tokens == self.request.num_pending


class Scheduler:
    """Continuous batching with chunked prefill, in turns between clients and parties, within the caches' memory."""

    def __init__(self, max_num_seqs: int, max_prefill_tokens: int, memory: SequenceMemory) -> None:
        if max_num_seqs < 1 or max_prefill_tokens < 1:
            raise ValueError("max_num_seqs and max_prefill_tokens must be at least 1")
        self._max_num_seqs = max_num_seqs
        self._max_prefill_tokens = max_prefill_tokens
        self._memory = memory
        self._num_parties = 0
        self._party_of: dict[Request, Party] = {}
        self._num_of_client: dict[str, int] = {}
        self._single: dict[Request, ScheduledChunk] = {}
        self._line = WaitingLine(max_num_seqs - max_num_seqs // 4)
        # What was free when the request whose turn it is did not fit; None once something came or ended.
        self._full_with: tuple[int, int] | None = None
        # True once all that wait belong to parties that have their fill, until something came or ended.
        self._all_wait = False
        # The plan while nobody reads, comes or goes; None: it is to be made anew.
        self._going: list[ScheduledChunk] | None = None
        self.running: list[Request] = []
        """In the order in which they began; one that was sent back begins again."""
        self.num_preempted = 0
        """Times that a running request was sent back."""

    @property
    def has_work(self) -> bool:
        return bool(self._party_of)

    @property
    def num_waiting(self) -> int:
        """Requests that do not run."""
        return len(self._party_of) - len(self.running)

    def add(self, *requests: Request) -> None:
        """Queues the requests as one party, behind all others of their client."""
        self._num_parties += 1
        party = Party(self._num_parties, requests[0].client)
        for request in requests:
            assert request.num_computed == 0, "a request is added once, before anything of it has run"
            assert request.prompt_ids, "an empty prompt has no row to sample from"
            assert request.client == party.client, "a party belongs to one client"
            self._party_of[request] = party
            self._single[request] = ScheduledChunk(request, 1)
        self._num_of_client[party.client] = self._num_of_client.get(party.client, 0) + len(requests)
        self._line.join(party, requests)
        self._full_with, self._all_wait = None, False

    def remove(self, request: Request) -> bool:
        """Forgets a finished or aborted request, queued or running, and takes back its memory. Returns whether it was
        known."""
        party = self._party_of.pop(request, None)
        if party is None:
            return False
        del self._single[request]
        if request in self.running:
            self.running.remove(request)
            self._going = None
        self._line.leave(party, request)
        self._num_of_client[party.client] -= 1
        if not self._num_of_client[party.client]:
            del self._num_of_client[party.client]
            self._line.forget(party.client)
        self._memory.end(request)
        self._full_with, self._all_wait = None, False
        return True

    def schedule(self) -> list[ScheduledChunk]:
        """Plans the next step. Its requests stay in ``running`` until they are removed, or sent back.

        The plan is the same object as the one before while the same requests go on with a token each.
        """
        self._make_room()
        self._admit()
        if self._going is not None:
            return self._going
        chunks: list[ScheduledChunk] = []
        unread: list[Request] = []
        for request in self.running:
            if request.is_reading:
                unread.append(request)
            else:
                chunks.append(self._single[request])
        if unread:
            for rank in sorted({request.rank for request in unread}):
                chunks += self._read([request for request in unread if request.rank == rank])
        else:
            self._going = chunks
        return chunks

    @property
    def is_short(self) -> bool:
        """True if running requests need more blocks than are free: the next plan sends some back."""
        num_free = self._memory.free[1]  # a request needs one block at most
        return num_free < len(self.running) and num_free < len(self._short())

    def find_unfit(self) -> Request | None:
        """Returns the request whose turn it is if it does not fit although nothing else runs: it never will."""
        if self.running or self._full_with is None:
            return None
        turn = self._line.next(())
        return None if turn is None else turn[1]

    def _make_room(self) -> None:
        """Gives running requests room for their next tokens, and sends others back for it where it must."""
        for request in sorted(self._short(), key=lambda one: one.priority):
            while request in self.running and not self._memory.extend(request):
                self._send_back(request.rank)

    def _short(self) -> list[Request]:
        """Returns the running requests that need room. The first comparison alone is made in nearly every step."""
        ahead = self._memory.room_ahead
        return [one for one in self.running if one.num_computed >= one.room - ahead and one.may_grow]

    def _send_back(self, rank: int = 0) -> None:
        """Preempts the running request that has to yield first, of those that share a rank's memory."""
        sharing = [request for request in self.running if request.rank == rank]
        highest = max(request.priority for request in sharing)
        victim = next(request for request in reversed(sharing) if request.priority == highest)
        self.running.remove(victim)
        self._going, self._all_wait = None, False
        self._memory.end(victim)
        victim.num_computed = 0
        self.num_preempted += 1
        self._line.rejoin(self._party_of[victim], victim)

    def _admit(self) -> None:
        """Gives free sequences to waiting requests."""
        while self._line and not self._all_wait and self._has_place():
            turn = self._line.next([self._party_of[request] for request in self.running])
            if turn is None:
                self._all_wait = True
                return
            party, request = turn
            if not self._memory.begin(request, sum(one.may_grow for one in self.running)):
                self._full_with = self._memory.free
                return
            self._line.begin(party)
            self.running.append(request)
            self._going = None

    def _has_place(self) -> bool:
        return len(self.running) < self._max_num_seqs and self._full_with != self._memory.free

    def _read(self, unread: Iterable[Request]) -> Iterator[ScheduledChunk]:
        """Shares the prefill limit: by priority, then among clients, then among their parties."""
        left = self._max_prefill_tokens
        of_priority: dict[int, dict[str, dict[int, list[Request]]]] = {}
        for request in sorted(unread, key=lambda one: self._party_of[one].number):
            party = self._party_of[request]
            clients = of_priority.setdefault(request.priority, {})
            clients.setdefault(party.client, {}).setdefault(party.number, []).append(request)
        for priority in sorted(of_priority):
            clients = of_priority[priority]
            wanted = [sum(map(_num_unread, parties.values())) for parties in clients.values()]
            shares = share_tokens(left, wanted)
            left -= sum(shares)
            for parties, share in zip(clients.values(), shares, strict=True):
                own = share_tokens(share, [_num_unread(party) for party in parties.values()])
                for party_requests, party_share in zip(parties.values(), own, strict=True):
                    yield from _read_in_order(party_requests, party_share)


def _num_unread(requests: Iterable[Request]) -> int:
    return sum(request.most_next for request in requests)


def _read_in_order(requests: Iterable[Request], share: int) -> Iterator[ScheduledChunk]:
    for request in requests:
        num_tokens = min(share, request.most_next)
        share -= num_tokens
        if num_tokens:
            yield ScheduledChunk(request, num_tokens)


def share_tokens(limit: int, wanted: Sequence[int]) -> list[int]:
    """Shares prompt tokens, oldest first: to the first at least half of the limit, if it wants as many, to the others
    equal shares of what is left, and the remainder to the oldest that want more."""
    shares: list[int] = []
    for index, want in enumerate(wanted):
        left = limit - sum(shares)
        fair = -(-left // 2) if index == 0 else -(-left // (len(wanted) - index))
        shares.append(min(want, fair))
    for index, want in enumerate(wanted):
        shares[index] += min(want - shares[index], limit - sum(shares))
    return shares
