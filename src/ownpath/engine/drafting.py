"""Steps with drafts in the engine: which steps draft, what is launched, and what requests are told of it.

A step drafts if each of its requests goes on from its last known token or reads a short prompt, none changes its
logits before a token is drawn (penalties, bias, a minimum, a grammar) or scores its prompt, all have room for what two
launched steps may write, and the policy says that it pays. Any other step runs without drafts, and the answers are the
same.

A short prompt is read two tokens a step, beside answers: its next token stands where a guess would, and counts. The
host knows the tokens, but not ahead where answers beside it go on: then a step that reads is read before the next one
is launched.

The first module reads what ``forward`` does, and what steps with drafts do. Its window in the caches misses the tokens
of other steps: guesses are worse until it has moved past them, and cost no answer anything.
"""

from collections.abc import Iterable, Sequence
from time import perf_counter
from typing import NamedTuple, Protocol

import torch

from ownpath.cache.pools import SequenceCache
from ownpath.config import EngineConfig
from ownpath.engine.batch import LogitsShare
from ownpath.engine.decoder import DecodingModel, prepared
from ownpath.engine.draft_decoder import (
    MOST_AHEAD,
    ROWS,
    UNKNOWN,
    DraftBegun,
    DraftDecoder,
    DraftedTokens,
    VerifyingModel,
    room_behind,
)
from ownpath.engine.draft_policy import MOST_DRAFTED, DraftPolicy
from ownpath.engine.flags import tell_flagged
from ownpath.engine.flight import LaunchedStep
from ownpath.engine.load import DraftCounts, StepTimes
from ownpath.engine.reports import Reporter
from ownpath.engine.request import Request, ScoredToken, StepOutput, plain_output
from ownpath.engine.request_prefix import NO_TAIL
from ownpath.engine.rows import StepRows
from ownpath.engine.sampler import (
    Drawn,
    NonFiniteIndexScores,
    RowFailed,
    SampleRow,
    choose_tokens,
    no_token,
)
from ownpath.engine.scheduler import ScheduledChunk
from ownpath.engine.tops import with_own
from ownpath.model.batch import ForwardBatch
from ownpath.model.block import Hidden


class DraftingModel(Protocol):
    """The model as a forward with drafts uses it."""

    def forward_drafting(self, batch: ForwardBatch) -> tuple[torch.Tensor, Hidden]: ...

    def draft_forward(
        self, hidden: Hidden, next_ids_T: torch.Tensor, batch: ForwardBatch, rows_R: torch.Tensor
    ) -> torch.Tensor: ...


class Drafts(NamedTuple):
    """The means of an engine that drafts. decoder: runs the steps. policy: says which."""

    model: DraftingModel
    decoder: DraftDecoder
    policy: DraftPolicy


class DraftedFlight(NamedTuple):
    """A launched step with drafts that is not read. caches: the requests' when it was launched. are_known: whether each
    one's guess was the module's, not made up. num_read: rows of each that read a known token and draw none. looks:
    requests of which more than tokens is told, or that read; ends: tokens that may end an answer."""

    chunks: Sequence[ScheduledChunk]
    requests: Sequence[Request]
    caches: Sequence[SequenceCache]
    are_known: Sequence[bool]
    num_read: Sequence[int]
    looks: frozenset[int]
    ends: frozenset[int]
    begun: DraftBegun
    begun_at: float

    def is_of(self, chunks: Sequence[ScheduledChunk]) -> bool:
        """Returns True if these chunks are of the same requests, which are where this step leaves them."""
        is_same = [one.request for one in chunks] == [*self.requests]
        return is_same and [one.cache for one in self.requests] == [*self.caches]

    def goes_on(self, chunks: Sequence[ScheduledChunk], num_unread: int) -> bool:
        """Returns True if these chunks are one more step of the same requests, none of which has had its last token.
        num_unread: launched steps of them that are not read, each of which gives a token at least."""
        if any(count == ROWS for count in self.num_read):
            return False  # the host knows what follows
        if not self.is_of(chunks):
            return False
        return all(len(one.output_ids) + num_unread < one.params.max_tokens for one in self.requests)


