"""Samples next tokens from logits. Every row is decided by itself, whatever else is in the batch.

Shapes: V = vocabulary of the tokenizer, S = rows that sample.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from ownpath.cache.layout import aligned_rows
from ownpath.engine.adjust import Adjuster
from ownpath.engine.request import NonFinite, Request, SamplingParams, ScoredToken
from ownpath.engine.tops import Top
from ownpath.kernels.registry import KERNELS
from ownpath.kernels.sample.types import FilterRows, Sampled, SampleKernel, SampleRows
from ownpath.loading import device_caps
from ownpath.ops import OpKind
from ownpath.plan.select import Choice, select

NAN_BITS = 0x7FC00000
"""A float32 NaN as an integer."""
NUM_SAMPLED = len(Sampled._fields)
"""Rows of a step's results that the sampler writes."""
_SCORED_TOGETHER = 256
"""Rows: at 129,280 tokens, some 400 MB beside the logits."""
NON_FINITE = "the model produced a logit that is not finite"


class RowFailed(RuntimeError):
    """A row without a token, which ends its request alone. non_finite: what was NaN or infinite, if that is why."""

    non_finite: NonFinite | None = None


class NonFiniteLogits(RowFailed):
    """A row of logits that holds NaN or infinity: no token can be chosen from it."""

    non_finite = NonFinite.LOGITS


class NonFiniteIndexScores(RowFailed):
    """An indexer's scores of a request's entries hold NaN or infinity: its answer may rest on the wrong entries."""

    non_finite = NonFinite.INDEX_SCORES

    def __init__(self, layer_idx: int) -> None:
        super().__init__(f"the indexer of layer {layer_idx} produced a score that is not finite")


class GrammarFailed(RowFailed):
    """A grammar that cannot go on in the middle of an answer."""


class SampleRow(NamedTuple):
    """The parameters that turn one row of logits into a token.

    seed: the request's own. num_drawn: tokens that it has drawn already.
    """

    params: SamplingParams
    seed: int
    num_drawn: int


class Drawn(NamedTuple):
    """A row's token, ``None`` if none is due or a logit is not finite, and its log-prob by the raw logits, before
    temperature and filters: NaN if nobody asks for it. top: the likeliest tokens that its request asks for."""

    token_id: int | None = None
    logprob: float = math.nan
    top: Top = ()


class Chosen(NamedTuple):
    """Tokens and log-probs of rows, as ``Drawn`` has them."""

    token_ids: list[int | None]
    logprobs: list[float]


def sample_row(request: Request) -> SampleRow:
    """Returns how a request draws its next token."""
    return SampleRow(request.params, request.seed, len(request.output_ids))


def no_token(request: Request) -> RowFailed:
    """Returns why a row that was to draw has no token."""
    problem = None if request.matcher is None else request.matcher.problem
    return NonFiniteLogits(NON_FINITE) if problem is None else GrammarFailed(problem)


def finite_rows(logits_RV: torch.Tensor) -> list[bool]:
    """Tells for each row whether all its logits are finite, so that a token can be chosen."""
    finite: list[bool] = torch.isfinite(logits_RV).all(dim=-1).tolist()
    return finite


def choose_tokens(logits_SV: torch.Tensor, rows: Sequence[SampleRow], adjusted: SampleRows | None = None) -> Chosen:
    """Chooses one token id per row, with its log-prob in the same pass.

    A GPU always computes log-probs, so that one kernel serves all; a CPU where a row asks.
    Shapes: logits_SV float32 [S, V], cut to the tokenizer's vocabulary, so that every id is a token.
    adjusted: rows, with their places, that are drawn from other logits.
    """
    device, count = logits_SV.device, len(rows)
    asks = device.type != "cpu" or any(row.params.num_logprobs is not None for row in rows)
    if adjusted is None and not asks and all(row.params.greedy for row in rows):
        likeliest: list[int] = logits_SV.argmax(dim=-1).tolist()
        kept = [token if finite else None for token, finite in zip(likeliest, finite_rows(logits_SV), strict=True)]
        return Chosen(kept, [math.nan] * count)
    found = torch.full((NUM_SAMPLED, aligned_rows(count)), NAN_BITS, dtype=torch.int32, device=device)
    kernel, operand = sampler_of(device)
    out = sampled_views(found, count)
    out = out if asks else out._replace(logprob_T=None)
    if adjusted is None or len(adjusted.seed_T) < count:
        kernel.run(logits_SV.float(), _sample_rows(rows, device), operand, out=out)
    if adjusted is not None:
        kernel.run(logits_SV.float(), adjusted, operand, out=out)
    read = found.numpy(force=True)[:, :count]
    tokens, faults = read[:2].tolist()
    kept = [None if fault else token for token, fault in zip(tokens, faults, strict=True)]
    return Chosen(kept, read[2].view(np.float32).tolist())


