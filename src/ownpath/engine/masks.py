"""The tokens that may follow in answers that must fit a grammar: a row of bits for each, filled while a forward runs.

Masks of decode steps are filled at once, by the engine's thread: it has launched the forward, which the device runs
meanwhile. Where the forward needs the engine's thread itself, another thread fills them beside it. Either way matchers
of one kind fill theirs together, so that they may share cores and go without Python's lock.

Legend: S rows of a step with changed logits, W words of a mask: bit i of word w allows token 32 w + i.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

MaskWords = npt.NDArray[np.int32]


class Matcher(Protocol):
    """The grammar of one answer, and how far the answer has come in it. Used by one thread at a time.

    problem: why it cannot go on, which ends the answer with an error; ``None`` while it can.
    """

    @property
    def problem(self) -> str | None: ...

    @classmethod
    def fill_all(cls, fills: "Sequence[tuple[int, Self, Sequence[int]]]", rows_SW: MaskWords) -> None:
        """Fills rows for several answers: the row's number, the matcher, and the tokens of its answer so far.

        Each matcher reads the tokens that are new since the last call, and writes which may be next. With a problem:
        none may.
        """


Fill = tuple[int, Matcher, Sequence[int]]
"""The row of a mask, whose it is, and the answer so far."""


class Masks:
    """Fills the masks of one step after the other."""

    def __init__(self) -> None:
        self._job: Future[None] | None = None
        self._thread: ThreadPoolExecutor | None = None

    def start(self, fills: Sequence[Fill], rows_SW: MaskWords) -> None:
        """Begins to fill these rows on a thread of their own. What was begun before and never waited for is over then,
        and nobody hears how it went: the step that it was for has failed."""
        if self._job is not None:
            self._job.exception()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "ownpath-masks")
        self._job = self._thread.submit(fill_rows, fills, rows_SW)

    def wait(self) -> None:
        """Waits until the rows that were begun are filled."""
        job, self._job = self._job, None
        if job is not None:
            job.result()


def fill_rows(fills: Sequence[Fill], rows_SW: MaskWords) -> None:
    """Fills these rows, those of one kind of matcher together."""
    kinds = {type(matcher) for _, matcher, _ in fills}
    for kind in kinds:
        own = fills if len(kinds) == 1 else [fill for fill in fills if type(fill[1]) is kind]
        kind.fill_all(own, rows_SW)
