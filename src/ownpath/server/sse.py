"""Streamed answers, and their end when the client disconnects."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ownpath.server.errors import ApiError, ClientGone
from ownpath.server.json_text import to_json

Result = TypeVar("Result")

JsonObject = dict[str, Any]
"""An object of an answer, whose values are JSON values: a chunk, a choice, a delta."""


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Returns the result of the work. If the client goes first, cancels the work. Errors: ClientGone."""
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(_wait_for_disconnect(receive))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()  # type: ignore[return-value]
        raise ClientGone
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def with_pings(events: AsyncIterator[JsonObject], ping: JsonObject, every_s: float) -> AsyncIterator[JsonObject]:
    """Yields the events, and a ping whenever none has come for so long: clients give up on a stream that is silent."""
    following = asyncio.ensure_future(anext(events, None))
    try:
        while True:
            done, _ = await asyncio.wait((following,), timeout=every_s)
            if not done:
                yield ping
                continue
            event = following.result()
            if event is None:
                return
            yield event
            following = asyncio.ensure_future(anext(events, None))
    finally:
        following.cancel()


class EventStream(Response):
    """Server-sent events: one ``data:`` line per object, then ``[DONE]``. ``on_end`` is called however it ends.

    are_named: each event has a line with its ``type`` before its data, as ``/v1/responses`` and ``/v1/messages`` have
    it; the last event says that it is the last.

    A failure after the first byte cannot change the status any more: it becomes an event with an ``error``
    object, and the stream ends without ``[DONE]``.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[JsonObject],
        on_end: Callable[[], None],
        headers: Mapping[str, str] | None = None,
        *,
        are_named: bool = False,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})})
        del self.headers["content-length"]
        self._events, self._on_end, self._are_named = events, on_end, are_named

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self._send_all(send))
        except ClientGone:
            return
        finally:
            self._on_end()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for event in self._events:
                await _send_data(send, await to_json(event), event["type"] if self._are_named else None)
            if not self._are_named:
                await _send_data(send, b"[DONE]")
        except ApiError as error:
            await _send_data(send, await to_json(error.body()))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_data(send: Send, data: bytes, name: str | None = None) -> None:
    named = b"" if name is None else f"event: {name}\n".encode()
    await send({"type": "http.response.body", "body": named + b"data: " + data + b"\n\n", "more_body": True})
