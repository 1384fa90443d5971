"""Salts of the prefix cache: who shares what it holds of earlier prompts.

A hit is faster than a miss, so its time tells a client whether somebody has sent the same beginning before. Requests
with different salts share nothing.
"""

from starlette.requests import Request

from ownpath.server.sender import noted_key

MAX_SALT_CHARS = 256


def salt_of(request: Request, asked: str | None, *, is_per_key: bool) -> str:
    """Returns the salt of a request. asked: its field ``cache_salt``. is_per_key: each API key has its own."""
    return f"{noted_key(request.scope) if is_per_key else ''}:{asked or ''}"
