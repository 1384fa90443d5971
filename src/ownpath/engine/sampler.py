"""Samples next tokens from logits. Every row is decided by itself, whatever else is in the batch.

Shapes: V = vocabulary of the tokenizer, S = rows that sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ownpath.engine.request import SamplingParams, ScoredToken

NON_FINITE = "the model produced a logit that is not finite"


class NonFiniteLogits(RuntimeError):
    """A row of logits that holds NaN or infinity: no token can be chosen from it."""


@dataclass(frozen=True)
class SampleRow:
    """The parameters that turn one row of logits into a token."""

    params: SamplingParams
    generator: torch.Generator | None


def new_generator(params: SamplingParams) -> torch.Generator | None:
    """Creates the request's own random stream; None when it needs none. It lives on the CPU, so devices agree."""
    if params.greedy:
        return None
    generator = torch.Generator(device="cpu")
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed(params.seed)
    return generator


def finite_rows(logits_RV: torch.Tensor) -> list[bool]:
    """Tells for each row whether all its logits are finite, so that a token can be chosen."""
    finite: list[bool] = torch.isfinite(logits_RV).all(dim=-1).tolist()
    return finite


def choose_tokens(logits_SV: torch.Tensor, rows: Sequence[SampleRow]) -> list[int]:
    """Chooses one token id per row.

    Shapes: logits_SV float32 [S, V], finite, cut to the tokenizer's vocabulary, so that every id is a token.
    """
    chosen: list[int] = logits_SV.argmax(dim=-1).tolist()
    drawing = [index for index, row in enumerate(rows) if not row.params.greedy]
    if drawing:
        drawn = _draw(logits_SV[drawing], [rows[index] for index in drawing])
        for index, token_id in zip(drawing, drawn, strict=True):
            chosen[index] = token_id
    return chosen


def _draw(logits_SV: torch.Tensor, rows: Sequence[SampleRow]) -> list[int]:
    """Samples within the nucleus by inverse CDF: one uniform number per row, from that row's own generator."""

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits_SV.device).unsqueeze(-1)

    # Subtracting the maximum first keeps a tiny temperature from overflowing: the best entry is exactly 0.
    shifted_SV = logits_SV.double() - logits_SV.double().amax(dim=-1, keepdim=True)
    probs_SV = torch.softmax(shifted_SV / column([row.params.temperature for row in rows]), dim=-1)
    sorted_SV, ids_SV = probs_SV.sort(dim=-1, descending=True, stable=True)
    # A token is in the nucleus while those before it have not reached top_p; the best one always is.
    before_SV = sorted_SV.cumsum(dim=-1) - sorted_SV
    kept_SV = sorted_SV.masked_fill(before_SV >= column([row.params.top_p for row in rows]), 0.0)
    cdf_SV = kept_SV.cumsum(dim=-1)
    uniform_S1 = column([float(torch.rand((), dtype=torch.float64, generator=row.generator)) for row in rows])
    picks_S1 = torch.searchsorted(cdf_SV, uniform_S1 * cdf_SV[:, -1:], right=True)
    # uniform < 1, but its product may round up to the total: stay on the last kept token.
    last_S1 = (kept_SV > 0).sum(dim=-1, keepdim=True) - 1
    token_ids: list[int] = ids_SV.gather(-1, picks_S1.minimum(last_S1)).squeeze(-1).tolist()
    return token_ids


def score_tokens(logits_RV: torch.Tensor, token_ids: Sequence[int], num_top: int) -> list[ScoredToken]:
    """Returns the log-probability of one given token per row, and the ``num_top`` likeliest of the row.

    Shapes: logits_RV float32 [R, V]; token_ids R ids.
    Errors: NonFiniteLogits.
    """
    if not all(finite_rows(logits_RV)):
        raise NonFiniteLogits(NON_FINITE)
    logprobs_RV = torch.log_softmax(logits_RV.float(), dim=-1)
    ids_R1 = torch.tensor(list(token_ids), dtype=torch.int64, device=logits_RV.device).unsqueeze(-1)
    own: list[float] = logprobs_RV.gather(-1, ids_R1).squeeze(-1).tolist()
    top = logprobs_RV.topk(min(num_top, logprobs_RV.shape[-1]), dim=-1)
    tops = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [
        ScoredToken(token_id, logprob, tuple(zip(ids, values, strict=True)))
        for token_id, logprob, (ids, values) in zip(token_ids, own, tops, strict=True)
    ]
