"""JSON over HTTP to one server: no redirects, no secrets in messages, every failure named with the URL."""

import http.client
import json
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import IO
from urllib.parse import urlsplit

_MAX_BYTES = 256 * 2**20
_SHOWN_CHARS = 200
_NOT_FINITE = ("out of range float values", "not json compliant", "nan is not", "infinity is not", "non-finite float")
"""From Python's json (vLLM, TensorRT-LLM), orjson and JavaScript-like writers, in lower case."""


class CannotAsk(ValueError):
    """The server could not be asked; the message names the URL and its answer."""


class Refused(CannotAsk):
    """The server answered, and refused this request. status: of HTTP."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status

    @property
    def is_not_finite(self) -> bool:
        """True if its words are those of a JSON writer that met NaN or an infinity."""
        words = str(self).lower()
        return any(phrase in words for phrase in _NOT_FINITE)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Treats a redirect like any other answer: following it could carry the key and the prompts to another host."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: object, newurl: str
    ) -> None:
        return None


@dataclass(frozen=True)
class Client:
    """root: ``http://host:port``, without ``/v1``. api_key: sent as a bearer token, shown nowhere."""

    root: str
    timeout_s: float = 60.0
    api_key: str | None = field(default=None, repr=False)

    @classmethod
    def of_url(cls, url: str, timeout_s: float, api_key: str | None = None) -> "Client":
        """Makes a client of the server at ``url``, with or without ``/v1``. Errors: CannotAsk unless it is a plain
        http(s) URL."""
        try:
            parts = urlsplit(url)
            is_plain = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError as error:
            raise CannotAsk(f"{url!r} is not a URL: {error}") from None
        if parts.username is not None or parts.password is not None:
            raise CannotAsk("the URL holds a name or password; name an environment variable instead (--api-key-env)")
        if not is_plain or parts.query or parts.fragment:
            raise CannotAsk(f"{url!r}: expected http://HOST[:PORT][/v1]")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise CannotAsk("the API key holds characters that no HTTP header may")
        path = parts.path.rstrip("/").removesuffix("/v1")
        return cls(f"{parts.scheme}://{parts.netloc}{path}", timeout_s, api_key)

    def get(self, path: str) -> dict[str, object]:
        """Sends a GET request. Errors: as ``post``."""
        return self._ask(path, None)

    def post(self, path: str, body: dict[str, object]) -> dict[str, object]:
        """Sends one request and returns its JSON object. Errors: Refused for a status other than 200, else
        CannotAsk."""
        return self._ask(path, body)

    def _ask(self, path: str, body: dict[str, object] | None) -> dict[str, object]:
        url = self.root + path
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, headers)
        try:
            with urllib.request.build_opener(_NoRedirect).open(request, timeout=self.timeout_s) as response:
                raw = response.read(_MAX_BYTES + 1)
        except urllib.error.HTTPError as error:
            raise _refusal(url, error) from None
        except urllib.error.URLError as error:
            raise CannotAsk(f"{url}: {_reason(error.reason, self.timeout_s)}") from None
        except (OSError, http.client.HTTPException) as error:
            raise CannotAsk(f"{url}: {_reason(error, self.timeout_s)}") from None
        return _json_object(url, raw)


def _reason(error: object, timeout_s: float) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {timeout_s:g} s (--timeout)"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused; nothing listens there"
    return f"{type(error).__name__}: {error}" if isinstance(error, Exception) else str(error)


def _refusal(url: str, error: urllib.error.HTTPError) -> CannotAsk:
    with error:
        if 300 <= error.code < 400:
            return CannotAsk(f"{url}: redirects ({error.code}) to {error.headers.get('Location')!r}; not followed")
        try:
            text = _shown(error.read(64 * 1024))
        except (OSError, http.client.HTTPException):
            text = "no readable body"
    if error.code in (401, 403):
        return CannotAsk(f"{url}: {error.code}, the server wants another key (--api-key-env): {text}")
    return Refused(f"{url}: {error.code}: {text}", error.code)


def _json_object(url: str, raw: bytes) -> dict[str, object]:
    if len(raw) > _MAX_BYTES:
        raise CannotAsk(f"{url}: the answer is larger than {_MAX_BYTES} bytes")
    try:
        answer = json.loads(raw)
    except (ValueError, RecursionError):
        raise CannotAsk(f"{url}: the answer is not JSON: {_shown(raw)}") from None
    if not isinstance(answer, dict):
        raise CannotAsk(f"{url}: expected a JSON object, found {_shown(raw)}")
    return answer


def _shown(raw: bytes) -> str:
    """Returns the start of a body on one line, without terminal control characters."""
    text = " ".join(raw.decode("utf-8", "replace").split())
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "..."
