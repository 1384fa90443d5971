"""Matchers whose masks are known without any grammar, filled row by row."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from ownpath.engine.masks import MaskWords


def write_mask(allowed: Sequence[int], row_W: MaskWords) -> None:
    """Sets bit i of word w for token 32 w + i."""
    row_W[:] = 0
    for token_id in allowed:
        row_W[token_id // 32] |= np.int32(np.uint32(1 << token_id % 32).astype(np.int32))


class EachByItself:
    """Fills one row after the other."""

    def fill(self, output_ids: Sequence[int], row_W: MaskWords) -> None:
        raise NotImplementedError

    @classmethod
    def fill_all(cls, fills: Sequence[tuple[int, Self, Sequence[int]]], rows_SW: MaskWords) -> None:
        for row, one, output_ids in fills:
            one.fill(output_ids, rows_SW[row])


@dataclass(eq=False)
class Every(EachByItself):
    """The token at place p of the answer is p modulo a number. It has no state, so answers may share it."""

    number: int
    num_vocab: int
    problem: str | None = None

    def fill(self, output_ids: Sequence[int], row_W: MaskWords) -> None:
        write_mask(range(len(output_ids) % self.number, self.num_vocab, self.number), row_W)


@dataclass(eq=False)
class Script(EachByItself):
    """Allows these tokens, step by step; then the last of them. fails_at: the step in which it cannot go on.

    seen: the tokens that each step knew. delay_s: time that each mask takes.
    """

    allowed: Sequence[Sequence[int]]
    fails_at: int | None = None
    delay_s: float = 0.0
    problem: str | None = None
    seen: list[list[int]] = field(default_factory=list)

    def fill(self, output_ids: Sequence[int], row_W: MaskWords) -> None:
        time.sleep(self.delay_s)
        self.seen.append(list(output_ids))
        place = min(len(output_ids), len(self.allowed) - 1)
        if len(output_ids) == self.fails_at:
            self.problem = "the grammar cannot go on"
        write_mask([] if self.problem else self.allowed[place], row_W)
