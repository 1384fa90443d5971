"""The gates before every path: API keys, and names under which the server may be called."""

import hashlib
import hmac
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from ownpath.server.errors import ApiError, shorten
from ownpath.server.sender import note_key

PROBES = frozenset({"/health", "/ready"})
"""Paths that say nothing but whether the server works: supervisors ask them without a key, by the machine's address."""


class HostGate:
    """Refuses names that the server does not have: a web page cannot reach it by a name that it points here."""

    def __init__(self, app: ASGIApp, hosts: Collection[str]) -> None:
        self._app, self._hosts = app, [host.lower() for host in hosts]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in PROBES:
            host = host_name(Headers(scope=scope).get("host", ""))
            if not any(_is_named(host, allowed) for allowed in self._hosts):
                message = f"this server is not called {shorten(host)}; --allowed-hosts names what it may be called"
                refusal = ApiError(403, message, code="host_not_allowed", headers={"Connection": "close"})
                await refusal.response(scope)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class KeyGate:
    """Lets through only who has an API key, as a bearer token or in ``X-Api-Key``, as Anthropic's clients send it.

    Every path needs one, also one that does not exist, except the probes.
    open_paths: paths that hold nothing of the model, or check a key of their own.
    """

    def __init__(self, app: ASGIApp, keys: Collection[str], open_paths: frozenset[str]) -> None:
        self._app = app
        self._open = PROBES | open_paths
        self._digests = [digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self._open and not self._has_key(scope):
            message = "this server wants an API key, as Authorization: Bearer KEY"
            headers = {"WWW-Authenticate": "Bearer", "Connection": "close"}
            refusal = ApiError(401, message, code="invalid_api_key", headers=headers)
            await refusal.response(scope)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        headers = Headers(scope=scope)
        given = digest(bearer_token(headers.get("authorization", "")) or headers.get("x-api-key", ""))
        note_key(scope, given)
        # All are compared, so that the time does not tell which one fits.
        return sum(hmac.compare_digest(given, known) for known in self._digests) > 0


def bearer_token(authorization: str) -> str:
    """Returns the token of an ``Authorization`` header; empty if it is no bearer token."""
    scheme, _, token = authorization.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def digest(text: str) -> bytes:
    """Hashes a key. Digests have one length, so that comparing them does not tell the key's length either."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def host_name(header: str) -> str:
    """Returns the name in a ``Host`` header, without its port."""
    if header.startswith("["):
        return header.partition("]")[0].lower() + "]"
    return header.partition(":")[0].rstrip(".").lower()


def _is_named(host: str, allowed: str) -> bool:
    if allowed.startswith("*."):
        return host.endswith(allowed[1:]) and len(host) >= len(allowed)
    return allowed == "*" or host == allowed
