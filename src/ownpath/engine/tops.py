"""The likeliest tokens of the rows that ask for some: one pass and one read, however many rows of a step ask.

Shapes: V vocabulary, S rows that ask, K likeliest tokens, the same number for all, so that a row's answer does not
depend on what others ask.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch

from ownpath.engine.limits import MAX_TOP_LOGPROBS
from ownpath.engine.transfer import to_device, to_host

Top = tuple[tuple[int, float], ...]
"""Tokens and their log-probs, the likeliest first; of equal ones the lower id."""


class PendingTops(NamedTuple):
    """A pass under way. packed: ids, then log-probs as integers, int32 [2, S, K], on the host once the device is
    behind the pass. wanted: row -> number of tokens."""

    packed: torch.Tensor
    wanted: Mapping[int, int]


def start_tops(logits_RV: torch.Tensor, wanted: Mapping[int, int]) -> PendingTops:
    """Starts the pass over these rows of float32 [R, V]; does not wait. wanted: row -> number of tokens, at most 20."""
    rows_SV = logits_RV[to_device(np.array([*wanted]), logits_RV.device)].float()
    top = torch.log_softmax(rows_SV, dim=-1).topk(min(MAX_TOP_LOGPROBS, rows_SV.shape[-1]), dim=-1)
    return PendingTops(to_host(torch.stack((top.indices.int(), top.values.view(torch.int32)))), wanted)


def read_tops(pending: PendingTops) -> dict[int, Top]:
    """Returns each row's likeliest tokens; the device is behind the pass. Those of rows that are not finite mean
    nothing."""
    ids_SK, values_SK = pending.packed.numpy()
    values_SK = values_SK.view(np.float32)
    order_SK = np.lexsort((ids_SK, -values_SK))
    ids, values = (np.take_along_axis(array, order_SK, axis=1).tolist() for array in (ids_SK, values_SK))
    return {
        row: tuple(zip(ids[n][:count], values[n][:count], strict=True))
        for n, (row, count) in enumerate(pending.wanted.items())
    }


def top_tokens(logits_RV: torch.Tensor, wanted: Mapping[int, int]) -> dict[int, Top]:
    """Returns the likeliest tokens of the rows that want some; without any, does not look at the logits."""
    if not wanted:
        return {}
    pending = start_tops(logits_RV, wanted)
    if logits_RV.device.type == "cuda":
        torch.cuda.current_stream(logits_RV.device).synchronize()
    return read_tops(pending)


def with_own(top: Top, token_id: int, logprob: float) -> Top:
    """Returns the likeliest tokens with the sampler's number for the chosen one, if it is among them: a client that
    looks it up finds the same there."""
    return tuple((other, logprob if other == token_id else value) for other, value in top)
