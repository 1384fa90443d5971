"""The tokens that may follow in answers that must fit a grammar: a row of bits for each, filled while the forward runs.

A step's masks are one job on one thread. It is given before the forward and waited for behind it, so that requests
without a grammar wait for nothing but the slowest row of a step, whose work its grammar's limits bound.

Legend: S rows of a step with changed logits, W words of a mask: bit i of word w allows token 32 w + i.
"""

from collections.abc import Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

MaskWords = npt.NDArray[np.int32]


class Matcher(Protocol):
    """The grammar of one answer, and how far the answer has come in it. Used by one thread at a time.

    problem: why it cannot go on, which ends the answer with an error; ``None`` while it can.
    """

    @property
    def problem(self) -> str | None: ...

    def fill(self, output_ids: Sequence[int], row_W: MaskWords) -> None:
        """Reads the tokens that are new since the last call, and writes which may be next. With a problem: none may."""


class Masks:
    """The masks of one step, being filled. The row behind them allows all tokens."""

    def __init__(self, device: torch.device, num_words: int) -> None:
        self._device, self._num_words = device, num_words
        self._host = torch.full((1, num_words), -1, dtype=torch.int32)
        self._rows: dict[Hashable, int] = {}
        self._job: Future[None] | None = None
        self._thread: ThreadPoolExecutor | None = None

    def start(self, asked: Sequence[tuple[Hashable, Matcher, Sequence[int]]]) -> None:
        """Begins to fill a row for each of these; ``asked``: whose next token it is for, grammar, tokens so far."""
        self.wait()
        self._rows = {owner: row for row, (owner, _, _) in enumerate(asked)}
        if not asked:
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "ownpath-masks")
        if len(self._host) <= len(asked):
            shape = 2 * len(asked) + 1, self._num_words
            self._host = torch.full(shape, -1, dtype=torch.int32, pin_memory=self._device.type == "cuda")
        self._host[len(asked)] = -1
        fills = [(matcher, output_ids) for _, matcher, output_ids in asked]
        self._job = self._thread.submit(_fill_all, fills, self._host.numpy())

    def wait(self) -> None:
        """Waits until the rows are filled."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def has(self, owner: Hashable) -> bool:
        """True if there is a row for this."""
        return owner in self._rows

    def of(self, owners: Sequence[Hashable]) -> torch.Tensor:
        """Waits, and returns these masks on the device, int32 [S, W]; of who has none, all tokens are allowed."""
        self.wait()
        count = len(self._rows)
        mask_SW = self._host[: count + 1].to(self._device, non_blocking=True)
        places = [self._rows.get(owner, count) for owner in owners]
        if places == list(range(count)):
            return mask_SW[:count]
        return mask_SW[torch.tensor(places, device=self._device)]


def _fill_all(fills: Sequence[tuple[Matcher, Sequence[int]]], rows_SW: MaskWords) -> None:
    for row, (matcher, output_ids) in enumerate(fills):
        matcher.fill(output_ids, rows_SW[row])
