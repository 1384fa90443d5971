"""Reads a request's body as JSON, with limits on its size, depth and time."""

import asyncio
from dataclasses import dataclass

from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from ownpath.server.errors import ApiError, ClientGone, bad_request


@dataclass(frozen=True)
class Limits:
    """Limits on one request before anything is generated.

    max_body_bytes: larger bodies are refused with 413, without being read to their end.
    body_timeout_s: time to send the body (408).
    max_prompts: prompts in one completions request.
    """

    max_body_bytes: int = 4 * 2**20
    body_timeout_s: float = 30.0
    max_prompts: int = 64


async def read_json_object(request: Request, limits: Limits) -> dict[str, object]:
    """Reads the body as a JSON object. Errors: ApiError 400, 408, 413 or 415; ClientGone."""
    # Browsers send other content types across sites without a preflight request; this one needs one.
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the Content-Type must be application/json")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "compressed bodies are not supported")
    data = await _read(request, limits)
    try:
        # Refuses NaN and Infinity, invalid UTF-8, lone surrogates, and nesting beyond 200 levels.
        value = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise bad_request(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise bad_request("the body must be a JSON object", code="invalid_json")
    return value


async def _read(request: Request, limits: Limits) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > limits.max_body_bytes:
        raise _too_large(limits)
    data = bytearray()
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            async for chunk in request.stream():
                data += chunk
                if len(data) > limits.max_body_bytes:
                    raise _too_large(limits)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {limits.body_timeout_s:g} seconds") from None
    except ClientDisconnect:
        raise ClientGone from None
    return bytes(data)


def _too_large(limits: Limits) -> ApiError:
    message = f"the body is larger than {limits.max_body_bytes} bytes"
    return ApiError(413, message, headers={"Connection": "close"})
