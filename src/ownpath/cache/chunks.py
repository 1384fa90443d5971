"""Tables of a step with chunks: where each row's window and entries are, as kernels read them.

Rows of a chunk see each other's keys, which no ring holds at once. So a layer's window keys lie in one array, ``near``:
of each request the keys in its ring that its first row sees, oldest first, then those of its rows.

Example: a request with 300 tokens brings 2 more, another without any brings 3. Near has 127 + 2 + 3 rows; the first
request's rows have places 127 and 128, the other's 129 to 131.

Legend: T rows of the step, R requests, B blocks of a request, H head dim, W rows of near.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ownpath.cache.keys import StoredKeys
from ownpath.cache.layout import BLOCK_TOKENS, aligned_rows
from ownpath.cache.tables import StepTables

SCORE_BYTES = 64 * 2**20
"""Of the workspace for index scores, which a long context's rows share in turn."""


@dataclass(frozen=True)
class ChunkTables:
    """The arrays of a step, all int32 but ``older_rows``, int64, on the pool's device.

    positions_T, requests_T: of each row; places_T: its own key's row of near. blocks_RB: block tables, cut to the
    blocks that the step needs. older_rows: rows of the window's pool, of one request after the other; older: how many
    of each. rows: of each request.
    """

    positions_T: torch.Tensor
    places_T: torch.Tensor
    requests_T: torch.Tensor
    blocks_RB: torch.Tensor
    older_rows: torch.Tensor
    older: tuple[int, ...]
    rows: tuple[slice, ...]

    @classmethod
    def of(cls, tables: StepTables) -> "ChunkTables":
        """Builds the arrays of a step."""
        spec, device = tables.pool.spec, tables.positions_T.device
        counts = [rows.stop - rows.start for rows in tables.rows]
        older = [min(start, spec.config.sliding_window - 1) for start in tables.starts]
        first_places = np.cumsum([0, *np.add(older, counts)])[:-1] + older
        ring = spec.window_rows
        olds = (slot * ring + np.arange(start - old, start) % ring for slot, start, old in
                zip(tables.slots, tables.starts, older, strict=True))  # fmt: skip
        places = (np.arange(first, first + count) for first, count in zip(first_places, counts, strict=True))
        requests = np.repeat(np.arange(len(counts)), counts)
        most = max(start + count for start, count in zip(tables.starts, counts, strict=True))
        blocks_RB = tables.blocks_RB[:, : -(-most // BLOCK_TOKENS)]

        def upload(array: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> torch.Tensor:
            return torch.from_numpy(array.astype(np.int32)).to(device)

        return cls(
            tables.positions_T.to(torch.int32),
            upload(np.concatenate([*places])),
            upload(requests),
            blocks_RB.to(torch.int32).contiguous(),
            torch.from_numpy(np.concatenate([*olds])).to(device),
            tuple(older),
            tables.rows,
        )

    def near(self, window: StoredKeys, kv_TH: torch.Tensor) -> torch.Tensor:
        """Returns a layer's near keys [W, H]: from its ring, and the step's own as later steps will read them."""
        own_TH = window.rounded(kv_TH)
        if not any(self.older):
            return own_TH.contiguous()
        older = window.read(self.older_rows).split(self.older)
        parts = zip(older, self.rows, strict=True)
        return torch.cat([keys for old, of in parts for keys in (old, own_TH[of])])

    def pieces(self, per_block: int) -> Iterator[slice]:
        """Yields runs of rows whose scores of all entries fit the workspace. per_block: entries of a block."""
        num_rows, width = len(self.positions_T), self.blocks_RB.shape[1] * per_block
        count = max(aligned_rows(1), SCORE_BYTES // (4 * width) // aligned_rows(1) * aligned_rows(1))
        for start in range(0, num_rows, count):
            yield slice(start, min(start + count, num_rows))
