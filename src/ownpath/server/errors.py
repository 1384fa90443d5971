"""Errors in OpenAI's shape, or in Anthropic's below ``/v1/messages``.

Their texts name the field or the limit, never a path, an address or a traceback.
"""

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from ownpath.server.route_table import MESSAGES_PATH

_MAX_MESSAGE_CHARS = 400
_RETRY_AFTER_S = "1"
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
REQUEST_ID = "ownpath.request_id"
"""Key of a request's id in its scope."""


def is_for_messages(scope: Scope) -> bool:
    """True for the paths whose clients are Anthropic's."""
    path: str = scope.get("path", "")
    return path == MESSAGES_PATH or path.startswith(f"{MESSAGES_PATH}/")


class ApiError(Exception):
    """An answer other than 200: status, a message for people, and the field (``param``) at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def told(self) -> dict[str, object]:
        """Returns what clients are told, in OpenAI's words."""
        refusal = "rate_limit_error" if self.status == 429 else "invalid_request_error"
        kind = "server_error" if self.status >= 500 else refusal
        message = str(self)
        if len(message) > _MAX_MESSAGE_CHARS:
            message = message[:_MAX_MESSAGE_CHARS] + "..."
        return {"message": message, "type": kind, "param": self.param, "code": self.code}

    def body(self) -> dict[str, object]:
        """Returns the JSON object that OpenAI's clients see."""
        return {"error": self.told()}

    def body_for_messages(self, request_id: str | None) -> dict[str, object]:
        """Returns the JSON object that Anthropic's clients see; what ``param`` names stands in the message too."""
        kind = _ANTHROPIC_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": self.told()["message"]}, "request_id": request_id}

    def response(self, scope: Scope) -> Response:
        """Returns the answer, in the form of the path that was asked."""
        body = self.body_for_messages(scope.get(REQUEST_ID)) if is_for_messages(scope) else self.body()
        return JSONResponse(body, self.status, self.headers)


class ClientGone(Exception):
    """The client closed the connection; nobody reads the answer."""


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Makes a 400: the client's request is at fault."""
    return ApiError(400, message, param=param, code=code)


def overloaded(message: str) -> ApiError:
    """Makes a 429: there is no room now; it tells the client when to come back."""
    return ApiError(429, message, code="overloaded", headers={"Retry-After": _RETRY_AFTER_S})


def unavailable(message: str) -> ApiError:
    """Makes a 503: this server runs no more requests; another one may, and this one when it is back."""
    return ApiError(503, message, code="unavailable", headers={"Retry-After": _RETRY_AFTER_S, "Connection": "close"})


def shorten(value: object, limit: int = 60) -> str:
    """Quotes a client's own value, short enough for a message."""
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."


async def on_api_error(request: Request, error: Exception) -> Response:
    """Answers with our own errors, wherever they were raised."""
    assert isinstance(error, ApiError)
    return error.response(request.scope)


async def on_http_error(request: Request, error: Exception) -> Response:
    """Answers with Starlette's own 404 and 405 in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    texts = {404: "there is nothing at this path", 405: "this method is not allowed here"}
    headers = dict(error.headers) if error.headers else None
    return ApiError(error.status_code, texts.get(error.status_code, "the request failed"), headers=headers).response(
        request.scope
    )


async def on_client_gone(request: Request, error: Exception) -> Response:
    """Answers with 499, as other servers log it; nobody reads it."""
    return Response(status_code=499)
