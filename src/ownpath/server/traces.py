"""Facts of a request for a trace: when it came, what it asked for, and what each answer went through. No library.

A recorder makes spans of them when the request has ended; ``otel`` has the one that is there.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ownpath.engine.request import SamplingParams
from ownpath.server.timeline import Timeline

OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
}
"""Path -> its operation in OpenTelemetry's conventions. Other paths generate nothing and are not traced."""
_NOTE = "ownpath.trace"


class Generating(Protocol):
    """The answers of a request, as far as a trace tells them."""

    @property
    def timelines(self) -> list[Timeline]: ...

    @property
    def params(self) -> SamplingParams | None: ...

    @property
    def num_prompt_tokens(self) -> int: ...

    @property
    def num_generated_tokens(self) -> int: ...


@dataclass
class TracedRequest:
    """A request on its way, complete when it has ended.

    headers: of the request; what the caller traces is in them. begun_ns, ended_ns: since 1970. begun: the same moment
    as ``time.monotonic``, as timelines count. status: None if the client went before an answer.
    model, generating: once there is something to generate.
    """

    path: str
    headers: Mapping[str, str]
    begun_ns: int
    begun: float
    ended_ns: int = 0
    status: int | None = None
    request_id: str = ""
    model: str | None = None
    generating: Generating | None = None

    def at_ns(self, point: float) -> int:
        """Returns a point in time of ``time.monotonic`` in nanoseconds since 1970."""
        return self.begun_ns + round((point - self.begun) * 1e9)


class TraceRecorder(Protocol):
    """Makes spans of requests. ``record`` must return at once; ``close`` sends what is left, for a bounded time."""

    def record(self, request: TracedRequest) -> None: ...

    def close(self) -> None: ...


class TraceRequests:
    """Watches every request that may generate, from its head to the last byte of its answer."""

    def __init__(self, app: ASGIApp, recorder: TraceRecorder) -> None:
        self._app, self._recorder = app, recorder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in OPERATIONS:
            await self._app(scope, receive, send)
            return
        traced = TracedRequest(scope["path"], Headers(scope=scope), time.time_ns(), time.monotonic())
        scope[_NOTE] = traced

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                traced.status = message["status"]
                traced.request_id = Headers(raw=message["headers"]).get("x-request-id", "")
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            traced.ended_ns = traced.at_ns(time.monotonic())
            self._recorder.record(traced)


def note_generation(scope: Scope, model: str, generating: Generating) -> None:
    """Notes what a request generates, if it is traced. model: by the name that it was called by."""
    traced = scope.get(_NOTE)
    if isinstance(traced, TracedRequest):
        traced.model, traced.generating = model, generating
