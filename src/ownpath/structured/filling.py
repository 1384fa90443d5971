"""Fills masks of several grammars at once, on several cores, without Python's lock."""

import os
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from ownpath.engine.masks import MaskWords
from ownpath.structured.vocabulary import load_library

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

NUM_THREADS = min(8, (os.cpu_count() or 1) // 2)
"""Half of the cores at most: the rest computes beside."""
MOST_ALONE = 3
"""Grammars that the calling thread fills by itself: to wake others takes as long as so many masks."""


def fill_grammars(grammars: "Sequence[tuple[LLMatcher, int]]", rows_SW: MaskWords) -> None:
    """Writes which tokens may be next by each grammar, into the row beside it."""
    # The library writes as many words as it has tokens for.
    start, row_bytes = rows_SW.ctypes.data, rows_SW.strides[0]
    if NUM_THREADS < 2 or len(grammars) <= MOST_ALONE:
        for grammar, row in grammars:
            grammar.unsafe_compute_mask_ptr(start + row * row_bytes, row_bytes)
    else:
        _executor().unsafe_compute_mask_ptr(list(grammars), start, row_bytes, len(rows_SW))


@cache
def _executor() -> "LLExecutor":
    executor: LLExecutor = load_library().LLExecutor(NUM_THREADS)
    return executor
