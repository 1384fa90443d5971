"""Memory of running requests: a slot and blocks of the caches, taken when a request begins and as it grows.

A request begins with the blocks of the tokens that it has, and takes others one after the other. So more requests run
than the caches could hold at their longest; when they do not fit any more, the scheduler sends one back to wait.
"""

import logging
import time
from collections.abc import Callable
from typing import Protocol

from ownpath.cache.layout import BLOCK_TOKENS, num_blocks
from ownpath.cache.pools import CachePool, SequenceCache
from ownpath.cache.slots import CacheFull
from ownpath.engine.prefix import PrefixCache
from ownpath.engine.request import ROOM_AHEAD, Request, RequestError

logger = logging.getLogger(__name__)


class CachingModel(Protocol):
    """A model as far as its caches go."""

    @property
    def caches(self) -> CachePool: ...

    def new_cache(self, num_tokens: int | None = None) -> SequenceCache: ...


class RequestMemory:
    """Gives requests their caches and takes them back, on the engine's thread.

    release: takes a request's cache from it, and gives it back to the pool once nothing that runs writes to it.
    prefix: what the caches hold for requests that begin alike; its blocks are free for whoever needs them. room_ahead:
    tokens behind the known ones that a running request has room for.
    """

    def __init__(
        self,
        model: CachingModel,
        release: Callable[[Request], None],
        prefix: PrefixCache | None = None,
        room_ahead: int = ROOM_AHEAD,
    ) -> None:
        self.room_ahead = room_ahead
        self._model, self._release, self._prefix = model, release, prefix
        self.slots = model.caches.slots

    @property
    def free(self) -> tuple[int, int]:
        """The numbers of free slots and blocks, with those that are only kept."""
        return self.slots.num_free_slots, self.slots.num_free_blocks + self.slots.num_idle_blocks

    def check(self, request: Request) -> None:
        """Checks that the request fits while nothing else runs. Errors: RequestError with the numbers."""
        wanted, has = num_blocks(request.most_tokens), self.slots.num_blocks
        if wanted > has:
            raise RequestError(
                f"{len(request.prompt_ids)} prompt tokens and {request.params.max_tokens} tokens to generate need "
                f"{wanted} blocks of {BLOCK_TOKENS} tokens; the caches have {has}"
            )

    def begin(self, request: Request, num_spare: int) -> bool:
        """Gives a request a slot and the blocks of its known tokens. Returns False if they are not free, or fewer than
        ``num_spare`` blocks would be left.

        A request for which there is no memory although it should fit gets no cache; it is the engine's to end.
        """
        wanted = self._wanted_tokens(request)
        if self.free[1] < num_blocks(wanted) + num_spare:
            return False
        try:
            request.cache = (
                self._model.new_cache(wanted) if self._prefix is None else self._prefix.begin(request, wanted)
            )
        except CacheFull:
            return False
        except Exception:
            logger.exception("no cache for a request of %d tokens", request.num_tokens)
            return True
        self._note_room(request)
        request.begun_at = request.begun_at or time.monotonic()
        return True

    def extend(self, request: Request) -> bool:
        """Gives a running request room for its next tokens. Returns False if no block is free."""
        try:
            request.caches.grow(self._wanted_tokens(request))
        except CacheFull:
            return False
        self._note_room(request)
        return True

    def begin_anew(self, request: Request) -> bool:
        """Gives a running request other memory, of which nothing has been written. Returns False if it is not free."""
        self.end(request)
        request.num_computed = 0
        return self.begin(request, 0) and request.cache is not None

    def end(self, request: Request) -> None:
        """Takes back whatever a request has."""
        if self._prefix is not None:
            self._prefix.end(request)
        self._release(request)
        request.room = 0

    def _note_room(self, request: Request) -> None:
        request.room = BLOCK_TOKENS * len(request.caches.blocks)

    def _wanted_tokens(self, request: Request) -> int:
        return min(request.num_tokens + self.room_ahead, request.most_tokens)
