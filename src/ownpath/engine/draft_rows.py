"""The arrays of steps with drafts: in which each request's rows go on, and what the host reads of them.

Legend: R requests, T rows of a step, W rows that there is room for, L layers; request r has rows 2 r and 2 r + 1.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch

from ownpath.cache.layout import aligned_rows
from ownpath.cache.pools import CachePool
from ownpath.cache.tables import first_flagged, new_flags
from ownpath.engine.rows import NUM_TURNS, RowArrays
from ownpath.engine.sampler import NUM_SAMPLED, sampled_views
from ownpath.engine.tops import Top
from ownpath.kernels.drafts.types import ACCEPTED, GUESS, ROWS, AcceptKernel, DraftRows, GoOnKernel
from ownpath.kernels.registry import KERNELS
from ownpath.kernels.sample.types import FilterRows, Sampled, SampleRows
from ownpath.loading import device_caps
from ownpath.ops import OpKind
from ownpath.plan.select import Choice, select

_FLAGS = GUESS + 1
"""The first row of a step's results that has the flags of a layer."""
assert ACCEPTED == NUM_SAMPLED


class DraftedTokens(NamedTuple):
    """A step's results by request. token_ids: the tokens that count, one or two; ``None`` where a logit is not finite.
    logprobs: theirs. guesses: of the token behind them. flagged, tops: as of ``StepTokens``, by row; request r has
    rows 2 r and 2 r + 1."""

    token_ids: list[list[int | None]]
    logprobs: list[list[float]]
    guesses: list[int]
    flagged: dict[int, int]
    tops: Mapping[int, Top]


class DraftArrays:
    """The arrays of up to ``max_requests`` requests. rows: what the kernels at the end of a step read and write."""

    def __init__(self, pool: CachePool, held: RowArrays, max_requests: int) -> None:
        device, columns, count = pool.spec.device, held.columns, aligned_rows(max_requests)
        width, num_fields = len(columns.tokens), _FLAGS + len(new_flags(pool, 1))
        self._columns, self._max_requests = columns, max_requests
        self._floats, integers = (
            torch.zeros(3, count, dtype=dtype, device=device) for dtype in (torch.float32, torch.int32)
        )
        place_R, index_R, self._top_k = integers
        self._seeds = torch.zeros(count, dtype=torch.int64, device=device)
        self._faults, following_W = torch.zeros(2, width, dtype=torch.int32, device=device)
        results_NW = torch.zeros(num_fields, width, dtype=torch.int32, device=device)
        shared_2NW = torch.zeros(NUM_TURNS, *results_NW.shape, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._integers = shared_2NW.numpy()
        first = columns.tokens, columns.pads, columns.known, columns.counts, columns.turns
        self.rows = DraftRows(*first, results_NW, shared_2NW, following_W, place_R, index_R)
        self.drawn_W = results_NW[0]
        """The tokens that the last step drew, int32 [W]."""

    def take(self) -> None:
        """Takes the parameters of each request's first row, which has just been sent: by them its guesses are drawn."""
        columns, count, some = self._columns, self._max_requests, slice(0, ROWS * self._max_requests, ROWS)
        self._floats[:, :count] = columns.floats[:, some]
        self._seeds[:count] = columns.seeds[some]
        self._top_k[:count] = columns.top_k[some]

    def flags(self, num_rows: int) -> torch.Tensor:
        """Returns where selections write: int32 [L, num_rows]."""
        return self.rows.results_NW[_FLAGS:, :num_rows]

    def sampled(self, num_rows: int) -> Sampled:
        """Returns where the sampler writes the rows' tokens."""
        return sampled_views(self.rows.results_NW, num_rows)

    def accepted(self, num_requests: int) -> torch.Tensor:
        """Returns where it is written which guesses are right: int32 [num_requests], every other element."""
        return self.rows.results_NW[ACCEPTED, : ROWS * num_requests : ROWS]

    def guessing(self, num_requests: int) -> SampleRows:
        """Returns how guesses are drawn, from the row behind which each one is: as its target is in the next step."""
        temperatures, top_p, min_p = self._floats[:, :num_requests]
        filters = FilterRows(self._top_k[:num_requests], top_p, min_p)
        index_R, place_R = self.rows.index_R[:num_requests], self.rows.place_R[:num_requests]
        return SampleRows(temperatures, self._seeds[:num_requests], index_R, filters, place_T=place_R)

    def guessed(self, num_rows: int) -> Sampled:
        """Returns where the sampler writes guesses."""
        return Sampled(self.rows.results_NW[GUESS, :num_rows], self._faults[:num_rows], None)

    def read(self, turn: int, count: int, tops: Mapping[int, Top]) -> DraftedTokens:
        """Returns the results of so many requests."""
        integers, num_rows = self._integers[turn], ROWS * count
        tokens, faults, guessed = integers[[0, 1, GUESS], :num_rows].reshape(3, count, ROWS).tolist()
        logprobs = integers[2, :num_rows].view(np.float32).reshape(count, ROWS).tolist()
        accepted = integers[ACCEPTED, :num_rows:ROWS].tolist()
        kept = [
            [None if fault else token for token, fault in zip(*pair, strict=True)][: 1 + more]
            for *pair, more in zip(tokens, faults, accepted, strict=True)
        ]
        guesses = [pair[more] for pair, more in zip(guessed, accepted, strict=True)]
        flagged = {
            row: layer_idx
            for row, layer_idx in first_flagged(integers[_FLAGS:, :num_rows]).items()
            if row % ROWS <= accepted[row // ROWS]
        }
        return DraftedTokens(kept, logprobs, guesses, flagged, tops)


class Accept(NamedTuple):
    """The judgement of guesses, of one stream of calls."""

    kernel: AcceptKernel[object]
    operand: object

    def run(self, rows: DraftRows, num_requests: int, *, is_judged: bool) -> None:
        """See ``AcceptKernel``."""
        self.kernel.run(rows, num_requests, self.operand, is_judged=is_judged)


class GoOn(NamedTuple):
    """The end of a step with drafts, of one stream of calls."""

    kernel: GoOnKernel[object]
    operand: object

    def run(self, rows: DraftRows, num_requests: int) -> None:
        """See ``GoOnKernel``."""
        self.kernel.run(rows, num_requests, self.operand)


def end_kernels_of(device: torch.device) -> tuple[Accept, GoOn]:
    """Returns a device's kernels at the end of a step with drafts."""
    found = []
    for kind in (OpKind.ACCEPT_DRAFTS, OpKind.GO_ON_DRAFTING):
        choice = select(kind, None, device_caps(str(device)))
        assert isinstance(choice, Choice)
        found.append(KERNELS[choice.kernel.name])
    accept, go_on = found
    return Accept(accept, accept.prepare()), GoOn(go_on, go_on.prepare())
