"""The protocol of an exchange as a state machine, and a search through every order in which its steps can happen.

Each rank runs the same sequence: push (a row and a flag to every rank, itself too), wait for all flags, read all rows,
next. A store is posted: it reaches a rank's memory later, in any order among stores, except that a flag stored with
release arrives after what its rank stored before. A read that is not behind an acquire may happen before the wait ends.
Epochs count modulo ``WRAP`` and begin near it, so that every run wraps.

With faults, one rank dies at any step (its posted stores arrive or not), or is only late; a wait may then end by its
limit.

A ``Protocol`` says what the ranks do. The design is ``Protocol()``; each field's other values are mistakes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

WRAP = 8
FIRST_EPOCH = WRAP - 2
EMPTY = -1


@dataclass(frozen=True)
class Protocol:
    """The choices of the ranks' program. Every default is the design.

    buffers: places of a source's row. releases: a flag arrives after the row. acquires: rows are read after the wait.
    advances: the epoch counts in device memory, so that a replay has its own. wraps: flags are compared modulo.
    skew: what the reader adds to the epoch whose parity chooses the place. fixed_order: of the sum, by rank; else as
    flags arrive. resets: flags are 1, and the reader makes them 0. drains: a push starts after its rank's reads ended.
    polls_abort: a wait ends when the abort cell is set. tells: who gives up sets the others' cells. stops: a rank whose
    cell is set pushes nothing. bounded: a wait ends after its limit. patient: one that misses several ranks waits a
    little longer than its limit, as another rank may know which of them is lost. empty_sends: a rank without rows sends
    its flags.
    """

    buffers: int = 2
    releases: bool = True
    acquires: bool = True
    advances: bool = True
    wraps: bool = True
    skew: int = 0
    fixed_order: bool = True
    resets: bool = False
    drains: bool = True
    polls_abort: bool = True
    tells: bool = True
    stops: bool = True
    bounded: bool = True
    patient: bool = True
    empty_sends: bool = True


class Rank(NamedTuple):
    """step: its exchange. sent: of this step. waited: its flags are there, or it gave up. order: sources read so far.
    ahead: the next exchange is sent already, which ``drains`` forbids. lost: ranks that it names as lost, as bits; 0
    while all is well. gave_up: a wait of it has ended by its limit."""

    step: int = 0
    sent: bool = False
    waited: bool = False
    order: tuple[int, ...] = ()
    ahead: bool = False
    lost: int = 0
    gave_up: bool = False
    alive: bool = True


class State(NamedTuple):
    """rows[to][place][source] = step of the row; flags[to][source]; cells[to]; flight: posted stores."""

    ranks: tuple[Rank, ...]
    rows: tuple[int, ...]
    flags: tuple[int, ...]
    cells: tuple[int, ...]
    flight: frozenset["Store"]


class Store(NamedTuple):
    """A posted store. number: its place among its source's. at: into rows, flags or cells of ``kind``."""

    kind: str
    source: int
    number: int
    at: int
    value: int


class Wrong(Exception):
    """A state that the protocol must not reach."""


