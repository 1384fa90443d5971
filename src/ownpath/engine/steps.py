"""Runs the steps that the engine schedules, and reports what each of them gave its requests.

A step in which every request has one row goes to the decoder, if there is one; any other is one forward of the model.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch

from ownpath.cache.pools import SequenceCache
from ownpath.config import ModelConfig
from ownpath.engine.adjust import Adjuster
from ownpath.engine.batch import LogitsShare, build_batch, decode_share
from ownpath.engine.decoder import Decoder
from ownpath.engine.flags import IndexFlags, tell_flagged
from ownpath.engine.reports import Reporter
from ownpath.engine.request import Request, ScoredToken, StepOutput, plain_output
from ownpath.engine.rows import step_rows
from ownpath.engine.sampler import (
    Drawn,
    NonFiniteIndexScores,
    RowFailed,
    choose_tokens,
    no_token,
    sample_row,
    score_tokens,
)
from ownpath.engine.scheduler import ScheduledChunk
from ownpath.engine.tops import top_tokens, with_own
from ownpath.model.batch import ForwardBatch


class LanguageModel(Protocol):
    """The model as the engine uses it."""

    @property
    def config(self) -> ModelConfig: ...

    def new_cache(self) -> SequenceCache: ...

    def forward(self, batch: ForwardBatch) -> torch.Tensor: ...


def wanted_tops(rows: Iterable[tuple[int, Request]]) -> dict[int, int]:
    """Returns the rows of logits, given with their requests, that likeliest tokens are wanted of, and how many."""
    return {row: request.params.num_logprobs for row, request in rows if request.params.num_logprobs}


class StepRunner:
    """Runs steps on the engine's thread. decoder: runs those in which every request has one row; ``None``: the model
    runs all. device: where the model computes. num_vocab: ids below it are tokens."""

    def __init__(
        self,
        model: LanguageModel,
        decoder: Decoder | None,
        device: str,
        num_vocab: int,
        adjuster: Adjuster,
        reporter: Reporter,
    ) -> None:
        self._model, self._decoder, self._device, self._num_vocab = model, decoder, device, num_vocab
        self._adjuster, self._reporter = adjuster, reporter
        self._flags = IndexFlags()

    def step(self, chunks: Sequence[ScheduledChunk]) -> None:
        """Runs the scheduled chunks: one forward, one token for each sequence that is due one."""
        if self._decoder is not None and all(chunk.num_tokens == 1 for chunk in chunks):
            self._decode(self._decoder, chunks)
            return
        batch, shares = build_batch(chunks, self._device)
        logits_RV = self._model.forward(batch)[:, : self._num_vocab]
        drawn = self._sample(logits_RV, shares)
        self._flags.note(batch.tables, [chunk.request for chunk in chunks])
        if any(share.is_answered for share in shares):
            self._flags.read()
        for share, one in zip(shares, drawn, strict=True):
            self._answer(share, one, logits_RV)

    def _decode(self, decoder: Decoder, chunks: Sequence[ScheduledChunk]) -> None:
        """Runs a decode step, which chooses its tokens on the device.

        Most rows only extend an answer by a token, and are reported without a look at their logits.
        """
        requests = [chunk.request for chunk in chunks]
        done = decoder.step(step_rows(requests), self._adjuster.rows_of(requests))
        self._flags.read()
        tell_flagged(done.flagged, requests)
        tops = top_tokens(done.logits_TV, wanted_tops(enumerate(requests)))
        for row, (request, token_id) in enumerate(zip(requests, done.token_ids, strict=True)):
            if token_id is None or request.needs_logits:
                drawn = Drawn(token_id, float(done.logprobs_T[row]), tops.get(row, ()))
                self._answer(decode_share(row, chunks[row]), drawn, done.logits_TV)
            elif request.params.num_logprobs is None:
                self._extend(request, token_id, plain_output(token_id))
            else:
                token = ScoredToken(token_id, float(done.logprobs_T[row]))
                self._extend(request, token_id, StepOutput(token=token))

    def _extend(self, request: Request, token_id: int, output: StepOutput) -> None:
        """Reports one more token of an answer."""
        request.output_ids.append(token_id)
        request.num_computed += 1
        self._reporter.tell(request, output)

    def _sample(self, logits_RV: torch.Tensor, shares: list[LogitsShare]) -> list[Drawn]:
        """Samples the next token of every share; without a token where none is due or none can be chosen."""
        due = {n: share.sample_row for n, share in enumerate(shares) if share.sample_row is not None}
        drawn = [Drawn()] * len(shares)
        if due:
            requests = [shares[n].chunk.request for n in due]
            rows, adjusted = [sample_row(one) for one in requests], self._adjuster.rows_of(requests)
            found = choose_tokens(logits_RV[list(due.values())], rows, adjusted)
            tops = top_tokens(logits_RV, wanted_tops(zip(due.values(), requests, strict=True)))
            for (n, row), token_id, logprob in zip(due.items(), *found, strict=True):
                drawn[n] = Drawn(token_id, logprob, tops.get(row, ()))
        return drawn

    def _answer(self, share: LogitsShare, drawn: Drawn, logits_RV: torch.Tensor) -> None:
        """Advances one request by its chunk and reports to it. An error here fails only this request."""
        request = share.chunk.request
        try:
            output = self._advance(share, drawn, logits_RV)
        except RowFailed as error:
            self._reporter.fail(request, str(error), error.non_finite)
        else:
            self._reporter.tell(request, output)

    def _advance(self, share: LogitsShare, drawn: Drawn, logits_RV: torch.Tensor) -> StepOutput:
        request, params = share.chunk.request, share.chunk.request.params
        if request.flagged_layer is not None:
            raise NonFiniteIndexScores(request.flagged_layer)
        if share.sample_row is not None and drawn.token_id is None:
            raise no_token(request)
        if share.scored_ids:
            rows = logits_RV[share.start : share.start + len(share.scored_ids)]
            request.scored_prompt += score_tokens(rows, share.scored_ids, params.prompt_logprobs or 0)
        token = None
        if share.sample_row is not None and drawn.token_id is not None:
            request.output_ids.append(drawn.token_id)
            token = ScoredToken(drawn.token_id)
            if params.num_logprobs is not None:
                top = with_own(drawn.top, drawn.token_id, drawn.logprob)
                token = ScoredToken(drawn.token_id, drawn.logprob, top)
        request.num_computed += share.chunk.num_tokens
        prompt: tuple[ScoredToken, ...] = ()
        if share.ends_prompt and params.prompt_logprobs is not None:
            prompt = (ScoredToken(request.prompt_ids[0]), *request.scored_prompt)
        return StepOutput(prompt, token)
