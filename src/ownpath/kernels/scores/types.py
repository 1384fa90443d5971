"""Arguments of the indexer's scores and of the selection by them.

Legend: T rows of a step; B blocks of a block table; I index heads, H index head dim.
"""

from typing import NamedTuple, Protocol

import torch

from ownpath.kernels.contract import Kernel, Operand

INDEX_DIM, ROTARY_DIM = 128, 64
"""Channels of an index key, and how many of them, at the end, are rotated."""
FP8_KEY_BYTES = INDEX_DIM + 4
"""Bytes of a key in an FP8 page: E4M3 codes and a float32 scale."""
FP4_KEY_BYTES = INDEX_DIM // 2 + INDEX_DIM // 32
"""Bytes of a key in an FP4 page: E2M1 codes, two to a byte, and E8M0 scales of 32 channels."""


class PagedRows(NamedTuple):
    """The place of each row of a step in the paged caches.

    positions int32 [T], of the row's token; blocks int32 [T, B], the block table of the row's request. A row that pads
    the step has position 0.
    """

    positions_T: torch.Tensor
    blocks_TB: torch.Tensor


class EntryPages(NamedTuple):
    """The layout of a layer's entries. per_block: entries of a block; ratio: tokens of an entry.

    Entry e of a row is row ``blocks[e // per_block] * per_block + e % per_block`` of the pool. The row at position p
    sees the entries below (p + 1) // ratio.
    """

    per_block: int
    ratio: int


CSA_PAGES = EntryPages(per_block=64, ratio=4)


class IndexQuery(NamedTuple):
    """The raw projections of a step's rows, and their rotations.

    q bfloat16 [T, I, H], not yet rotated; weights bfloat16 or float32 [T, I], not yet scaled; cos and sin float32
    [T, 32]. Rows of q and weights may be slices of wider rows.
    """

    q_TIH: torch.Tensor
    weights_TI: torch.Tensor
    cos_TF: torch.Tensor
    sin_TF: torch.Tensor


class IndexScoresKernel(Kernel[Operand], Protocol[Operand]):
    """score[t, c] = sum over heads of weight * relu(rotated query . key c), for the visible entries c of each row."""

    def prepare(self, weights: EntryPages) -> Operand:
        """Makes the operand of a layer's layout."""

    def variant(self, query: IndexQuery, operand: Operand) -> str | None:
        """See ``LinearKernel``."""

    def run(
        self,
        query: IndexQuery,
        keys: torch.Tensor,
        rows: PagedRows,
        operand: Operand,
        *,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes float32 [T, B * per_block] from the pool's keys.

        keys: bfloat16 [blocks * per_block, H], or pages uint8. An FP8 page, per_block * (H + 4) bytes, is the E4M3
        codes of its keys, then their float32 scales, which are not negative. An FP4 page, per_block * 68 bytes, is the
        E2M1 codes of its keys, two to a byte, the even channel in the low half, then their E8M0 scales, four of each.

        What follows a row's visible entries is undefined. Errors: ValueError naming the operand.
        """
