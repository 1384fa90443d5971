"""Steps that are launched and not read."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ownpath.cache.pools import SequenceCache
from ownpath.engine.decoder import StepBegun
from ownpath.engine.request import Request
from ownpath.engine.scheduler import ScheduledChunk


class Flight(NamedTuple):
    """A launched decode step.

    requests: those of the chunks. caches: theirs when it was launched. asks: whether a report needs more than the
    sampler's results. scores: whether a log-prob is asked for. num_more: steps of the same rows that may follow before
    ``max_tokens`` ends an answer. ends: tokens that may end one before.
    """

    chunks: Sequence[ScheduledChunk]
    requests: Sequence[Request]
    caches: Sequence[SequenceCache]
    asks: bool
    scores: bool
    num_more: int
    ends: frozenset[int]
    begun: StepBegun
    begun_at: float

    @classmethod
    def of(
        cls,
        chunks: Sequence[ScheduledChunk],
        ahead: Mapping[Request, int],
        ends: frozenset[int],
        begun: StepBegun,
        at: float,
    ) -> "Flight":
        """Notes a step launched at a time of the clock. ahead: requests whose last token was not read yet."""
        requests = [chunk.request for chunk in chunks]
        asks = any(request.needs_logits for request in requests)
        scores = any(request.params.num_logprobs is not None for request in requests)
        known = min(request.params.max_tokens - len(request.output_ids) - (request in ahead) for request in requests)
        caches = [request.caches for request in requests]
        return cls(chunks, requests, caches, asks, scores, known - 1, ends, begun, at)

    def repeated(self, begun: StepBegun, at: float) -> "Flight":
        """Returns the next step of the same rows."""
        return self._replace(num_more=self.num_more - 1, begun=begun, begun_at=at)

    def repeats(self, chunks: Sequence[ScheduledChunk]) -> bool:
        """Returns True if these chunks are one more step of the same rows, none of which has had its last token."""
        is_same = self.num_more > 0 and self.chunks == chunks
        return is_same and [request.cache for request in self.requests] == self.caches

    def rows(self) -> dict[Request, int]:
        """Returns the rows of the requests that are still where this step leaves them."""
        pairs = zip(self.requests, self.caches, strict=True)
        return {request: row for row, (request, cache) in enumerate(pairs) if request.cache is cache}

    @property
    def ends_one(self) -> bool:
        """True if this step's token is the last of an answer by ``max_tokens``."""
        return self.num_more <= 0

    def release_left(self, others: "Sequence[Flight]") -> None:
        """Gives back the caches that requests have left since, except those in others' rows."""
        for request, cache in zip(self.requests, self.caches, strict=True):
            if request.cache is not cache and not any(cache in other.caches for other in others):
                cache.release()
