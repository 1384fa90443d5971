"""Follows one answer through its grammar, token by token; that begins: at once, or behind a marker of the model's.

reasoning </think> grammar              the reasoning is free, but does not end the answer
content < ｜DSML｜ grammar               content is free, and may be all of the answer
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ownpath.engine.masks import MaskWords
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

    def without(self, token_ids: Sequence[int]) -> MaskWords:
        """Returns a mask of all tokens but these."""
        key = tuple(token_ids)
        if key not in self._made:
            bits = np.full(-(-len(self.vocabulary.tokens) // 32) * 32, True)
            bits[list(key)] = False
            self._made[key] = np.packbits(bits, bitorder="little").view(np.int32)
        return self._made[key]

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

    def fill(self, output_ids: Sequence[int], row_W: MaskWords) -> None:
        """Reads the tokens that are new since the last call, and writes which may be next. With a problem: none may."""
        for token_id in output_ids[self._num_seen :]:
            self._take(token_id)
        self._num_seen = len(output_ids)
        row_W[:] = self._free_mask(self._free[0]) if self._free else self._grammar_mask(row_W)
        if self._grammar.is_error():
            self.problem = "the grammar has grown beyond its limits in the middle of the answer"
            row_W[:] = 0

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

    def _grammar_mask(self, row_W: MaskWords) -> MaskWords:
        # The library writes as many words as it has tokens for, and releases Python's lock meanwhile.
        self._grammar.unsafe_compute_mask_ptr(row_W.ctypes.data, row_W.nbytes)
        if self._goes_on:
            rest = row_W & self._masks.without(self._masks.vocabulary.end_ids)
            return rest if rest.any() else row_W
        return row_W
