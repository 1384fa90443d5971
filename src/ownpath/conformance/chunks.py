"""Operands of attention over chunks in poisoned memory, and the judging of its results. Tests and bench share it.

Near rows that are no request's, and the entries' memory that no row sees, are full of NaN.

Legend: T rows, N heads, H head dim, R requests, K keys of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from ownpath.conformance.attend import (
    BLOCK_TOKENS,
    HEAD_DIM,
    NUM_PAIRS,
    assert_attention,
    draw_blocks,
    draw_selection,
    exact_rows,
    make_pool,
    visible_rows,
)
from ownpath.conformance.bounds import Exact
from ownpath.kernels.attend.ref import entry_rows, take_keys
from ownpath.kernels.attend.types import WINDOW_ROWS, AttendWeights, DecodeKeys, DecodeRows
from ownpath.kernels.chunks.cases import ChunkCase
from ownpath.kernels.chunks.ref import rows_of
from ownpath.kernels.chunks.types import ChunkKeys, ChunkRows

LONGEST_KEY = 32.0
"""No key of 512 normal values is as long: their norms have a mean of 22.6 and a standard deviation of 0.7."""
GAP = 3
"""Near rows of nobody in front of each request's."""


@dataclass(frozen=True)
class ChunkInputs:
    """The arguments of a call."""

    q_TNH: torch.Tensor
    cos_TF: torch.Tensor
    sin_TF: torch.Tensor
    keys: ChunkKeys
    rows: ChunkRows
    weights: AttendWeights

    @property
    def arguments(
        self,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, ChunkKeys, ChunkRows, AttendWeights]:
        """The arguments in the order of ``run``."""
        return self.q_TNH, self.cos_TF, self.sin_TF, self.keys, self.rows, self.weights

    def part(self, of: slice) -> "ChunkInputs":
        """Returns some of the rows, with queries and lists in memory of their own; near and pool stay."""
        q, cos, sin = (of_all[of].clone() for of_all in (self.q_TNH, self.cos_TF, self.sin_TF))
        taken = rows_of(self.rows, of)
        selection = (None if part is None else part.clone() for part in taken[4:])
        rows = ChunkRows(*(part.clone() for part in taken[:4]), *selection)
        return replace(self, q_TNH=q, cos_TF=cos, sin_TF=sin, rows=rows)


def make_chunk_inputs(
    case: ChunkCase, device: torch.device, seed: int = 0, starts: Sequence[int] | None = None
) -> ChunkInputs:
    """Draws the operands of a case. starts: the position of each request's first row; by default the requests end at
    the case's context, each a little before the one in front of it."""
    g = torch.Generator(device).manual_seed(seed)
    host = torch.Generator().manual_seed(seed)
    counts = case.rows
    if starts is None:
        starts = [max(0, case.context - count - 37 * number) for number, count in enumerate(counts)]
    positions_T = torch.cat([torch.arange(s, s + count) for s, count in zip(starts, counts, strict=True)])
    requests_T = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    near_WH, places_T = _near(starts, counts, g)
    ends_R = torch.tensor([s + count - 1 for s, count in zip(starts, counts, strict=True)])
    blocks_RB, num_blocks = draw_blocks(ends_R, max(case.context, int(ends_R.max()) + 1), host)
    rows = ChunkRows(*(part.to(device, torch.int32) for part in (positions_T, places_T, requests_T, blocks_RB)))
    keys = ChunkKeys(near_WH)
    if case.ratio:
        per_block = BLOCK_TOKENS // case.ratio
        visible = visible_rows(positions_T, blocks_RB[requests_T], case.ratio)
        entries = make_pool(torch.cat(visible).unique(), num_blocks * per_block, per_block, case.fp8, g)
        keys = ChunkKeys(near_WH, entries, per_block, case.ratio)
        if case.ratio == 4:
            rows = rows._replace(**draw_selection(visible, case.topk, host, device))
    num_rows = len(positions_T)
    angles_TF = positions_T.to(device)[:, None] * 10.0 ** (-4 * torch.rand(NUM_PAIRS, generator=g, device=device))
    q = torch.randn(num_rows, case.num_heads, HEAD_DIM, generator=g, device=device)
    q *= 10 ** (2 * torch.rand(num_rows, case.num_heads, 1, generator=g, device=device) - 1)
    sink_N = 2 * torch.randn(case.num_heads, generator=g, device=device)
    weights = AttendWeights(sink_N, HEAD_DIM**-0.5, 1e-6, largest_norm=LONGEST_KEY)
    return ChunkInputs(q.bfloat16(), angles_TF.cos(), angles_TF.sin(), keys, rows, weights)


def _near(starts: Sequence[int], counts: Sequence[int], g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the near keys of all requests, and the place of each row's own."""
    older = [min(start, WINDOW_ROWS - 1) for start in starts]
    ends = list(accumulate(GAP + old + count for old, count in zip(older, counts, strict=True)))
    near_WH = torch.full((ends[-1] + GAP, HEAD_DIM), torch.nan, dtype=torch.bfloat16, device=g.device)
    places = []
    for end, old, count in zip(ends, older, counts, strict=True):
        drawn = torch.randn(old + count, HEAD_DIM, generator=g, device=g.device)
        near_WH[end - count - old : end] = drawn.bfloat16()
        places.append(torch.arange(end - count, end))
    return near_WH, torch.cat(places)


def gather_chunk_keys(inputs: ChunkInputs, t: int, dtype: torch.dtype) -> torch.Tensor:
    """Returns the keys of row t [K, H]: its window's, oldest first, then its entries."""
    keys, rows = inputs.keys, inputs.rows
    own, num_near = int(rows.places_T[t]), min(int(rows.positions_T[t]) + 1, WINDOW_ROWS)
    found = [keys.near_WH[own + 1 - num_near : own + 1].to(dtype)]
    if keys.entries is not None:
        table_1B = rows.blocks_RB[rows.requests_T[t : t + 1].long()]
        selection = (None if part is None else part[t : t + 1] for part in rows[4:])
        of_row = DecodeRows(rows.positions_T[t : t + 1], rows.places_T[t : t + 1], table_1B, *selection)
        found.append(take_keys(keys.entries, entry_rows(DecodeKeys(keys.near_WH, *keys[1:]), of_row, 0), dtype))
    return torch.cat(found)


def exact_chunk(inputs: ChunkInputs) -> Exact:
    """Computes o in float64 from queries rounded as the operation says, with the error that rounding may cause."""
    angles = inputs.cos_TF, inputs.sin_TF
    return exact_rows(inputs.q_TNH, angles, lambda t: gather_chunk_keys(inputs, t, torch.float64), inputs.weights)


def judge_chunk(result: torch.Tensor, inputs: ChunkInputs) -> None:
    """Judges a result. Errors: AssertionError when it is not what the operation defines."""
    assert_attention(result, exact_chunk(inputs))
