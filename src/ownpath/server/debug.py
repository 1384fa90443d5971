"""``/debug/plan``: what was planned and what has run, for whoever holds the admin key."""

import asyncio
import hashlib
import hmac
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ownpath.server.body import Limits, read_json_object
from ownpath.server.errors import ApiError, bad_request
from ownpath.trace import Ledger, Record, Records

SCHEMA = 1
"""Goes up when a field of the answer changes its meaning or goes away."""
MIN_KEY_CHARS = 16


def require_admin_key(key: str) -> str:
    """The key. Errors: ValueError, which does not tell it, for one that is short or that no header can carry."""
    if len(key) < MIN_KEY_CHARS or not all("!" <= character <= "~" for character in key):
        raise ValueError(f"the admin key must be at least {MIN_KEY_CHARS} printable ASCII characters without spaces")
    return key


@dataclass(repr=False)
class DebugPlan:
    """facts: what does not change while the model is served: ``model``, ``versions``, ``device`` and ``plan``.

    records: what calls looked like since an admin asked for it; ``None`` while nobody does.
    """

    admin_key: str
    facts: Mapping[str, Any]
    ledger: Ledger
    limits: Limits
    records: Records | None = None

    async def show(self, request: Request) -> Response:
        """``GET /debug/plan``"""
        self._check_admin(request)
        # Thousands of modules: written beside the event loop, which goes on answering.
        return await asyncio.to_thread(self._answer)

    async def record(self, request: Request) -> Response:
        """``POST /debug/plan``: {"recording": true} starts to record calls, false ends it and forgets them."""
        self._check_admin(request)
        asked = await read_json_object(request, self.limits)
        if set(asked) != {"recording"} or not isinstance(asked["recording"], bool):
            raise bad_request('the body must be {"recording": true} or {"recording": false}', param="recording")
        if self.records is None and asked["recording"]:
            self.records = Records()
            self.ledger.observers.attach(self.records)
        elif self.records is not None and not asked["recording"]:
            self.ledger.observers.detach(self.records)
            self.records = None
        return JSONResponse({"recording": asked["recording"]})

    def _check_admin(self, request: Request) -> None:
        """Errors: ApiError 401 without a bearer token, 403 with another than the admin's."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            message = "this path wants the admin key, as Authorization: Bearer KEY"
            raise ApiError(401, message, code="no_admin_key", headers={"WWW-Authenticate": "Bearer"})
        # Digests have one length, so that the comparison tells nothing of the key's either.
        if not hmac.compare_digest(_digest(token.strip()), _digest(self.admin_key)):
            raise ApiError(403, "this key is not the admin's", code="wrong_admin_key")

    def _answer(self) -> Response:
        records = self.records
        changing = {"schema": SCHEMA, "recording": records is not None, "ran": list(self._ran(records))}
        return JSONResponse(changing | dict(self.facts), headers={"Cache-Control": "no-store"})

    def _ran(self, records: Records | None) -> Iterator[dict[str, Any]]:
        """Every slot that was called since the model is served."""
        for slot, num_calls in dict(self.ledger.calls).items():
            use, (runner, kernel) = self.ledger.uses[slot], self.ledger.kernels[slot]
            yield {
                "slot": slot,
                "runner": use.runner,
                "kernel": use.kernel,
                "layout": use.layout,
                "as_planned": (use.runner, use.kernel) == (runner, kernel),
                "calls": num_calls,
                "recorded": [_form(record) for record in records.listed(slot)] if records is not None else [],
                "unlisted_calls": records.num_unlisted(slot) if records is not None else 0,
            }


def _form(record: Record) -> dict[str, Any]:
    return {
        "variant": record.variant,
        "arguments": list(record.arguments),
        "results": list(record.results),
        "calls": record.num_calls,
    }


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