class Drafting:
    """The drafts of one engine. counts: how often guesses were right."""

    def __init__(self, drafts: Drafts, reporter: Reporter, device: str) -> None:
        self._model, self.decoder, self._policy = drafts
        self._reporter, self._device, self.counts = reporter, device, DraftCounts()

    def takes(self, chunks: Sequence[ScheduledChunk]) -> bool:
        """Returns True if the next step of these chunks drafts. Every launched step must have been read."""
        return self.pays(len(chunks)) and all(map(_may_draft, chunks))

    def pays(self, num_requests: int) -> bool:
        """Returns True if the next step of so many requests drafts, provided that all of them may."""
        return 0 < num_requests <= self.decoder.buckets[-1] and self._policy.drafts(self._size_of(num_requests))

    def reads(self, num_requests: int) -> bool:
        """Returns True if the module is to read the prompts that ``forward`` reads beside so many requests."""
        return 0 < num_requests <= self.decoder.buckets[-1] and self._policy.holds(self._size_of(num_requests))

    def in_pairs(self, chunks: list[ScheduledChunk], most: int) -> list[ScheduledChunk]:
        """Returns the chunks with two tokens each at most, if a step with drafts runs them and none of their requests
        has more tokens to read; otherwise as they are: ``forward`` has the module read along."""
        pairs = [chunk._replace(num_tokens=min(chunk.num_tokens, ROWS)) for chunk in chunks]
        is_short = all(chunk.request.num_pending <= most for chunk in chunks)
        return pairs if is_short and all(map(_may_draft, pairs)) else chunks

    def goes_on(self, flights: Sequence[LaunchedStep], chunks: Sequence[ScheduledChunk]) -> bool:
        """Returns True if the next step is one more of the requests of the last one, with drafts."""
        last = flights[-1] if flights else None
        if not isinstance(last, DraftedFlight) or not last.goes_on(chunks, len(flights)):
            return False
        return self.decoder.can_repeat and self._policy.drafts(self._size_of(len(chunks)))

    def reads_on(self, flights: Sequence[LaunchedStep], chunks: Sequence[ScheduledChunk]) -> bool:
        """Returns True if the next step goes on reading for all requests of the last one, which has nothing else: the
        host knows tokens and positions then, though nobody has read that step."""
        last = flights[0] if len(flights) == 1 else None
        if not isinstance(last, DraftedFlight) or any(count < ROWS for count in last.num_read):
            return False
        return last.is_of(chunks) and self.pays(len(chunks)) and all(_has_room(one, ROWS) for one in last.requests)

    def begin(self, chunks: Sequence[ScheduledChunk], at: float, ahead: int = 0) -> DraftedFlight:
        """Launches a step of requests. Every launched step must have been read, but for one before ``reads_on``: ahead
        is then what it reads of each. at: the time."""
        requests = [chunk.request for chunk in chunks]
        reading = [one.num_pending - ahead > 1 for one in requests]
        rows = StepRows(
            [one.caches for one in requests],
            [one.id_at(one.num_computed + ahead) for one in requests],
            [one.params for one in requests],
            [one.seed for one in requests],
            # The second row of one that reads draws the token that its first one would.
            [len(one.output_ids) - reads for one, reads in zip(requests, reading, strict=True)],
        )
        expected = [None if reads else one.known_guess for one, reads in zip(requests, reading, strict=True)]
        known = [_known_behind(one, ahead) for one in requests]
        guesses = [
            next(one for one in (behind, guess, last) if one is not None and one >= 0)
            for (behind, _), guess, last in zip(known, expected, rows.token_ids, strict=True)
        ]
        wanted = {ROWS * n + row: one.params.num_logprobs for n, one in enumerate(requests) for row in range(ROWS)}
        tops = {row: count for row, count in wanted.items() if count}
        begun = self.decoder.begin(rows, guesses, tops, known, ahead)
        num_read = [sum(one >= 0 for one in pair) for pair in known]
        are_known = [guess is not None for guess in expected]
        asks = (one.params.num_logprobs is not None or count > 0 for one, count in zip(requests, num_read, strict=True))
        looks, ends = frozenset(n for n, is_so in enumerate(asks) if is_so), self._reporter.ends_of(requests)
        return DraftedFlight(chunks, requests, rows.caches, are_known, num_read, looks, ends, begun, at)

    def repeat(self, last: DraftedFlight, at: float) -> DraftedFlight:
        """Launches one more step of the same requests."""
        begun, count = self.decoder.repeat(last.begun), len(last.requests)
        looks = frozenset(n for n, one in enumerate(last.requests) if one.params.num_logprobs is not None)
        goes_on = last._replace(are_known=[True] * count, num_read=[0] * count, looks=looks)
        return goes_on._replace(begun=begun, begun_at=at)

    def land(self, flight: DraftedFlight, times: StepTimes) -> None:
        """Reads the oldest launched step and reports it."""
        found = self.decoder.finish(flight.begun)
        seconds = times.add(flight.begun_at, perf_counter())
        pairs = zip(flight.are_known, found.token_ids, strict=True)
        self.counts.add(sum(flight.are_known), sum(len(tokens) - 1 for is_known, tokens in pairs if is_known))
        if found.flagged:
            tell_flagged({row // 2: layer_idx for row, layer_idx in found.flagged.items()}, flight.requests)
        gained = 0
        for n, (request, cache) in enumerate(zip(flight.requests, flight.caches, strict=True)):
            if request.cache is not cache:
                continue  # it ended while this step ran
            gained -= request.num_computed
            if n in flight.looks or request.flagged_layer is not None or None in found.token_ids[n]:
                self._tell(request, n, found, flight.num_read[n])
            else:
                self._extend(request, found.token_ids[n], found.guesses[n], flight.ends)
            gained += request.num_computed
        self._note(len(flight.requests), seconds, gained, is_drafted=True)

    def note_plain(self, num_requests: int, seconds: float, num_gained: int) -> None:
        """Takes up a step without drafts: its time, and the tokens that its requests have got or read."""
        self._note(num_requests, seconds, num_gained, is_drafted=False)

    def _note(self, num_requests: int, seconds: float, num_gained: int, *, is_drafted: bool) -> None:
        self._policy.note(self._size_of(num_requests), seconds, num_gained / num_requests, is_drafted=is_drafted)

    def _size_of(self, num_requests: int) -> int:
        """Returns the requests of the graph that runs so many: the policy's unit, as its steps take the same time."""
        return next((size for size in self.decoder.buckets if size >= num_requests), num_requests)

    def _extend(self, request: Request, tokens: Sequence[int | None], guess: int, ends: frozenset[int]) -> None:
        """Extends an answer by tokens of which nothing else is to be told, until it ends."""
        cache, output_ids, most = request.cache, request.output_ids, request.params.max_tokens
        for token_id in tokens:
            assert token_id is not None
            output_ids.append(token_id)
            request.num_computed += 1
            if token_id not in ends and len(output_ids) < most:
                self._reporter.deliver(request, plain_output(token_id))
                continue
            self._reporter.tell(request, plain_output(token_id))
            if request.cache is not cache:
                return
        if request.num_pending == 1:
            request.guess = request.num_tokens, guess

    def _tell(self, request: Request, n: int, found: DraftedTokens, num_read: int) -> None:
        """Reports the tokens of one request, until its answer ends. num_read: rows that have read known ones."""
        cache = request.cache
        request.num_computed += num_read
        columns = zip(found.token_ids[n], found.logprobs[n], strict=False)
        for ahead, (token_id, logprob) in [*enumerate(columns)][num_read:]:
            drawn = Drawn(token_id, logprob, found.tops.get(2 * n + ahead, ()))
            try:
                output = advanced(request, drawn)
            except RowFailed as error:
                self._reporter.fail(request, str(error), error.non_finite)
            else:
                self._reporter.tell(request, output)
            if request.cache is not cache:
                return
        if request.num_pending == 1:
            request.guess = request.num_tokens, found.guesses[n]

    def forward(self, batch: ForwardBatch) -> tuple[torch.Tensor, Hidden]:
        """Runs a step of the backbone as ``Model.forward`` does; ``read`` follows."""
        return self._model.forward_drafting(batch)

    def read(
        self,
        batch: ForwardBatch,
        hidden: Hidden,
        shares: Sequence[LogitsShare],
        drawn: Sequence[Drawn],
        num_requests: int,
    ) -> None:
        """Runs the first module on the rows of a ``forward``, and notes its guesses for those that have drawn a token.
        Nothing has been reported of the step yet. num_requests: of the whole step."""
        begun = perf_counter()
        next_ids = [token_id for share, one in zip(shares, drawn, strict=True) for token_id in _following(share, one)]
        due = [n for n, one in enumerate(drawn) if one.token_id is not None]
        rows_R, next_ids_T = (
            torch.tensor(ids, dtype=torch.int64, device=self._device)
            for ids in ([batch.tables.row_ends[n] - 1 for n in due], next_ids)
        )
        logits_RV = self._model.draft_forward(hidden, next_ids_T, batch, rows_R)
        if due:
            requests = [shares[n].chunk.request for n in due]
            rows = [SampleRow(one.params, one.seed, len(one.output_ids) + 1) for one in requests]
            guesses = choose_tokens(logits_RV[:, : self.decoder.num_vocab], rows).token_ids
            for request, guess in zip(requests, guesses, strict=True):
                request.guess = None if guess is None else (request.num_tokens + 1, guess)
        self._policy.note_reading(self._size_of(num_requests), perf_counter() - begun)


class DraftedModel(DecodingModel, VerifyingModel, DraftingModel, Protocol):
    """A model with its modules of drafts."""

    @property
    def drafts(self) -> Sequence[object]: ...


def make_drafts(model: DraftedModel, engine: EngineConfig, num_vocab: int) -> Drafts | None:
    """Makes what an engine drafts with, ready for its first step; ``None`` where no module is loaded for it.

    Errors: ValueError where no MTP module is loaded, but another drafter, or no decode step is planned.
    """
    if not engine.loads_draft or engine.rows_per_request < ROWS:
        return None
    if not model.drafts:
        raise ValueError("--draft: the engine drafts with MTP modules, and this checkpoint has another drafter")
    if not model.decodes:
        raise ValueError("--draft: no decode step is planned here, and a step that drafts is one")

    def make() -> DraftDecoder:
        return DraftDecoder(model, min(engine.max_num_seqs, MOST_DRAFTED), num_vocab)

    return Drafts(model, prepared(model, engine, make) or make(), DraftPolicy())


def advanced(request: Request, drawn: Drawn) -> StepOutput:
    """Extends an answer by a token and returns what is to be told of it. Errors: RowFailed; nothing has changed."""
    if request.flagged_layer is not None:
        raise NonFiniteIndexScores(request.flagged_layer)
    if drawn.token_id is None:
        raise no_token(request)
    output, num_logprobs = plain_output(drawn.token_id), request.params.num_logprobs
    if num_logprobs is not None:
        top = with_own(drawn.top, drawn.token_id, drawn.logprob)
        output = StepOutput(token=ScoredToken(drawn.token_id, drawn.logprob, top))
    request.output_ids.append(drawn.token_id)
    request.num_computed += 1
    return output


def living(chunks: Iterable[ScheduledChunk]) -> list[ScheduledChunk]:
    """Returns the chunks of requests that have not ended since they were planned."""
    return [chunk for chunk in chunks if chunk.request.cache is not None]


def _may_draft(chunk: ScheduledChunk) -> bool:
    request, prefix = chunk.request, chunk.request.prefix
    if chunk.num_tokens > ROWS or request.adjusts or request.scores_prompt or not request.params.max_tokens:
        return False
    if request.num_pending > 1 and prefix is not None and prefix.tail_end != NO_TAIL:
        return False  # steps of two tokens may pass where its tail is to be taken
    return _has_room(request)


def _has_room(request: Request, ahead: int = 0) -> bool:
    """Returns True if a request has room for two launched steps behind so many tokens of unread ones."""
    cache = request.caches
    return room_behind(cache.blocks, request.num_computed + ahead, cache.pool) >= MOST_AHEAD


def _known_behind(request: Request, ahead: int) -> tuple[int, int]:
    """Returns the tokens behind the next two, of a request that reads; -1 where they are to be drawn. ahead: tokens
    that an unread step reads."""
    first = request.num_computed + ahead + 1
    ids = request.ids_between(first, min(first + ROWS, request.num_tokens))
    one, other = (*ids, *UNKNOWN)[:ROWS]
    return one, other


def _following(share: LogitsShare, drawn: Drawn) -> list[int]:
    """Returns the token behind each row of a chunk; where nobody knows it, the row's own."""
    request, count = share.chunk.request, share.chunk.num_tokens
    first = request.num_computed + 1
    found = request.ids_between(first, first + count)
    if len(found) < count:
        found = [*found, request.id_at(request.num_tokens - 1) if drawn.token_id is None else drawn.token_id]
    return found
