"""Tables of a step with chunks: where each row's window and entries are, as kernels read them.

Rows of a chunk see each other's keys, which no ring holds at once. So a layer's window keys lie in one array, ``near``:
of each request the keys in its ring that its first row sees, oldest first, then those of its rows.

Example: a request with 300 tokens brings 2 more, another without any brings 3. Near has 127 + 2 + 3 rows; the first
request's rows have places 127 and 128, the other's 129 to 131.

Legend: T rows of the step, R requests, B blocks of a request, H head dim, W rows of near.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from ownpath.cache.layout import aligned_rows
from ownpath.cache.pools import CachePool
from ownpath.cache.tables import PassedEnd, StepTables
from ownpath.cache.transfer import upload

ALIGNED = 4
"""Numbers of 16 bytes."""
SCORE_BYTES = 64 * 2**20
"""Of the workspace for index scores, which a long context's rows share in turn."""
HostArray: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"


class HostChunks(NamedTuple):
    """The arrays of a step on the host, as ``ChunkTables`` has them."""

    positions_T: HostArray
    places_T: HostArray
    requests_T: HostArray
    sources_W: HostArray
    ends: Mapping[int, HostArray]
    slots_R: HostArray
    blocks_RB: HostArray

    @classmethod
    def of(cls, tables: StepTables) -> "HostChunks":
        """Builds the arrays of a step. Block tables are cut to the blocks that the step needs."""
        spec = tables.pool.spec
        counts = [rows.stop - rows.start for rows in tables.rows]
        places, sources, number = [], [], 0
        for slot, start, rows in zip(tables.slots, tables.starts, tables.rows, strict=True):
            older = min(start, spec.config.sliding_window - 1)
            ring = slot * spec.window_rows + np.arange(start - older, start) % spec.window_rows
            sources += [-1 - ring, np.arange(rows.start, rows.stop)]
            places.append(number + older + np.arange(rows.stop - rows.start))
            number += older + rows.stop - rows.start
        positions = tables.places.positions_T.numpy()
        return cls(
            positions,
            np.concatenate(places),
            np.repeat(np.arange(len(counts)), counts),
            np.concatenate(sources),
            {ratio: np.flatnonzero((positions + 1) % ratio == 0) for ratio in tables.pool.layout.ratios},
            np.array(tables.slots),
            tables.places.blocks_RB[:, : tables.num_blocks].numpy(),
        )


@dataclass(frozen=True)
class ChunkTables:
    """The arrays of a step, all int32, on the pool's device.

    positions_T, requests_T: of each row; places_T: its own key's row of near. slots_R; blocks_RB: block tables.
    sources_W: of each near key the row of the step, or -1 - r for row r of the window's pool. ends: the rows that end a
    window, by compress ratio; -1 where there is none. flags_LT, passed: as of ``StepTables``.

    Where sizes are fixed (``fixed_chunks``), the last request is nobody's: padded rows have it, and position 0.
    """

    pool: CachePool
    positions_T: torch.Tensor
    places_T: torch.Tensor
    requests_T: torch.Tensor
    slots_R: torch.Tensor
    blocks_RB: torch.Tensor
    sources_W: torch.Tensor
    ends: Mapping[int, torch.Tensor]
    flags_LT: torch.Tensor
    passed: tuple[PassedEnd, ...] = ()

    @classmethod
    def of(cls, tables: StepTables) -> "ChunkTables":
        """Builds the arrays of a step."""
        host = HostChunks.of(tables)
        arrays = [*host[:4], host.slots_R, host.blocks_RB, *host.ends.values()]
        positions_T, places_T, requests_T, sources_W, slots_R, blocks, *ends = _upload_together(
            arrays, tables.pool.spec.device
        )
        blocks_RB, of_ratio = blocks.view(host.blocks_RB.shape), dict(zip(host.ends, ends, strict=True))
        places = positions_T, places_T, requests_T, slots_R, blocks_RB, sources_W
        return cls(tables.pool, *places, of_ratio, tables.flags_LT, tables.passed)

    def pieces(self, per_block: int) -> Iterator[slice]:
        """Yields runs of rows whose scores of all entries fit the workspace. per_block: entries of a block."""
        num_rows, width = len(self.positions_T), self.blocks_RB.shape[1] * per_block
        count = max(aligned_rows(1), SCORE_BYTES // (4 * width) // aligned_rows(1) * aligned_rows(1))
        for start in range(0, num_rows, count):
            yield slice(start, min(start + count, num_rows))


def _upload_together(arrays: Sequence[HostArray], device: torch.device) -> list[torch.Tensor]:
    """Copies arrays to a device as int32, all at once; each begins where kernels may read 16 bytes at a time."""
    starts = [0, *accumulate(-(-array.size // ALIGNED) * ALIGNED for array in arrays)]
    together = np.zeros(starts[-1], np.int32)
    for start, array in zip(starts, arrays, strict=False):
        together[start : start + array.size] = array.reshape(-1)
    on_device = upload(torch.from_numpy(together), device)
    pairs = zip(starts, arrays, strict=False)
    return [on_device[start : start + array.size] for start, array in pairs]
