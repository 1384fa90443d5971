"""The steps that an engine is made to run: prefill, decode and both together, at each number of rows.

Some engines compile kernels for each new number of rows, and that takes them longer than all steps together. So prompts
in front of decode steps are cut such that the step that reads them has one of the numbers that are asked for, where
one is large enough, and no other step is run to fill caches.

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
SPARE_LENGTH = 128
"""Of the longest sequence, beyond the longest prefill: for answers, and for prompts that are cut to a step's size."""


@dataclass(frozen=True)
class StepLimits:
    """The largest step of an engine: rows, sequences, and the longest sequence."""

    rows: int
    sequences: int
    length: int


def fill_sizes(sizes: Sequence[int], limits: StepLimits) -> list[int]:
    """Returns how many rows a step that reads prompts may have, best first.

    Those asked for, least first; then what the prompts of most sequences take.
    """
    most = max([_ALIVE, *(size for size in sizes if size <= limits.sequences)])
    return [size for size in (*sorted(sizes), FIRST_LENGTH + sum(_short_lengths(most))) if size <= limits.rows]


def prompt_lengths(count: int, fills: Sequence[int], limits: StepLimits, num_ids: int) -> list[int]:
    """Returns lengths of prompts that together take one of ``fills``: one fills a window, the others are short.

    num_ids: of the text that they begin. Where no size fits, a step has what it has, or there are several.
    """
    longest = min(limits.rows, max(limits.length // 2, limits.length - SPARE_LENGTH // 2), num_ids)
    first = min(FIRST_LENGTH, longest)
    shorts = [min(length, longest) for length in _short_lengths(count)]
    for size in fills:
        room = size - first
        cut = shorts if sum(shorts) <= room else [max(1, length * room // sum(shorts)) for length in shorts]
        if first <= size - sum(cut) <= longest:
            return [size - sum(cut), *cut]
    return [first, *shorts]


def _short_lengths(count: int) -> list[int]:
    """Returns the lengths of all prompts but the first."""
    return [_LENGTHS[idx % len(_LENGTHS)] for idx in range(count - 1)]


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
    """known: ids of the prompt and of what was answered. read: how many of them the engine has computed. has_answered:
    all of its prompt is read."""

    known: list[int]
    answer: int
    num_left: int
    read: int = 0
    has_answered: bool = False


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
    _fills: Sequence[int] = ()

    def run(self, sizes: Sequence[int], kinds: Sequence[str] = KINDS) -> Iterator[str]:
        """Runs every step that was asked for; yields a sentence for each that this engine cannot run in one piece."""
        runs = {"prefill": self._prefill, "decode": self._decode, "mixed": self._mixed}
        self._fills = fill_sizes(sizes, self.engine.limits)
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
        self._grow(size)
        return self._step_until("decode", dict.fromkeys(self._alive, 1))

    def _mixed(self, size: int) -> str:
        limits, num_alive = self.engine.limits, _FEW_ALIVE if size < _FEW else _ALIVE
        if size < 2:
            return "one row is of one kind"
        if num_alive >= limits.sequences or size > min(limits.rows, limits.length):
            return f"a step has at most {limits.rows} rows of {limits.sequences} sequences"
        if len(self._alive) != num_alive:
            self._grow(num_alive)
        alive = dict.fromkeys(self._alive, 1)
        added = self._add(self.text[: size - len(alive)], 1)
        return self._step_until("mixed", alive | {added: size - len(alive)})

    def _grow(self, count: int) -> None:
        """Reads prompts of different lengths, which will decode together in the next step; others end."""
        self._stop_all()
        limits = self.engine.limits
        lengths = prompt_lengths(count, self._fills, limits, len(self.text))
        num_answers = 2 * (4 + sum(lengths) // limits.rows + len(ROWS))
        for length in lengths:
            self._add(self.text[:length], min(num_answers, limits.length - length))
        for _ in range(4 + len(lengths) + sum(lengths) // limits.rows):
            if all(sequence.has_answered for sequence in self._alive.values()):
                return
            self._step("decode")

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

    def _step_until(self, kind: str, wanted: Mapping[str, int]) -> str:
        """Steps until a step has the wanted rows; returns why it never had."""
        for _ in range(4 + len(wanted)):
            if self._step(kind, wanted):
                return ""
        return "the scheduler never put these rows into one step"

    def _step(self, kind: str, wanted: Mapping[str, int] | None = None) -> bool:
        """Runs a step; returns whether it had the wanted rows and so is judged."""
        scheduled = self.engine.step()
        rows = {name: count for name, count in scheduled.rows.items() if count}
        is_wanted = rows == wanted
        if rows:
            self.after_step(Planned(kind, sum(rows.values()), self._parts(rows), is_wanted))
        self._answer(scheduled.answered)
        return is_wanted

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
            sequence.has_answered = True
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
