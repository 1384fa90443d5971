"""The likeliest tokens of the rows that ask for some: one pass and one read, however many rows of a step ask.

Shapes: V vocabulary, S rows that ask, K likeliest tokens, the same number for all, so that a row's answer does not
depend on what others ask.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from ownpath.engine.limits import MAX_TOP_LOGPROBS

Top = tuple[tuple[int, float], ...]
"""Tokens and their log-probs, the likeliest first; of equal ones the lower id."""


class PendingTops(NamedTuple):
    """A pass under way. packed: ids, then log-probs as integers, int32 [2, S, K]. wanted: row -> number of tokens."""

    packed: torch.Tensor
    wanted: Mapping[int, int]


def start_tops(logits_RV: torch.Tensor, wanted: Mapping[int, int]) -> PendingTops:
    """Starts the pass over these rows of float32 [R, V]; does not wait. wanted: row -> number of tokens, at most 20."""
    rows_SV = logits_RV[list(wanted)].float()
    top = torch.log_softmax(rows_SV, dim=-1).topk(min(MAX_TOP_LOGPROBS, rows_SV.shape[-1]), dim=-1)
    return PendingTops(torch.stack((top.indices.int(), top.values.view(torch.int32))), wanted)


def read_tops(pending: PendingTops) -> dict[int, Top]:
    """Waits for the pass; returns each row's likeliest tokens. Those of rows that are not finite mean nothing."""
    ids_SK, values_SK = pending.packed.numpy(force=True)
    pairs = zip(ids_SK.tolist(), values_SK.view(np.float32).tolist(), strict=True)
    return {
        row: _ordered(ids, values)[:count]
        for (row, count), (ids, values) in zip(pending.wanted.items(), pairs, strict=True)
    }


def top_tokens(logits_RV: torch.Tensor, wanted: Mapping[int, int]) -> dict[int, Top]:
    """Returns the likeliest tokens of the rows that want some; without any, does not look at the logits."""
    return read_tops(start_tops(logits_RV, wanted)) if wanted else {}


def with_own(top: Top, token_id: int, logprob: float) -> Top:
    """Returns the likeliest tokens with the sampler's number for the chosen one, if it is among them: a client that
    looks it up finds the same there."""
    return tuple((other, logprob if other == token_id else value) for other, value in top)


def _ordered(ids: Sequence[int], values: Sequence[float]) -> Top:
    return tuple(sorted(zip(ids, values, strict=True), key=lambda pair: (-pair[1], pair[0])))
