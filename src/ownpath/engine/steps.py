"""Runs the steps that the engine schedules, and reports what each of them gave its requests.

Requests with one row in a step go to the decoder, if there is one; those with more go through one forward of the model,
behind the decoder's graph. Without a graph for the rows all of such a step is one forward.

Graphs overlap with the host: a step is launched before the tokens of the one before are read, so that the device goes
from one to the next while the host reads, reports and schedules. At most two are launched at a time. What holds:

- Tokens are those of steps one by one: a row goes on from the token that the device chose, read or not.
- A request that ended, was aborted or had to give its cache up while a step with its row ran hears nothing of that
  step. Its slot and blocks are given back once no launched step has a row of it.
- A request whose unread token is its last by ``max_tokens`` has no row more, so no row is beyond its memory.
- Rows that read a prompt go on from its tokens, which the host knows. The likeliest tokens are taken behind the graph,
  before the next one overwrites the logits, and come with the results.
- Where logits change by what was drawn before, by grammars and penalties, the step is launched all the same, and its
  rows are drawn again when the tokens before it are read, while the device runs it.
- Where every request may draft, and that pays, the step has drafts (``drafting``).
- A step is read at once if its logits score a prompt. A ``forward`` is read at once too, while the graph before it may
  stay unread; it waits for launched steps only if one has a row of its own requests.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from time import perf_counter
from typing import Protocol, TypeVar

import torch

from ownpath.config import ModelConfig
from ownpath.engine.adjust import Adjuster
from ownpath.engine.batch import LogitsShare, build_batch, decode_share
from ownpath.engine.decoder import Decoder
from ownpath.engine.draft_decoder import ROWS
from ownpath.engine.drafting import DraftedFlight, Drafting, living
from ownpath.engine.flags import IndexFlags, tell_flagged
from ownpath.engine.flight import Flight, NextRows, release_left
from ownpath.engine.load import StepTimes
from ownpath.engine.memory import CachingModel
from ownpath.engine.prompt_graphs import prompts_of
from ownpath.engine.reports import Reporter
from ownpath.engine.request import Request, ScoredToken, StepOutput, plain_output
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

MOST_ALONE, MOST_BESIDE = 16, 64
"""The most tokens of a request that are read a token a step, where requests read alone, and beside answers that go on.

