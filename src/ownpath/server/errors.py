"""Errors in OpenAI's shape. Their texts name the field or the limit, never a path, an address or a traceback."""

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

_MAX_MESSAGE_CHARS = 400
_RETRY_AFTER_S = "1"


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

    def body(self) -> dict[str, object]:
        """Returns the JSON object that clients see."""
        refusal = "rate_limit_error" if self.status == 429 else "invalid_request_error"
        kind = "server_error" if self.status >= 500 else refusal
        message = str(self)
        if len(message) > _MAX_MESSAGE_CHARS:
            message = message[:_MAX_MESSAGE_CHARS] + "..."
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return JSONResponse(self.body(), self.status, self.headers)


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
    return error.response()


async def on_http_error(request: Request, error: Exception) -> Response:
    """Answers with Starlette's own 404 and 405 in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    texts = {404: "there is nothing at this path", 405: "this method is not allowed here"}
    headers = dict(error.headers) if error.headers else None
    return ApiError(error.status_code, texts.get(error.status_code, "the request failed"), headers=headers).response()


async def on_client_gone(request: Request, error: Exception) -> Response:
    """Answers with 499, as other servers log it; nobody reads it."""
    return Response(status_code=499)