def sampled_views(chosen: torch.Tensor, count: int) -> Sampled:
    """Returns where the sampler writes the results of ``count`` rows: the first rows of int32 [3 or more, R]."""
    token_T, fault_T, logprob_T = chosen[: len(Sampled._fields), :count]
    return Sampled(token_T, fault_T, logprob_T.view(torch.float32))


def warm_up_sampler(device: torch.device | str, num_vocab: int, row_size: int) -> None:
    """Draws from made-up logits with and without filters, and with adjusted and masked logits, so that no later step
    compiles anything. row_size: elements from one row of a decode step's logits to the next."""
    for size in sorted({num_vocab, row_size}):
        logits_SV = torch.zeros(2, size, device=device)[:, :num_vocab]
        for top_p in (1.0, 0.5):
            choose_tokens(logits_SV, [SampleRow(SamplingParams(1, top_p=top_p), seed, 0) for seed in range(2)])
        for rows in adjusted_kinds(num_vocab, logits_SV.device):
            choose_tokens(logits_SV[:1], [SampleRow(SamplingParams(1), 0, 0)], rows)


def adjusted_kinds(num_vocab: int, device: torch.device) -> tuple[SampleRows, SampleRows]:
    """Returns one row with adjusted logits, first among all others, without a mask and with one: there are no other
    kinds of them."""
    params = SamplingParams(1, repetition_penalty=1.5, logit_bias=((0, 1.0),), min_tokens=1)
    adjuster, request = Adjuster(num_vocab, device, frozenset()), Request([0], params, lambda _: None)
    adjuster.add(request)
    adjusted = adjuster.rows_of([request])
    assert adjusted is not None
    mask_TW = torch.full((1, -(-num_vocab // 32)), -1, dtype=torch.int32, device=device)
    return adjusted, adjusted._replace(mask_TW=mask_TW)


@lru_cache(maxsize=16)
def sampler_of(device: torch.device) -> "tuple[SampleKernel[object], object]":
    """Returns the sampler of a device and its operand; all steps run on one stream."""
    choice = select(OpKind.SAMPLE, None, device_caps(str(device)))
    assert isinstance(choice, Choice)
    kernel: SampleKernel[object] = KERNELS[choice.kernel.name]
    return kernel, kernel.prepare()


def _sample_rows(rows: Sequence[SampleRow], device: torch.device) -> SampleRows:
    def column(values: list[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    filters = None
    if any(row.params.has_filters for row in rows):
        filters = FilterRows(
            column([row.params.top_k for row in rows], torch.int32),
            column([row.params.top_p for row in rows], torch.float32),
            column([row.params.min_p for row in rows], torch.float32),
        )
    return SampleRows(
        column([row.params.temperature for row in rows], torch.float32),
        column([row.seed for row in rows], torch.int64),
        column([row.num_drawn for row in rows], torch.int32),
        filters,
    )


def score_tokens(logits_RV: torch.Tensor, token_ids: Sequence[int], num_top: int) -> list[ScoredToken]:
    """Returns the log-probability and rank of one given token per row, and the ``num_top`` likeliest of the row.

    Shapes: logits_RV float32 [R, V]; token_ids R ids.
    Errors: NonFiniteLogits.
    """
    scored: list[ScoredToken] = []
    for start in range(0, len(token_ids), _SCORED_TOGETHER):
        stop = start + _SCORED_TOGETHER
        scored += _score_some(logits_RV[start:stop], token_ids[start:stop], num_top)
    return scored


def _score_some(logits_RV: torch.Tensor, token_ids: Sequence[int], num_top: int) -> list[ScoredToken]:
    if not all(finite_rows(logits_RV)):
        raise NonFiniteLogits(NON_FINITE)
    logprobs_RV = torch.log_softmax(logits_RV.float(), dim=-1)
    ids_R1 = torch.tensor(list(token_ids), dtype=torch.int64, device=logits_RV.device).unsqueeze(-1)
    own_R1 = logprobs_RV.gather(-1, ids_R1)
    own: list[float] = own_R1.squeeze(-1).tolist()
    ranks: list[int] = (logprobs_RV >= own_R1).sum(-1).tolist()
    top = logprobs_RV.topk(min(num_top, logprobs_RV.shape[-1]), dim=-1)
    tops = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [
        ScoredToken(token_id, logprob, tuple(zip(ids, values, strict=True)), _place(ids, token_id, rank))
        for token_id, logprob, rank, (ids, values) in zip(token_ids, own, ranks, tops, strict=True)
    ]


def _place(likeliest: list[int], token_id: int, rank: int) -> int:
    """Returns a token's rank: its place among the likeliest, where it is one of them."""
    return likeliest.index(token_id) + 1 if token_id in likeliest else rank
