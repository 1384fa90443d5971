"""Arguments of attention over chunks, and the protocol of its kernels.

A chunk is rows of one request at consecutive positions; a call has the rows of one or several requests. Rows of a chunk
see each other's keys, so these do not come from the ring, which holds the last 128 alone, but from ``near``: for each
request the keys of its ring that its first row sees, oldest first, then those of its own rows.

Legend: T rows, N heads, H head dim, F rotary channel pairs, W rows of near, R requests, B blocks of a request's table,
K most entries of a selection.
"""

from typing import NamedTuple, Protocol

from torch import Tensor

from ownpath.kernels.attend.types import AttendWeights
from ownpath.kernels.contract import Kernel, Operand


class ChunkKeys(NamedTuple):
    """The keys of one layer, which are the values too.

    near_WH: bfloat16, the windows' keys of all requests. entries: bfloat16 [blocks * per_block, H], or FP8 pages uint8
    [blocks, per_block * 584] as ``DecodeKeys`` has them; ``None`` without compression. per_block: entries of a block of
    256 tokens. ratio: tokens per entry: 0, 4 (CSA) or 128 (HCA).
    """

    near_WH: Tensor
    entries: Tensor | None = None
    per_block: int = 0
    ratio: int = 0

    @property
    def is_fp8(self) -> bool:
        """True for entries in FP8 pages."""
        return self.entries is not None and self.entries.itemsize == 1


class ChunkRows(NamedTuple):
    """The place of each row. All int32, contiguous.

    positions_T: of the row's token. places_T: its own key's row of near; the row sees that one and up to 127 before it,
    as many as its position has. requests_T: its request. blocks_RB: each request's block table. Ratio 128: the row sees
    entries 0 to (position + 1) // 128 - 1, entry e in row ``blocks[e // per_block] * per_block + e % per_block``.
    selected_TK, num_selected_T: ratio 4: as of ``DecodeRows``.
    """

    positions_T: Tensor
    places_T: Tensor
    requests_T: Tensor
    blocks_RB: Tensor
    selected_TK: Tensor | None = None
    num_selected_T: Tensor | None = None


class ChunkKernel(Kernel[Operand], Protocol[Operand]):
    """o[t] = the rotated-back attention of the normed, rotated query t over its window and entries.

    What ``AttendKernel`` computes, step by step; a row's bits depend on the row alone.
    """

    def prepare(self, weights: AttendWeights) -> Operand:
        """Makes the operand. ``spare`` is not read."""

    def variant(self, q_TNH: Tensor, keys: ChunkKeys, rows: ChunkRows, operand: Operand) -> str | None:
        """Returns the name of the variant that a call launches; ``None`` for a kernel without variants."""

    def run(
        self,
        q_TNH: Tensor,
        cos_TF: Tensor,
        sin_TF: Tensor,
        keys: ChunkKeys,
        rows: ChunkRows,
        operand: Operand,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """Computes o [T, N, H] for raw queries q [T, N, H] and float32 angles. Errors: ValueError naming what is
        wrong."""
