"""Notes of every request its id, its status in the metrics, and a line in the log, without what it says."""

import logging
import re
import time
import uuid
from enum import Enum

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ownpath.server.errors import REQUEST_ID, ApiError, is_for_messages
from ownpath.server.metrics import Metrics

access_log = logging.getLogger("ownpath.access")

_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_MAX_PATH_CHARS = 200
_MAX_LOGGED_BYTES = 4000


class LogRequests(Enum):
    """The log tells nothing of a request, that it was there, or also what it said."""

    OFF = "off"
    ACCESS = "access"
    BODIES = "bodies"


class RequestLog:
    """Gives every request an id, counts its status, and writes a line when it has been answered.

    The id is the client's own ``X-Request-Id`` if that is made of ordinary characters. An unexpected error is a 500
    here: a bug of ours, whose traceback goes to the log under that id and never to the client.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, tells: LogRequests) -> None:
        self._app, self._metrics, self._tells = app, metrics, tells

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        note = _RequestNote(scope, receive, send, keeps_body=self._tells is LogRequests.BODIES)
        scope[REQUEST_ID] = note.request_id
        try:
            await self._app(scope, note.receive, note.send)
        except Exception as error:
            logging.getLogger(__name__).exception("request %s: unexpected %s", note.request_id, type(error).__name__)
            if note.status is not None:
                raise  # the answer has begun: the connection is cut
            failure = ApiError(500, "the server failed while answering this request")
            await failure.response(scope)(scope, receive, note.send)
        finally:
            self._metrics.count_http(scope, note.status)
            if self._tells is not LogRequests.OFF:
                self._write(scope, note)

    def _write(self, scope: Scope, note: "_RequestNote") -> None:
        client = scope.get("client") or ("-", 0)
        fields: dict[str, object] = {
            "client": client[0],
            "method": scope["method"],
            "path": scope["path"][:_MAX_PATH_CHARS],
            "status": note.status or 499,
            "seconds": round(time.perf_counter() - note.begun, 4),
            "request_id": note.request_id,
        }
        line = "%(client)s %(method)s %(path)s %(status)s in %(seconds)s s, id %(request_id)s"
        access_log.info(line, fields, extra={"fields": fields})
        if self._tells is LogRequests.BODIES and note.body:
            text = note.body.decode("utf-8", "backslashreplace")
            body: dict[str, object] = {"request_id": note.request_id, "body": text}
            access_log.info("id %(request_id)s said %(body)s", body, extra={"fields": body})


class _RequestNote:
    """One request on its way through: its id, when it began, the status of its answer, the beginning of its body."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, *, keeps_body: bool) -> None:
        given = Headers(scope=scope).get("x-request-id", "")
        self.request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        self.begun = time.perf_counter()
        self.status: int | None = None
        self.body = bytearray()
        self._receive, self._send, self._keeps_body = receive, send, keeps_body
        self._is_for_messages = is_for_messages(scope)

    async def receive(self) -> Message:
        message = await self._receive()
        if self._keeps_body and len(self.body) < _MAX_LOGGED_BYTES:
            self.body += message.get("body", b"")[: _MAX_LOGGED_BYTES - len(self.body)]
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.request_id
            if self._is_for_messages:
                headers["request-id"] = self.request_id  # the name that Anthropic's clients read
        await self._send(message)