On an H200 a graph of the embedded model takes 0.25 ms, whatever its rows. A ``forward`` takes 8 ms with a short prompt,
27 with 8 and 100 with 64, and answers beside them wait as long.
"""
MOST_ALONE_OF_GRAPHS, MOST_BESIDE_OF_GRAPHS = 4, 16
"""The same where prompts are read in graphs, which take as long as a few steps of a token."""


AnyFlight = TypeVar("AnyFlight", Flight, DraftedFlight)


class LanguageModel(CachingModel, Protocol):
    """The model as the engine uses it."""

    @property
    def config(self) -> ModelConfig: ...

    def forward(self, batch: ForwardBatch) -> torch.Tensor: ...


def wanted_tops(rows: Iterable[tuple[int, Request]]) -> dict[int, int]:
    """Returns the rows of logits, given with their requests, that likeliest tokens are wanted of, and how many."""
    return {row: request.params.num_logprobs for row, request in rows if request.params.num_logprobs}


class StepRunner:
    """Runs steps on the engine's thread. decoder: runs requests with one row in a step; ``None``: the model runs
    all. device: where the model computes. num_vocab: ids below it are tokens. drafting: ``None``: no step drafts."""

    def __init__(
        self,
        model: LanguageModel,
        decoder: Decoder | None,
        device: str,
        num_vocab: int,
        adjuster: Adjuster,
        reporter: Reporter,
        drafting: Drafting | None = None,
    ) -> None:
        self._drafting, self._prompts = drafting, prompts_of(model)
        self._model, self._decoder, self._device, self._num_vocab = model, decoder, device, num_vocab
        self._adjuster, self._reporter = adjuster, reporter
        self._flags = IndexFlags()
        self._flights: list[Flight | DraftedFlight] = []
        self._landing: Flight | DraftedFlight | None = None
        self._is_beside = False  # a launched step ran before a ``forward`` that is read: nobody saw its time
        self.times = StepTimes()

    @property
    def is_flying(self) -> bool:
        """True while a step is launched and not read."""
        return bool(self._flights)

    def step(self, chunks: Sequence[ScheduledChunk]) -> None:
        """Runs the scheduled chunks: one token for each sequence that is due one.

        What the decoder runs as a graph is only launched; the step before it is read meanwhile. Whoever ends there has
        a row too many in this one, which nobody reads. Without chunks, reads what is left.
        """
        if self._drafting is not None and chunks:
            chunks = self._draft(self._drafting, chunks)
            if not chunks:
                return
        decoder = self._decoder
        last = self._flights[-1] if self._flights else None
        if decoder is not None and isinstance(last, Flight) and last.repeats(chunks) and decoder.can_repeat:
            is_open = self._may_change(chunks)
            self._launch(lambda at: last.repeated(decoder.repeat(is_open), at))
            self._land_to(1)
            return
        rows, longer = self._divide(chunks)
        if not rows or self._are_flying(longer):
            self.settle()
        if decoder is not None and rows:
            before = self._flights[-1] if self._flights else None
            ahead = before.rows() if isinstance(before, Flight) else {}
            self._decode(decoder, rows, ahead, self._may_change(rows))
        # What was launched may have read some of it, up to the last known token.
        longer = [
            chunk._replace(num_tokens=min(chunk.num_tokens, chunk.request.most_next))
            for chunk in longer
            if chunk.request.cache is not None
        ]
        if longer:
            begun = perf_counter()
            try:
                self._forward(longer, len(chunks))
            except Exception:
                self.settle()  # the graph before it is whole
                raise
            seconds = self.times.add(begun, perf_counter())
            self._is_beside = self.is_flying
            if self._drafting is not None and not rows and all(chunk.num_tokens == 1 for chunk in longer):
                self._drafting.note_plain(len(longer), seconds, len(longer))

    def _draft(self, drafting: Drafting, chunks: Sequence[ScheduledChunk]) -> Sequence[ScheduledChunk]:
        """Launches a step with drafts, if this one drafts, and reads the one before. Returns the chunks that are left
        to run without."""
        last = self._flights[-1] if self._flights else None
        if isinstance(last, DraftedFlight) and drafting.goes_on(self._flights, chunks):
            self._launch(lambda at: drafting.repeat(last, at))
            self._land_to(1)
            return ()
        if drafting.reads_on(self._flights, chunks):
            self._launch(lambda at: drafting.begin(chunks, at, ROWS))
            self._land_to(1)
            return ()
        if isinstance(last, DraftedFlight) or (last is not None and drafting.takes(chunks)):
            self.settle()  # positions are known then
            chunks = living(chunks)
        if not chunks or not drafting.takes(chunks):
            return chunks
        self._launch(lambda at: drafting.begin(chunks, at))
        self._land_to(int(drafting.decoder.has_graph(len(chunks))))
        return ()

    def _divide(self, chunks: Sequence[ScheduledChunk]) -> tuple[Sequence[ScheduledChunk], Sequence[ScheduledChunk]]:
        """Returns the chunks that the decoder runs, a row each, and those that the model's ``forward`` does.

        Answers go on in their graph beside a prompt: a ``forward`` takes its time for each request.
        """
        single = [chunk for chunk in chunks if chunk.num_tokens == 1]
        if self._decoder is None or not single:
            return (), chunks
        if len(single) == len(chunks):
            return chunks, ()
        if not self._decoder.has_graph(len(single)):
            return (), chunks
        return single, [chunk for chunk in chunks if chunk.num_tokens > 1]

    def _are_flying(self, chunks: Iterable[ScheduledChunk]) -> bool:
        """Returns True if a launched step has a row of one of these requests."""
        flying = {request for flight in self._flights for request in flight.requests}
        return any(chunk.request in flying for chunk in chunks)

    def _may_change(self, chunks: Iterable[ScheduledChunk]) -> bool:
        return self._adjuster.may_change(chunk.request for chunk in chunks)

    def in_rows(self, chunks: list[ScheduledChunk]) -> list[ScheduledChunk]:
        """Returns the chunks with one token each, or two where the step drafts, if a graph runs such a step and no
        request has many tokens to read; otherwise as they are."""
        longer = [chunk for chunk in chunks if chunk.num_tokens > 1]
        if self._decoder is None or not longer or not self._decoder.has_graph(len(chunks)):
            return chunks
        most = self._most_in_rows(len(longer), is_alone=all(chunk.request.is_reading for chunk in chunks))
        if self._drafting is not None and self._drafting.pays(len(chunks)):
            return self._drafting.in_pairs(chunks, most)
        if any(one.request.num_pending > most or one.request.params.prompt_logprobs is not None for one in longer):
            return chunks
        return [chunk if chunk.num_tokens == 1 else chunk._replace(num_tokens=1) for chunk in chunks]

    def _most_in_rows(self, num_requests: int, is_alone: bool) -> int:
        """Returns the most tokens of a prompt that are read a token a step. num_requests: that have more to read."""
        if self._prompts is not None and self._prompts.takes(num_requests):
            return MOST_ALONE_OF_GRAPHS if is_alone else MOST_BESIDE_OF_GRAPHS
        return MOST_ALONE if is_alone else MOST_BESIDE

    def settle(self) -> None:
        """Reads the steps that are launched and reports them: every request is then where its cache is."""
        self._land_to(0)

    def release(self, request: Request) -> None:
        """Takes a request's cache from it, and gives it back as soon as no launched step writes to it."""
        cache, request.cache = request.cache, None
        if cache is not None and not any(cache in flight.caches for flight in self._flights):
            cache.release()

    def step_alone(self, chunk: ScheduledChunk) -> None:
        """Runs one chunk, and reads it."""
        self.step([chunk])
        self.settle()

    def abandon(self) -> list[ScheduledChunk]:
        """Gives up the steps that are launched, because one has failed. Returns their chunks."""
        flights = [*([self._landing] if self._landing else []), *self._flights]
        self._landing, self._flights = None, []
        for decoder in (self._decoder, None if self._drafting is None else self._drafting.decoder):
            if decoder is not None:
                decoder.forget()
        for flight in flights:
            release_left(flight, [])
        return [chunk for flight in flights for chunk in flight.chunks]

    def _forward(self, chunks: Sequence[ScheduledChunk], num_requests: int) -> None:
        """Runs a step by the model's ``forward``. num_requests: of the whole step, with those in its graph."""
        batch, shares = build_batch(chunks, self._device)
        self._adjuster.start([chunk.request for chunk in chunks if chunk.reaches_end])
        drafting = self._drafting
        is_reading = drafting is not None and any(chunk.request.is_reading for chunk in chunks)
        if drafting is None or not is_reading or not drafting.reads(num_requests):
            logits_RV = self._model.forward(batch)[:, : self._num_vocab]
            drawn = self._sample(logits_RV, shares)
        else:
            whole_RV, hidden = drafting.forward(batch)
            logits_RV = whole_RV[:, : self._num_vocab]
            drawn = self._sample(logits_RV, shares)
            drafting.read(batch, hidden, shares, drawn, num_requests)
        self._flags.note(batch.tables, [chunk.request for chunk in chunks])
        if any(share.is_answered for share in shares):
            self._flags.read()
        for share, one in zip(shares, drawn, strict=True):
            self._answer(share, one, logits_RV)

    def _decode(
        self, decoder: Decoder, chunks: Sequence[ScheduledChunk], ahead: Mapping[Request, int], is_open: bool
    ) -> None:
        """Launches a decode step of other rows, and reads the one before. ahead: the rows whose tokens are unread."""
        num_flying, following = 0, NextRows.of(chunks, ahead)
        if following.chunks:
            flight = self._launch(lambda at: self._begun(decoder, following, is_open, at))
            num_flying = int(decoder.has_graph(len(following.chunks)) and not flight.asks)
        self._land_to(num_flying)

    def _launch(self, launch: Callable[[float], AnyFlight]) -> AnyFlight:
        """Launches a step, and draws its rows again where logits change. launch: is given the time."""
        try:
            flight = launch(perf_counter())
        except Exception:
            self.settle()  # the step before is whole
            raise
        self._flights.append(flight)
        if isinstance(flight, Flight) and flight.begun.is_open:
            self._redraw(flight)
        return flight

    def _redraw(self, flight: Flight) -> None:
        """Reads the steps before the last, and draws the rows of that one whose logits change by what was read."""
        assert self._decoder is not None
        self._land_to(1)
        self._decoder.redraw(flight.begun, self._adjuster.rows_of(flight.begun.placed(flight.drawing())))

    def _begun(self, decoder: Decoder, following: NextRows, is_open: bool, at: float) -> Flight:
        requests = [chunk.request for chunk in following.chunks]
        if is_open and not self._flights and not decoder.has_graph(len(requests)):
            self._adjuster.start([one if one.num_pending == 1 else None for one in requests])
        begun = decoder.begin(following.rows, wanted_tops(enumerate(requests)), is_open)
        return Flight.of(following, self._reporter.ends_of(requests), begun, at)

    def _land_to(self, num_flying: int) -> None:
        """Reads steps until so many are unread."""
        while len(self._flights) > num_flying:
            self._land()

    def _land(self) -> None:
        """Reads the oldest step and reports it."""
        flight = self._landing = self._flights.pop(0)
        if isinstance(flight, Flight):
            self._land_plain(flight)
        else:
            assert self._drafting is not None
            self._drafting.land(flight, self.times)
        release_left(flight, self._flights)
        self._landing = None

    def _land_plain(self, flight: Flight) -> None:
        """Reads a step without drafts. Most rows only extend an answer by a token, and are reported without a look at
        their logits."""
        assert self._decoder is not None
        done = self._decoder.finish(flight.begun)
        seconds, num_left = self.times.add(flight.begun_at, perf_counter()), 0
        self._flags.read()
        if done.flagged:
            tell_flagged(done.flagged, flight.requests)
        looks, scores, ends, any_may_end = flight.looks, flight.scores, flight.ends, flight.ends_one
        deliver, tell = self._reporter.deliver, self._reporter.tell
        for row, (request, cache, token_id) in enumerate(
            zip(flight.requests, flight.caches, done.token_ids, strict=True)
        ):
            if request.cache is not cache:
                num_left += 1
                continue  # it ended while this step ran
            if token_id is None or request.flagged_layer is not None or row in looks:
                drawn = Drawn(token_id, float(done.logprobs_T[row]), done.tops.get(row, ()))
                self._answer(decode_share(flight.begun.place_of(row), flight.chunks[row]), drawn, done.logits_TV)
                continue
            output = plain_output(token_id)
            if scores and request.params.num_logprobs is not None:
                output = StepOutput(token=ScoredToken(token_id, float(done.logprobs_T[row])))
            request.output_ids.append(token_id)
            request.num_computed += 1
            if any_may_end or token_id in ends:
                tell(request, output)
            else:
                deliver(request, output)
        is_beside, self._is_beside = self._is_beside, False
        if self._drafting is not None and not is_beside:
            self._drafting.note_plain(len(flight.requests), seconds, len(flight.requests) - num_left)

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
        scored, token = [], None
        if share.scored_ids:
            rows = logits_RV[share.start : share.start + len(share.scored_ids)]
            scored = score_tokens(rows, share.scored_ids, params.prompt_logprobs or 0)
        if share.sample_row is not None and drawn.token_id is not None:
            token = ScoredToken(drawn.token_id)
            if params.num_logprobs is not None:
                top = with_own(drawn.top, drawn.token_id, drawn.logprob)
                token = ScoredToken(drawn.token_id, drawn.logprob, top)
        # All or nothing from here on: a step that fails before may be run again.
        request.scored_prompt += scored
        request.output_ids += [] if token is None else [token.token_id]
        request.num_computed += share.chunk.num_tokens
        prompt: tuple[ScoredToken, ...] = ()
        if share.ends_prompt and params.prompt_logprobs is not None:
            prompt = (ScoredToken(request.prompt_ids[0]), *request.scored_prompt)
        return StepOutput(prompt, token)
