"""Steps that are launched and not read."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from ownpath.cache.pools import SequenceCache
from ownpath.engine.decoder import StepBegun
from ownpath.engine.request import Request
from ownpath.engine.rows import NO_ROWS, StepRows, unread
from ownpath.engine.scheduler import ScheduledChunk


class NextRows(NamedTuple):
    """The rows of a step that is to be launched, of those chunks that have one.

    reading: rows that read more than the last token of an answer. goes_on: whether the token after each row's own is
    the one that the row draws.
    """

    chunks: Sequence[ScheduledChunk]
    rows: StepRows
    reading: frozenset[int]
    goes_on: bool

    @classmethod
    def of(cls, chunks: Iterable[ScheduledChunk], ahead: Mapping[Request, int]) -> "NextRows":
        """Finds the next token of each request. ahead: the rows of those that are in the step before, which is still
        to be read: what it draws is the next token, unless more is known; a request of which it is the last has no
        row."""
        kept: list[ScheduledChunk] = []
        rows, reading, goes_on = [], [], True
        for chunk in chunks:
            request, row = chunk.request, ahead.get(chunk.request)
            if request.cache is None:
                continue
            at, num_drawn = request.num_computed + (row is not None), len(request.output_ids)
            num_known = len(request.prompt_ids) + num_drawn
            if at < num_known:
                token_id = request.id_at(at)
                if at < num_known - (num_drawn > 0):
                    reading.append(len(kept))
                    goes_on = goes_on and at == num_known - 1
            else:
                assert row is not None
                token_id, num_drawn = unread(row), num_drawn + 1
                if num_drawn >= request.params.max_tokens:
                    continue
            kept.append(chunk)
            rows.append((request.cache, token_id, request.params, request.seed, num_drawn))
        columns = StepRows(*map(list, zip(*rows, strict=True))) if rows else NO_ROWS
        return cls(kept, columns, frozenset(reading), goes_on)


class Flight(NamedTuple):
    """A launched decode step.

    requests: those of the chunks. caches: theirs when it was launched. looks: rows of which a report tells more than a
    token and its log-prob, or no token. asks: whether a report needs its logits, which the next step overwrites.
    scores: whether log-probs are asked for. num_more: steps of the same rows that may follow before ``max_tokens`` ends
    an answer. ends: tokens that may end one before. goes_on: as of ``NextRows``.
    """

    chunks: Sequence[ScheduledChunk]
    requests: Sequence[Request]
    caches: Sequence[SequenceCache]
    looks: frozenset[int]
    asks: bool
    scores: bool
    num_more: int
    ends: frozenset[int]
    goes_on: bool
    begun: StepBegun
    begun_at: float

    @classmethod
    def of(cls, following: NextRows, ends: frozenset[int], begun: StepBegun, at: float) -> "Flight":
        """Notes a step launched at a time of the clock."""
        chunks, rows, reading, goes_on = following
        requests = [chunk.request for chunk in chunks]
        looks = reading.union(begun.num_tops)
        asks = any(requests[row].scores_prompt for row in reading)
        scores = any(params.num_logprobs is not None for params in rows.params)
        known = min(params.max_tokens - drawn for params, drawn in zip(rows.params, rows.num_drawn, strict=True))
        return cls(chunks, requests, rows.caches, looks, asks, scores, known - 1, ends, goes_on, begun, at)

    def repeated(self, begun: StepBegun, at: float) -> "Flight":
        """Returns the next step of the same rows."""
        looks = frozenset(begun.num_tops)  # nobody reads a prompt any more
        return self._replace(looks=looks, num_more=self.num_more - 1, begun=begun, begun_at=at)

    def repeats(self, chunks: Sequence[ScheduledChunk]) -> bool:
        """Returns True if these chunks are one more step of the same rows, none of which has had its last token."""
        is_same = self.goes_on and self.num_more > 0 and self.chunks == chunks
        return is_same and [request.cache for request in self.requests] == self.caches

    def rows(self) -> dict[Request, int]:
        """Returns the rows of the requests that are still where this step leaves them."""
        pairs = zip(self.requests, self.caches, strict=True)
        return {request: row for row, (request, cache) in enumerate(pairs) if request.cache is cache}

    @property
    def ends_one(self) -> bool:
        """True if this step's token is the last of an answer by ``max_tokens``."""
        return self.num_more <= 0

    def drawing(self) -> list[Request | None]:
        """Returns the requests of the rows, of which all tokens before this step are read; ``None`` where a row's
        request has left, or has more to read before it draws."""
        pairs = zip(self.requests, self.caches, strict=True)
        living = [one if one.cache is cache else None for one, cache in pairs]
        for row in self.looks:
            if (one := living[row]) is not None and one.num_pending > 1:
                living[row] = None
        return living


class LaunchedStep(Protocol):
    """A launched step of some requests. caches: theirs when it was launched."""

    @property
    def requests(self) -> Sequence[Request]: ...

    @property
    def caches(self) -> Sequence[SequenceCache]: ...


def release_left(flight: LaunchedStep, others: Iterable[LaunchedStep]) -> None:
    """Gives back the caches that requests of a step have left since it was launched, except those in others' rows."""
    held = [cache for other in others for cache in other.caches]
    for request, cache in zip(flight.requests, flight.caches, strict=True):
        if request.cache is not cache and cache not in held:
            cache.release()
