"""Runs the step of a request again by itself, after a step that it was part of has failed.

The failed step may have written some of the request's rows, in some layers or all, and counted them or not. Rows are
written at their positions, so the same rows written again are the same caches, with one exception: rings. Row p of a
ring takes the place of the row that it has room for, p - R. A step of one row replaces what no later row reads; a step
of more rows replaces what its own first rows read. So a request goes on where it was if at most one row of it can have
been written, or as many more as its rings are longer by; else it begins anew in other memory, from what nobody has
spoiled.
"""

from collections.abc import Iterator

from ownpath.engine.memory import RequestMemory
from ownpath.engine.rank_memory import RanksMemory
from ownpath.engine.request import Request
from ownpath.engine.scheduler import ScheduledChunk


def chunks_alone(
    request: Request, num_tokens: int, max_tokens: int, memory: RequestMemory | RanksMemory
) -> Iterator[ScheduledChunk]:
    """Yields what of a request is to be run, one step after the other, of at most ``max_tokens`` tokens each, until the
    ``num_tokens`` tokens that it had in the failed step are run too. Stops where the request ends.

    Errors: RuntimeError if there is no memory for it.
    """
    cache, end = request.caches, request.num_computed + min(num_tokens, request.num_pending)
    num_written = max(cache.num_tokens, end) - request.num_computed
    cache.num_tokens = request.num_computed
    if num_written > 1 + cache.pool.spec.spare_rows and not memory.begin_anew(request):
        raise RuntimeError("no memory to begin anew")
    while request.cache is not None and request.num_computed < end:
        yield ScheduledChunk(request, min(end - request.num_computed, max_tokens, request.most_next))
