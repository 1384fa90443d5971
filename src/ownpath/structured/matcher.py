"""Follows one answer through its grammar, token by token; that begins: at once, or behind a marker of the model's.

reasoning </think> grammar              the reasoning is free, but does not end the answer
content < ｜DSML｜ grammar               content is free, and may be all of the answer
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ownpath.engine.masks import MaskWords
from ownpath.structured.filling import fill_grammars
from ownpath.structured.vocabulary import Vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher


@dataclass(frozen=True)
class FreePart:
    """A part of an answer before its grammar begins, up to a marker.

    marker: the token that ends it. before: what the text must end with for the marker to come. may_end: whether the
    answer may end in this part. barred: markers that must not come in it.
    """

    marker: int
    before: bytes = b""
    may_end: bool = False
    barred: tuple[int, ...] = ()


class FreeMasks:
    """Masks of free parts: all tokens but some. They are the same for every answer."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._made: dict[tuple[int, ...], MaskWords] = {}
        ends = self.without(vocabulary.end_ids)
        self._end_bits = [(int(word), ~ends[word]) for word in np.flatnonzero(ends != -1)]

    def without(self, token_ids: Sequence[int]) -> MaskWords:
        """Returns a mask of all tokens but these."""
        key = tuple(token_ids)
        if key not in self._made:
            bits = np.full(-(-len(self.vocabulary.tokens) // 32) * 32, True)
            bits[list(key)] = False
            self._made[key] = np.packbits(bits, bitorder="little").view(np.int32)
        return self._made[key]

    def bar_ends(self, rows_SW: MaskWords, rows: Sequence[int]) -> None:
        """Bars end tokens in these rows, in ascending order, except where nothing else may follow."""
        allowing = [rows_SW[: rows[-1] + 1, word] & own for word, own in self._end_bits]
        if not any(words.any() for words in allowing):
            return
        for row in rows:
            rest = rows_SW[row] & self.without(self.vocabulary.end_ids)
            if rest.any():
                rows_SW[row] = rest

    def ends_with(self, token_id: int, end: bytes) -> bool:
        """True if a token's text ends with this."""
        return token_id not in self.vocabulary.markers and self.vocabulary.tokens[token_id].endswith(end)


class AnswerMatcher:
    """Follows one answer. free: its parts before the grammar, in order. goes_on: end tokens come only where nothing
    else may."""

    def __init__(
        self, masks: FreeMasks, grammar: "LLMatcher", free: Sequence[FreePart] = (), goes_on: bool = False
    ) -> None:
        self._masks, self._grammar, self._free, self._goes_on = masks, grammar, list(free), goes_on
        self._num_seen = 0
        self._last: int | None = None
        self.problem: str | None = None

    @classmethod
    def fill_all(cls, fills: "Sequence[tuple[int, AnswerMatcher, Sequence[int]]]", rows_SW: MaskWords) -> None:
        """Fills rows of several answers: see ``engine.masks.Matcher``."""
        for row, one, output_ids in fills:
            if len(output_ids) - one._num_seen == 1 and not one._free:  # as nearly always
                one._grammar.consume_token(output_ids[-1])
                one._num_seen += 1
            else:
                one._read(output_ids)
            if one._free:
                rows_SW[row] = one._free_mask(one._free[0])
        fill_grammars([(one._grammar, row) for row, one, _ in fills if not one._free], rows_SW)
        going_on = [row for row, one, _ in fills if one._goes_on and not one._free]
        if going_on:
            fills[0][1]._masks.bar_ends(rows_SW, going_on)
        for row, one in [(row, one) for row, one, _ in fills if one._grammar.is_error()]:
            one.problem = "the grammar has grown beyond its limits in the middle of the answer"
            rows_SW[row] = 0

    def _read(self, output_ids: Sequence[int]) -> None:
        for token_id in output_ids[self._num_seen :]:
            self._take(token_id)
        self._num_seen = len(output_ids)

    def _take(self, token_id: int) -> None:
        if not self._free:
            self._grammar.consume_token(token_id)
        elif token_id == self._free[0].marker:
            del self._free[0]
        self._last = token_id

    def _free_mask(self, part: FreePart) -> MaskWords:
        barred = list(part.barred)
        if self._goes_on or not part.may_end:
            barred += self._masks.vocabulary.end_ids
        if part.before and (self._last is None or not self._masks.ends_with(self._last, part.before)):
            barred.append(part.marker)
        return self._masks.without(barred)
