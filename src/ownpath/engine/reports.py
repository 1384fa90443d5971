"""Reports to requests: their outputs as steps give them, and the end of each, on the engine's thread."""

import logging
from collections.abc import Callable, Iterable

from ownpath.engine.request import FinishReason, NonFinite, Request, StepOutput

logger = logging.getLogger(__name__)


class Reporter:
    """Tells requests what became of them. end_token_ids: the model's. close: frees what a request holds, before it is
    told its end."""

    def __init__(self, end_token_ids: frozenset[int], close: Callable[[Request], None]) -> None:
        self._end_token_ids, self._close = end_token_ids, close

    def ends_of(self, requests: Iterable[Request]) -> frozenset[int]:
        """Returns the tokens that may end the answer of one of these requests, or more. Any other ends none."""
        return self._end_token_ids.union(*(request.params.stop_token_ids for request in requests))

    def tell(self, request: Request, output: StepOutput) -> None:
        """Reports a step's output, if there is anything in it, and the answer's end, if it ends with it."""
        output = request.with_end(output, self._end_token_ids)
        if output.finish_reason is not None:
            self._close(request)
        if output.token is not None or output.prompt or output.finish_reason is not None:
            self.deliver(request, output)

    def fail(self, request: Request, message: str, non_finite: NonFinite | None = None) -> None:
        """Ends a request with an error."""
        request.has_failed = True
        self._close(request)
        self.deliver(request, StepOutput(finish_reason=FinishReason.ERROR, error=message, non_finite=non_finite))

    def deliver(self, request: Request, output: StepOutput) -> None:
        """Calls a request's sink, of an answer that does not end with this output unless it says so. If that fails,
        the request is dropped and the engine goes on."""
        try:
            request.sink(output)
        except Exception:
            logger.exception("a request's listener failed; the request is dropped")
            self._close(request)
