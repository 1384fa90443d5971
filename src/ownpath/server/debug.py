"""``/debug/plan``: shows the plan and the calls so far to holders of the admin key."""

import asyncio
import hmac
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ownpath.server.body import BodyReader, Limits
from ownpath.server.errors import ApiError, bad_request, shorten
from ownpath.server.gate import bearer_token, digest
from ownpath.server.json_shape import CONVERSATION
from ownpath.trace import Ledger, Record, Records

SCHEMA = 1
"""Version of the answer's schema; increased when a field changes its meaning or is removed."""


@dataclass(repr=False)
class DebugPlan:
    """facts: what does not change while the model is served: ``model``, ``release``, ``versions``, ``device``,
        ``plan`` and ``memory``.

    records: records of calls since an admin turned them on; ``None`` while they are off.
    """

    admin_key: str
    facts: Mapping[str, object]
    ledger: Ledger
    limits: Limits
    records: Records | None = None

    async def show(self, request: Request) -> Response:
        """``GET /debug/plan``: all of it, or what ``?fields=`` names, between commas."""
        self._check_admin(request)
        fields = request.query_params.get("fields")
        # Thousands of modules: rendered in a thread, so that the event loop goes on answering.
        return await asyncio.to_thread(self._answer, None if fields is None else fields.split(","))

    async def record(self, request: Request) -> Response:
        """``POST /debug/plan``: {"recording": true} starts to record calls, false stops and drops the records."""
        self._check_admin(request)
        asked = await BodyReader(self.limits).read(request, CONVERSATION, dict)
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
        """Checks the admin key. Errors: ApiError 401 without a bearer token, 403 with another than the admin's."""
        token = bearer_token(request.headers.get("authorization", ""))
        if not token:
            message = "this path wants the admin key, as Authorization: Bearer KEY"
            raise ApiError(401, message, code="no_admin_key", headers={"WWW-Authenticate": "Bearer"})
        # Digests have one length, so that the comparison does not reveal the key's length either.
        if not hmac.compare_digest(digest(token), digest(self.admin_key)):
            raise ApiError(403, "this key is not the admin's", code="wrong_admin_key")

    def _answer(self, fields: Sequence[str] | None) -> Response:
        """Renders the fields, all for None. Errors: ApiError 400 for one that is not there."""
        records = self.records
        changing = {"schema": SCHEMA, "recording": records is not None, "ran": list(self._called_slots(records))}
        told = changing | dict(self.facts)
        unknown = [name for name in fields or () if name not in told]
        if unknown:
            raise bad_request(f"fields: there is no {shorten(unknown[0])}; there are {', '.join(told)}", param="fields")
        shown = told if fields is None else {name: told[name] for name in fields}
        return JSONResponse(shown, headers={"Cache-Control": "no-store"})

    def _called_slots(self, records: Records | None) -> Iterator[dict[str, object]]:
        """Yields an entry for every slot that was called since the model is served."""
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


def _form(record: Record) -> dict[str, object]:
    return {
        "variant": record.variant,
        "arguments": list(record.arguments),
        "results": list(record.results),
        "calls": record.num_calls,
    }
