"""Reads a request's body as JSON, with limits on its size, shape and time."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from ownpath.server.errors import ApiError, ClientGone, bad_request, overloaded
from ownpath.server.json_shape import JsonLimits, check_numbers, check_shape

INLINE_BYTES = 64 * 1024
"""A larger body is parsed and checked off the event loop, which goes on with other answers."""

Asked = TypeVar("Asked")


@dataclass(frozen=True)
class Limits:
    """Limits on one request before anything is generated.

    max_body_bytes: larger bodies are refused with 413, without being read to their end.
    max_held_bytes: of the bodies that are being read or parsed, all together, where a body is larger than 64 KiB (429).
    body_timeout_s: time to send the body (408).
    """

    max_body_bytes: int = 4 * 2**20
    max_held_bytes: int = 128 * 2**20
    body_timeout_s: float = 30.0


@dataclass
class BodyReader:
    """Reads bodies, large ones with one thread for all of them: their cost in memory is that of one.

    Bodies that come slowly may fill what is held: then the one that has been read longest makes room.
    """

    limits: Limits
    _num_held: int = 0
    _readings: dict["_Reading", None] = field(default_factory=dict)
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "ownpath-bodies"))

    async def read(
        self, request: Request, shape: JsonLimits, read_fields: Callable[[dict[str, object]], Asked]
    ) -> Asked:
        """Reads the body as a JSON object and returns what ``read_fields`` makes of it.

        shape: the most values that it may hold (400).
        Errors: ApiError 400, 408, 413, 415 or 429, and those of ``read_fields``; ClientGone.
        """
        # Browsers send other content types across sites without a preflight request; this one needs one.
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the Content-Type must be application/json")
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError(415, "compressed bodies are not supported")
        reading = _Reading(asyncio.current_task())
        try:
            await self._read(request, reading)
            if len(reading.data) <= INLINE_BYTES:
                return read_fields(_parse(reading.data, shape))
            self._readings.pop(reading, None)  # whole: it makes no room for others any more
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._thread, lambda: read_fields(_parse(reading.data, shape)))
        finally:
            self._readings.pop(reading, None)
            self._num_held -= reading.num_held

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _read(self, request: Request, reading: "_Reading") -> None:
        limits = self.limits
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > limits.max_body_bytes:
            raise _too_large(limits)
        try:
            async with asyncio.timeout(limits.body_timeout_s):
                async for chunk in request.stream():
                    reading.data += chunk
                    if len(reading.data) > limits.max_body_bytes:
                        raise _too_large(limits)
                    self._hold(reading)
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {limits.body_timeout_s:g} seconds") from None
        except ClientDisconnect:
            raise ClientGone from None
        except asyncio.CancelledError:
            if reading.gave_way and reading.task is not None:
                reading.task.uncancel()
                raise _held(limits) from None
            raise

    def _hold(self, reading: "_Reading") -> None:
        """Counts what a large body takes, and makes room for it. Errors: ApiError 429."""
        if len(reading.data) <= INLINE_BYTES:
            return
        self._readings.setdefault(reading)
        self._num_held += len(reading.data) - reading.num_held
        reading.num_held = len(reading.data)
        while self._num_held > self.limits.max_held_bytes:
            oldest = next(iter(self._readings), reading)
            if oldest is reading:
                raise _held(self.limits)
            oldest.give_way()
            self._num_held -= oldest.num_held
            oldest.num_held = 0
            del self._readings[oldest]


@dataclass(eq=False)
class _Reading:
    """A body on its way. num_held: bytes that count as held."""

    task: "asyncio.Task[object] | None"
    data: bytearray = field(default_factory=bytearray)
    num_held: int = 0
    gave_way: bool = False

    def give_way(self) -> None:
        self.gave_way = True
        self.data.clear()
        if self.task is not None:
            self.task.cancel()


def _held(limits: Limits) -> ApiError:
    return overloaded(f"{limits.max_held_bytes} bytes of other requests are being read")


def _too_large(limits: Limits) -> ApiError:
    message = f"the body is larger than {limits.max_body_bytes} bytes"
    return ApiError(413, message, headers={"Connection": "close"})


def _parse(data: bytearray, shape: JsonLimits) -> dict[str, object]:
    """Parses a whole body. Errors: ApiError 400."""
    try:
        check_shape([data], shape)
        check_numbers(data)
    except ValueError as error:
        raise bad_request(f"the body has {error}", code="invalid_json") from None
    try:
        # Refuses NaN and Infinity, invalid UTF-8, lone surrogates, and nesting beyond 200 levels.
        value = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise bad_request(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise bad_request("the body must be a JSON object", code="invalid_json")
    return value
