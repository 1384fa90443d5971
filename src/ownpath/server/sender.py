"""Whose request it is, and how urgent: what the scheduler's turns go by.

A client is an API key, on a server without keys an address (an IPv6 network of 64 bits). Among requests of one priority
clients begin in turns, so that one with a hundred does not keep another one waiting.
"""

from typing import NamedTuple

from starlette.requests import Request
from starlette.types import Scope

from ownpath.server.roster import site_of

MOST_URGENT, LEAST_URGENT = -(2**31), 2**31 - 1
_KEY = "ownpath.key"


class Sender(NamedTuple):
    """client: a name that is the same for all of its requests. priority: the lower, the earlier they run."""

    client: str = ""
    priority: int = 0


ANYBODY = Sender()


def note_key(scope: Scope, digest: bytes) -> None:
    """Notes the digest of the API key that let a request through."""
    scope[_KEY] = digest.hex()


def noted_key(scope: Scope) -> str:
    """Returns that digest in hexadecimal; empty on a server without keys."""
    key: str = scope.get(_KEY, "")
    return key


def sender_of(request: Request, priority: int) -> Sender:
    """Returns whose request it is."""
    address = "" if request.client is None else site_of(request.client.host)
    return Sender(noted_key(request.scope) or address, priority)


def read_priority(value: object) -> int:
    """Reads any value: whole numbers are cut to 32 bits, everything else is 0, as if it had not been sent."""
    if isinstance(value, bool) or not isinstance(value, int):
        return 0
    return max(MOST_URGENT, min(value, LEAST_URGENT))
