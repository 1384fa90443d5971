"""Steps that are launched and not read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ownpath.cache.pools import SequenceCache
from ownpath.engine.decoder import StepBegun
from ownpath.engine.request import Request
from ownpath.engine.scheduler import ScheduledChunk


@dataclass(frozen=True)
class Flight:
    """A launched decode step.

    requests: those of the chunks. caches: theirs when it was launched. asks: whether a report needs more than the
    sampler's results. num_more: steps of the same rows that may follow before ``max_tokens`` ends an answer.
    """

    chunks: Sequence[ScheduledChunk]
    requests: Sequence[Request]
    caches: Sequence[SequenceCache]
    asks: bool
    num_more: int
    begun: StepBegun
    begun_at: float

    @classmethod
    def of(
        cls, chunks: Sequence[ScheduledChunk], ahead: Mapping[Request, int], begun: StepBegun, at: float
    ) -> "Flight":
        """Notes a step launched at a time of the clock. ahead: requests whose last token was not read yet."""
        requests = [chunk.request for chunk in chunks]
        asks = any(request.needs_logits for request in requests)
        known = min(request.params.max_tokens - len(request.output_ids) - (request in ahead) for request in requests)
        return cls(chunks, requests, [request.caches for request in requests], asks, known - 1, begun, at)

    def repeated(self, begun: StepBegun, at: float) -> "Flight":
        """Returns the next step of the same rows."""
        return Flight(self.chunks, self.requests, self.caches, self.asks, self.num_more - 1, begun, at)

    def repeats(self, chunks: Sequence[ScheduledChunk]) -> bool:
        """Returns True if these chunks are one more step of the same rows, none of which has had its last token."""
        is_same = self.num_more > 0 and self.chunks == chunks
        return is_same and [request.cache for request in self.requests] == self.caches

    def rows(self) -> dict[Request, int]:
        """Returns the rows of the requests that are still where this step leaves them."""
        pairs = zip(self.requests, self.caches, strict=True)
        return {request: row for row, (request, cache) in enumerate(pairs) if request.cache is cache}

    def drawing(self) -> list[Request | None]:
        """Returns the requests of the rows, of which all tokens before this step are read; ``None`` where a row's
        request has left, or has more to read before it draws."""
        pairs = zip(self.requests, self.caches, strict=True)
        living = [one if one.cache is cache else None for one, cache in pairs]
        if not self.asks:  # nobody reads a prompt
            return living
        return [None if one is None or one.num_pending > 1 else one for one in living]

    def release_left(self, others: "Sequence[Flight]") -> None:
        """Gives back the caches that requests have left since, except those in others' rows."""
        for request, cache in zip(self.requests, self.caches, strict=True):
            if request.cache is not cache and not any(cache in other.caches for other in others):
                cache.release()
