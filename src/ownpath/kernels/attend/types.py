"""Arguments of decode attention over the caches, and the protocol of its kernels.

One row of a call is one token of one request: a ring of 128 keys holds exactly what one row sees. Where a request has
several rows in a call, at consecutive positions, rings are longer by ``spare`` rows.

Legend: T rows, N heads, H head dim, F rotary channel pairs, B blocks of a row's table, K most entries of a selection.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from ownpath.formats import FP8_KEY_BYTES
from ownpath.kernels.contract import Kernel, Operand

HEAD_DIM = 512
SAFE_SCORE = 100.0
"""A softmax of scores up to that needs no maximum that is taken away: 2^100 times a million keys, times values, is a
float32, and so is 2^-100."""
WINDOW_ROWS = 128
"""Keys of the window that a row at position p sees: of positions max(0, p - 127) to p."""
KEY_BYTES = FP8_KEY_BYTES
"""Bytes of a key in an FP8 page."""


@dataclass(frozen=True)
class AttendWeights:
    """sink float32 [N]: a learned logit for each head, part of the softmax's sum and of nothing else.

    softmax_scale: of the scores. eps: added to the mean square of a head's query. num_rotary: rotary channels, the
    last ones of a head, in pairs (2i, 2i + 1). is_stepwise: the norm of queries rounds after every operation, as
    DeepSeek's published code does. spare: rows of a slot's ring beyond the window; in a call a request has up to 1 +
    spare rows. largest_norm: a bound of the keys' L2 norms; infinite where none is known.
    """

    sink_N: Tensor
    softmax_scale: float
    eps: float
    num_rotary: int = 64
    is_stepwise: bool = False
    spare: int = 0
    largest_norm: float = math.inf

    @property
    def is_bounded(self) -> bool:
        """True if no score, in powers of two, is beyond +-``SAFE_SCORE``: by the norms of query and key.

        A normed query of 512 channels is up to sqrt(512) long, and 2^-6 more where norm, rotation and results are
        rounded to BF16.
        """
        longest = HEAD_DIM**0.5 * (1 + 2**-6)
        score: float = self.softmax_scale * longest * self.largest_norm / math.log(2)
        return score <= SAFE_SCORE

    @property
    def ring_rows(self) -> int:
        """Rows of a slot's ring; position p is in row p % ring_rows."""
        return WINDOW_ROWS + self.spare


class DecodeKeys(NamedTuple):
    """The keys of one layer, which are the values too, of all requests.

    window: bfloat16 [slots * ring_rows, H], or FP8 pages uint8 [slots, ring_rows * 584].
    entries: bfloat16 [blocks * per_block, H], or FP8 pages uint8 [blocks, per_block * 584]; ``None`` without
        compression. It has the window's form.
    per_block: entries of a block of 256 tokens, 256 // ratio. ratio: tokens per entry: 0, 4 (CSA) or 128 (HCA).

    An FP8 page of R keys is R * 576 bytes, a key's 448 E4M3 and 64 BF16 channels; then R * 8 bytes, a key's 7 E8M0
    scales of 64 channels each and a pad byte.
    """

    window: Tensor
    entries: Tensor | None = None
    per_block: int = 0
    ratio: int = 0

    @property
    def is_fp8(self) -> bool:
        """True for FP8 pages."""
        return self.window.itemsize == 1


class DecodeRows(NamedTuple):
    """The place of each row in the caches. All int32, contiguous.

    positions_T: of the row's token. slots_T: the row's ring. blocks_TB: its block table; B fixes the longest context,
    256 * B. Ratio 128: the row sees entries 0 to (position + 1) // 128 - 1, entry e in row
    ``blocks[e // per_block] * per_block + e % per_block``.
    selected_TK, num_selected_T: ratio 4: the rows of ``entries`` that the row attends to, ascending, and how many there
        are; what follows them is undefined.

    A padded row has position 0, slot 0 and a table of zeros. Its result is undefined and may be NaN.
    """

    positions_T: Tensor
    slots_T: Tensor
    blocks_TB: Tensor
    selected_TK: Tensor | None = None
    num_selected_T: Tensor | None = None


class AttendKernel(Kernel[Operand], Protocol[Operand]):
    """o[t] = the rotated-back attention of the normed, rotated query t over its window and entries."""

    def prepare(self, weights: AttendWeights) -> Operand:
        """Makes the operand."""

    def variant(self, q_TNH: Tensor, keys: DecodeKeys, rows: DecodeRows, operand: Operand) -> str | None:
        """Returns the names of the variants that a call launches; ``None`` for a kernel without variants."""

    def workspace(self, q_TNH: Tensor, keys: DecodeKeys, rows: DecodeRows, operand: Operand) -> Tensor | None:
        """Allocates float32 scratch for calls of this form; ``None`` if they need none. Values are not read."""

    def run(
        self,
        q_TNH: Tensor,
        cos_TF: Tensor,
        sin_TF: Tensor,
        keys: DecodeKeys,
        rows: DecodeRows,
        operand: Operand,
        *,
        out: Tensor | None = None,
        workspace: Tensor | None = None,
    ) -> Tensor:
        """Computes o [T, N, H] for raw queries q [T, N, H], as the projection leaves them, and float32 angles.

        In order: each head's query is normed over H (eps, no weight) and rounded; its last channels are rotated by the
        angles and rounded; scores in float32 of the window's and the entries' keys; softmax with the sink; weights
        rounded; the sums over values divided; the last channels rotated back in float32; one rounding.

        Errors: ValueError naming what is wrong.
        """
