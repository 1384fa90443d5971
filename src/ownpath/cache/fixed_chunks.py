"""Tables of steps with chunks in fixed places and of fixed sizes, which a graph reads whatever requests bring.

Rows behind those of a step are padded: token -1, position 0, and the last request, which is nobody's: what such a row
writes goes to nobody's slot, and nobody reads its results. Ends of windows that do not happen are -1; near keys that no
row sees copy the step's first one.

Example: 4 rows for 2 requests; one brings 2 tokens behind 300, in slot 5. Token ids 7, 8, -1, -1; positions 300, 301,
0, 0; requests 0, 0, 2, 2; slots 5, 0, 0.

Legend: T rows, R requests and nobody, B blocks of a table, W rows of near.
"""

from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from ownpath.cache.chunks import ALIGNED, ChunkTables, HostChunks
from ownpath.cache.layout import NOBODY
from ownpath.cache.pools import CachePool
from ownpath.cache.tables import StepTables, new_flags
from ownpath.cache.transfer import StepStaging

PADDED = -1
"""The token of a padded row, and an end that does not happen."""


class ChunkShape(NamedTuple):
    """The most rows, requests and blocks of a request's table that a step may have."""

    num_rows: int
    num_requests: int
    num_blocks: int

    def holds(self, tables: StepTables) -> bool:
        """Returns True if a step fits."""
        sizes = tables.row_ends[-1], len(tables.slots), tables.num_blocks
        return all(size <= most for size, most in zip(sizes, self, strict=True))


class FixedChunks:
    """The arrays of steps of one shape, in one buffer on the device."""

    def __init__(self, pool: CachePool, shape: ChunkShape) -> None:
        self.shape, (num_rows, num_requests, num_blocks) = shape, shape
        ratios, older = pool.layout.ratios, num_requests * (pool.spec.config.sliding_window - 1)
        self._sizes = (
            *(num_rows, num_rows, num_rows, num_rows, num_rows + older),
            *(num_rows // ratio + num_requests for ratio in ratios),
            *(num_requests + 1, (num_requests + 1) * num_blocks),
        )
        padded = PADDED, 0, 0, num_requests, 0, *[PADDED] * len(ratios), NOBODY, NOBODY
        self._starts = [0, *accumulate(-(-size // ALIGNED) * ALIGNED for size in self._sizes)]
        self._padded = np.zeros(self._starts[-1], np.int32)
        for part, value in zip(self._parts(self._padded), padded, strict=True):
            part[:] = value
        self._device = torch.tensor(self._padded, device=pool.spec.device)
        views = [self._device[start : start + size] for start, size in zip(self._starts, self._sizes, strict=False)]
        self.token_ids_T, positions_T, places_T, requests_T, sources_W, *ends, slots_R, blocks = views
        places = positions_T, places_T, requests_T, slots_R, blocks.view(-1, num_blocks), sources_W
        flags_LT = new_flags(pool, num_rows)
        self.tables = ChunkTables(pool, *places, dict(zip(ratios, ends, strict=True)), flags_LT)
        """The arrays on the device, in the form that the model takes."""

    @property
    def num_words(self) -> int:
        """Integers of the buffer."""
        return len(self._padded)

    def send(self, tables: StepTables, token_ids_T: torch.Tensor, staging: StepStaging) -> None:
        """Has the device take up a step that fits. Does not wait."""
        host = HostChunks.of(tables)
        staging.send(lambda words: self._fill(words, host), self._device)
        self.token_ids_T[: len(token_ids_T)].copy_(token_ids_T)

    def _fill(self, words: "np.ndarray[tuple[int], np.dtype[np.int32]]", host: HostChunks) -> None:
        words[: len(self._padded)] = self._padded
        _, *parts, blocks = self._parts(words)
        arrays = (*host[:4], *host.ends.values(), host.slots_R)
        for part, array in zip(parts, arrays, strict=True):
            part[: len(array)] = array
        num_requests, num_blocks = host.blocks_RB.shape
        blocks.reshape(-1, self.shape.num_blocks)[:num_requests, :num_blocks] = host.blocks_RB

    def _parts(
        self, words: "np.ndarray[tuple[int], np.dtype[np.int32]]"
    ) -> "Iterator[np.ndarray[tuple[int], np.dtype[np.int32]]]":
        for start, size in zip(self._starts, self._sizes, strict=False):
            yield words[start : start + size]