@dataclass(frozen=True)
class Search:
    """size: ranks. steps: exchanges. empty: a rank that has no rows. dies, late: a rank that may die, or be waited for
    in vain although it lives. in_place: exchanges whose rows have one place of their own, in place of the buffers.
    tagged: exchanges whose rows say their epoch themselves, and are what is waited for. Their flags, which nobody
    reads, are left out. copied: of them, those whose rows a rank copies to the place of ``in_place``.

    Rows in that place are read until the rank's next push.
    """

    size: int
    steps: int
    protocol: Protocol = Protocol()
    empty: int | None = None
    dies: int | None = None
    late: int | None = None
    in_place: frozenset[int] = frozenset()
    tagged: frozenset[int] = frozenset()
    copied: frozenset[int] = frozenset()

    def start(self) -> State:
        """Returns the state before the first exchange."""
        n, first = self.size, 0 if self.protocol.resets else FIRST_EPOCH
        rows = (EMPTY,) * (n * self.places * n)
        return State((Rank(),) * n, rows, (first,) * (n * n), (0,) * n, frozenset())

    @property
    def places(self) -> int:
        """Places of a source's row in a rank's memory."""
        return self.protocol.buffers + bool(self.in_place | self.copied)

    def own_place(self, me: int, source: int) -> int:
        """Returns where a source's row lies that is neither in a buffer nor taken in turn."""
        return (me * self.places + self.protocol.buffers) * self.size + source

    def epoch(self, step: int) -> int:
        """Returns the epoch of a step, as its flags hold it."""
        if self.protocol.resets:
            return 1
        return (FIRST_EPOCH + (step + 1 if self.protocol.advances else 1)) % WRAP

    def place(self, to: int, source: int, step: int, skew: int = 0) -> int:
        """Returns where a source's row of a step lies in a rank's memory."""
        buffer = self.protocol.buffers if step in self.in_place else (step + skew) % self.protocol.buffers
        return (to * self.places + buffer) * self.size + source

    def next_states(self, state: State) -> Iterator[State]:
        """Yields the state after each step that can happen now. Errors: Wrong."""
        yield from self._arrivals(state)
        for me, rank in enumerate(state.ranks):
            if not rank.alive:
                continue
            if me == self.dies:
                yield from self._deaths(state, me)
            if rank.step < self.steps:
                yield from self._push(state, me)
                yield from self._wait(state, me)
                yield from self._read(state, me)

    def _arrivals(self, state: State) -> Iterator[State]:
        for store in state.flight:
            if self._is_behind(store, state.flight):
                continue
            part = {"row": state.rows, "flag": state.flags, "cell": state.cells}[store.kind]
            value = part[store.at] | store.value if store.kind == "cell" else store.value
            found = (*part[: store.at], value, *part[store.at + 1 :])
            left = state.flight - {store}
            if store.kind == "row":
                yield state._replace(rows=found, flight=left)
            elif store.kind == "flag":
                yield state._replace(flags=found, flight=left)
            else:
                yield state._replace(cells=found, flight=left)

    def _is_behind(self, store: Store, flight: frozenset[Store]) -> bool:
        """Returns True if what must arrive first is still on its way: in front of a release all that its rank stored
        before, in front of any store an earlier one to the same place."""
        for other in flight:
            if other.source == store.source and other.number < store.number:
                is_released = store.kind != "row" and self.protocol.releases
                if is_released or (other.kind, other.at) == (store.kind, store.at):
                    return True
        return False

    @staticmethod
    def _with(state: State, me: int, rank: Rank) -> tuple[Rank, ...]:
        return (*state.ranks[:me], rank, *state.ranks[me + 1 :])

    def _deaths(self, state: State, me: int) -> Iterator[State]:
        """A rank dies: its posted stores arrive later, or none of those that are still on their way."""
        ranks = self._with(state, me, state.ranks[me]._replace(alive=False))
        yield state._replace(ranks=ranks)
        lost = frozenset(store for store in state.flight if store.source != me)
        if lost != state.flight:
            yield state._replace(ranks=ranks, flight=lost)

    def _push(self, state: State, me: int) -> Iterator[State]:
        rank, step = state.ranks[me], state.ranks[me].step
        if rank.sent and not self.protocol.drains and step + 1 < self.steps and rank.waited:
            step += 1  # the next exchange's push starts while this one's rows are read
            if rank.ahead:
                return
            after = rank._replace(ahead=True)
        elif rank.sent:
            return
        else:
            after = rank._replace(sent=True)
        self._check_read(state, me, step - 1)
        stopped = self.protocol.stops and bool(rank.lost or state.cells[me])
        silent = not self.protocol.empty_sends and me == self.empty
        stores = () if stopped or silent else self._stores(me, step)
        yield state._replace(ranks=self._with(state, me, after), flight=state.flight | frozenset(stores))

    def _check_read(self, state: State, me: int, step: int) -> None:
        """Checks that rows in their own place were there until now, in front of the next push. Errors: Wrong."""
        if step not in self.in_place | self.copied or state.ranks[me].lost:
            return
        for source in range(self.size):
            found = state.rows[self.own_place(me, source)]
            if source != self.empty and found != step:
                raise Wrong(f"rank {me} reads rank {source}'s row of exchange {found} in {step}")

    def _stores(self, me: int, step: int) -> Iterator[Store]:
        for to in range(self.size):
            if me != self.empty:
                yield Store("row", me, 2 * step, self.place(to, me, step), step)
            if step not in self.tagged:
                yield Store("flag", me, 2 * step + 1, to * self.size + me, self.epoch(step))

    def _missing(self, state: State, me: int) -> list[int]:
        step = state.ranks[me].step
        want = self.epoch(step)
        if step in self.tagged:
            rows = [state.rows[self.place(me, source, step)] for source in range(self.size)]
            return [source for source, row in enumerate(rows) if row == EMPTY or self.epoch(row) != want]
        flags = state.flags[me * self.size : (me + 1) * self.size]
        if self.protocol.wraps and not self.protocol.resets:
            return [source for source, flag in enumerate(flags) if (flag - want) % WRAP >= WRAP // 2]
        return [source for source, flag in enumerate(flags) if flag < want]

    def _wait(self, state: State, me: int) -> Iterator[State]:
        rank = state.ranks[me]
        if not rank.sent or rank.waited:
            return
        if self.protocol.polls_abort and (rank.lost or state.cells[me]):
            lost = rank.lost or state.cells[me]
            yield state._replace(ranks=self._with(state, me, rank._replace(waited=True, lost=lost)))
            return
        missing = self._missing(state, me)
        if not missing:
            yield state._replace(ranks=self._with(state, me, rank._replace(waited=True)))
        elif self.protocol.bounded and self._may_end(state, me, missing):
            yield self._give_up(state, me, missing)

    def _may_end(self, state: State, me: int, missing: list[int]) -> bool:
        """Returns True if a wait may end by its limit: for the late rank, or if nobody can send what is missing. Stores
        arrive within the limit, and so does what a rank that has not given up still sends."""
        if missing == [self.late]:
            return True
        arrives = {store.source for store in state.flight if store.kind != "row" or store.number // 2 in self.tagged}
        gone = {source for source, rank in enumerate(state.ranks) if not rank.alive or rank.step == self.steps}
        if not gone & set(missing) or arrives & set(missing) or not self._is_stuck(state):
            return False
        return not (self.protocol.patient and len(missing) > 1 and self._another_knows(state, me))

    def _another_knows(self, state: State, asking: int) -> bool:
        """Returns True if another living rank has named a rank, or misses one alone: its wait began before one
        that misses several, which are a push further on."""
        for me, rank in enumerate(state.ranks):
            is_waiting = rank.sent and not rank.waited and rank.step < self.steps
            if rank.alive and me != asking and (rank.lost or (is_waiting and len(self._missing(state, me)) == 1)):
                return True
        return False

    def _is_stuck(self, state: State) -> bool:
        """Returns True if every living rank waits for a flag, and none is on its way: then time passes."""
        kinds = [(store.kind, store.number // 2 in self.tagged) for store in state.flight]
        if any(kind == "flag" or (kind == "row" and is_tagged) for kind, is_tagged in kinds):
            return False
        for me, rank in enumerate(state.ranks):
            is_waiting = rank.sent and not rank.waited and bool(self._missing(state, me))
            told = self.protocol.polls_abort and bool(rank.lost or state.cells[me])
            if rank.alive and rank.step < self.steps and (told or not is_waiting):
                return False
        return True

    def _give_up(self, state: State, me: int, missing: list[int]) -> State:
        rank, bits = state.ranks[me], sum(1 << source for source in missing)
        if rank.gave_up:
            raise Wrong(f"rank {me} waits for its limit a second time")
        ranks = self._with(state, me, rank._replace(waited=True, lost=rank.lost or bits, gave_up=True))
        cells = [Store("cell", me, 2 * rank.step + 1, to, bits) for to in range(self.size) if to != me]
        return state._replace(ranks=ranks, flight=state.flight | frozenset(cells if self.protocol.tells else ()))

    def _read(self, state: State, me: int) -> Iterator[State]:
        """Reads one row; behind the last one the exchange has ended."""
        rank = state.ranks[me]
        if rank.waited and rank.lost:
            yield self._ended(state, me)
            return
        early = not self.protocol.acquires and rank.sent and not rank.waited
        if not (rank.waited or early):
            return
        unread = [source for source in range(self.size) if source not in rank.order]
        if rank.waited and not unread:
            yield self._ended(state, me)
            return
        in_order = unread[:1] if self.protocol.fixed_order else unread
        for source in in_order:
            found = state.rows[self.place(me, source, rank.step, self.protocol.skew)]
            if source != self.empty and found != rank.step:
                raise Wrong(f"rank {me} reads rank {source}'s row of exchange {found} in {rank.step}")
            rows = state.rows
            if rank.step in self.copied:
                at = self.own_place(me, source)
                rows = (*rows[:at], found, *rows[at + 1 :])
            yield state._replace(ranks=self._with(state, me, rank._replace(order=(*rank.order, source))), rows=rows)

    def _ended(self, state: State, me: int) -> State:
        rank = state.ranks[me]
        if not rank.lost and rank.order != tuple(range(self.size)):
            raise Wrong(f"rank {me} adds in the order {rank.order}")
        after = Rank(rank.step + 1, sent=rank.ahead, lost=rank.lost, gave_up=rank.gave_up)
        flags = state.flags
        if self.protocol.resets:
            flags = tuple(0 if idx // self.size == me else flag for idx, flag in enumerate(flags))
        return state._replace(ranks=self._with(state, me, after), flags=flags)

    def check_end(self, state: State) -> None:
        """Checks a state after which nothing happens. Errors: Wrong."""
        for me, rank in enumerate(state.ranks):
            if not rank.alive:
                continue
            if rank.step < self.steps:
                raise Wrong(f"rank {me} hangs in exchange {rank.step}")
            named = self.dies if self.dies is not None else self.late
            if rank.lost and (named is None or rank.lost != 1 << named):
                raise Wrong(f"rank {me} names {rank.lost:b} as lost")

    def run(self) -> int:
        """Visits every state. Returns their number. Errors: Wrong."""
        first = self.start()
        seen, waiting = {first}, [first]
        while waiting:
            state, is_end = waiting.pop(), True
            for found in self.next_states(state):
                is_end = False
                if found not in seen:
                    seen.add(found)
                    waiting.append(found)
            if is_end:
                self.check_end(state)
        return len(seen)
