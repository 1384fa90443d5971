"""The steps that an engine is made to run: prefill, decode and both together, at each number of rows.

All sequences are beginnings of one text. What a sequence is answered is fixed in advance, one id for each sequence, so
that a row is known by its position and its token, whatever order an engine puts its rows in.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

ROWS = (1, 2, 5, 64, 130, 700)
"""Few rows and many, around the sizes where engines change kernels; 130 and 700 pass a window and HCA's stride."""
KINDS = ("prefill", "decode", "mixed")
FIRST_LENGTH, _LENGTHS = 130, (5, 2, 9, 3, 14, 4)
"""Of the prompts in front of decode steps: one that fills a window, then short ones in turn."""
_FEW, _FEW_ALIVE, _ALIVE = 10, 1, 5
"""Of a mixed step below 10 rows, one decodes; of a larger one, five."""


@dataclass(frozen=True)
class StepLimits:
    """The largest step of an engine: rows, sequences, and the longest sequence."""

    rows: int
    sequences: int
    length: int


@dataclass(frozen=True)
class Scheduled:
    """One step of an engine: rows of each sequence, and the sequences that it gave their next token."""

    rows: Mapping[str, int]
    answered: Sequence[str]


class StepEngine(Protocol):
    """An engine that is driven step by step."""

    @property
    def limits(self) -> StepLimits: ...

    def add(self, sequence: str, prompt: Sequence[int], answer: int, num_answers: int) -> None:
        """Accepts a sequence; every token of its answer is ``answer``."""

    def step(self) -> Scheduled:
        """Runs one step."""

    def stop(self, sequence: str) -> None:
        """Ends a sequence."""


@dataclass(frozen=True)
class Planned:
    """A step that ran. rows: of each sequence, its first position and the ids of its rows. is_judged: it is one of
    those that were asked for; the others only fill caches."""

    kind: str
    num_rows: int
    rows: Mapping[str, tuple[int, tuple[int, ...]]]
    is_judged: bool


@dataclass
class _Sequence:
    """known: ids of the prompt and of what was answered. read: how many of them the engine has computed."""

    known: list[int]
    answer: int
    num_left: int
    read: int = 0


@dataclass
class Driver:
    """Drives an engine. text: token ids, as long as the longest prefill. answers: ids for answers. after_step: called
    with every step that has run."""

    engine: StepEngine
    text: Sequence[int]
    answers: Sequence[int]
    after_step: Callable[[Planned], None]
    _alive: dict[str, _Sequence] = field(default_factory=dict)
    _count: int = 0

    def run(self, sizes: Sequence[int], kinds: Sequence[str] = KINDS) -> Iterator[str]:
        """Runs every step that was asked for; yields a sentence for each that this engine cannot run in one piece."""
        runs = {"prefill": self._prefill, "decode": self._decode, "mixed": self._mixed}
        for kind in kinds:
            for size in sizes:
                refused = runs[kind](size)
                if refused:
                    yield f"{kind} of {size} rows: {refused}"
            self._stop_all()

    def _prefill(self, size: int) -> str:
        limits = self.engine.limits
        most = min(limits.rows, limits.length - 1, len(self.text))
        if size > most:
            return f"a step has at most {most} rows of one sequence"
        sequence = self._add(self.text[:size], 1)
        return self._step_until("prefill", {sequence: size})

    def _decode(self, size: int) -> str:
        most = min(self.engine.limits.sequences, self.engine.limits.rows)
        if size > most:
            return f"at most {most} sequences decode together"
        self._stop_all()
        self._grow(size)
        return self._step_until("decode", dict.fromkeys(self._alive, 1))

    def _mixed(self, size: int) -> str:
        limits, num_alive = self.engine.limits, _FEW_ALIVE if size < _FEW else _ALIVE
        if size < 2:
            return "one row is of one kind"
        if num_alive >= limits.sequences or size > min(limits.rows, limits.length):
            return f"a step has at most {limits.rows} rows of {limits.sequences} sequences"
        if len(self._alive) < num_alive:
            self._grow(num_alive - len(self._alive))
            self._step_until("decode", dict.fromkeys(self._alive, 1), is_judged=False)
        alive = dict.fromkeys(self._alive, 1)
        added = self._add(self.text[: size - len(alive)], 1)
        return self._step_until("mixed", alive | {added: size - len(alive)})

    def _grow(self, count: int) -> None:
        """Adds sequences that will decode, of different lengths."""
        limits = self.engine.limits
        wanted = [FIRST_LENGTH, *(_LENGTHS[idx % len(_LENGTHS)] for idx in range(count - 1))]
        lengths = [min(length, limits.rows, limits.length // 2, len(self.text)) for length in wanted[:count]]
        num_answers = 2 * (4 + sum(lengths) // limits.rows + len(ROWS))
        for length in lengths:
            self._add(self.text[:length], min(num_answers, limits.length - length))

    def _add(self, prompt: Sequence[int], num_answers: int) -> str:
        name, answer = f"s{self._count}", self.answers[self._count % len(self.answers)]
        self._count += 1
        self._alive[name] = _Sequence([*prompt], answer, num_answers)
        self.engine.add(name, prompt, answer, num_answers)
        return name

    def _stop_all(self) -> None:
        for name in self._alive:
            self.engine.stop(name)
        self._alive.clear()

    def _step_until(self, kind: str, wanted: Mapping[str, int], *, is_judged: bool = True) -> str:
        """Steps until a step has the wanted rows; returns why it never had."""
        for _ in range(4 + len(wanted)):
            scheduled = self.engine.step()
            rows = {name: count for name, count in scheduled.rows.items() if count}
            is_wanted = rows == dict(wanted)
            if rows:
                self.after_step(Planned(kind, sum(rows.values()), self._parts(rows), is_judged and is_wanted))
            self._answer(scheduled.answered)
            if is_wanted:
                return ""
        return "the scheduler never put these rows into one step"

    def _parts(self, rows: Mapping[str, int]) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Returns position and ids of what a step has read."""
        parts = {}
        for name, count in rows.items():
            sequence = self._alive[name]
            start = sequence.read
            sequence.read = start + count
            parts[name] = start, tuple(sequence.known[start : sequence.read])
        return parts

    def _answer(self, answered: Sequence[str]) -> None:
        for name in answered:
            sequence = self._alive[name]
            sequence.known.append(sequence.answer)
            sequence.num_left -= 1
            if not sequence.num_left:
                del self._alive[name]


@dataclass(frozen=True)
class PlacedRows:
    """Rows of one sequence in a step: ``count`` from ``first_row`` on, at positions from ``start`` on."""

    sequence: str
    start: int
    first_row: int
    count: int


def place_rows(token_ids: Sequence[int], positions: Sequence[int], planned: Planned) -> tuple[PlacedRows, ...]:
    """Finds each sequence's rows in the order in which the model got them.

    Errors: ValueError for rows that are no sequence's.
    """
    left, found, row = dict(planned.rows), list[PlacedRows](), 0
    while row < planned.num_rows:
        fitting = [
            (len(ids), name)
            for name, (start, ids) in left.items()
            if tuple(token_ids[row : row + len(ids)]) == ids
            and tuple(positions[row : row + len(ids)]) == tuple(range(start, start + len(ids)))
        ]
        if not fitting:
            told = f"row {row} (token {token_ids[row]}, position {positions[row]})"
            raise ValueError(f"{told} of a {planned.kind} of {planned.num_rows} rows is of no sequence that it has")
        count, name = max(fitting, key=lambda fit: fit[0])
        found.append(PlacedRows(name, left.pop(name)[0], row, count))
        row += count
    return tuple(found)
