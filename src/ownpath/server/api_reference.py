"""``/openapi.json``, made from the tables that the server itself uses. ``/docs`` is a page that shows it."""

import re
from functools import cache

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ownpath.server.request_schemas import Schema, request_schemas
from ownpath.server.route_table import STATUSES, Answered, RouteSpec, served_routes
from ownpath.versions import versions

_ERROR: Schema = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"enum": ["invalid_request_error", "rate_limit_error", "server_error"]},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
_MESSAGES_ERROR: Schema = {
    "type": "object",
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
            "required": ["type", "message"],
        },
        "request_id": {"type": ["string", "null"]},
    },
    "required": ["type", "error", "request_id"],
}
_EVENT: Schema = {
    "type": "object",
    "description": "each event",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
_KEYS: Schema = {
    "key": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
}
"""Ways to send a key."""


class ApiReference:
    """The description of one server. has_debug: it serves ``/debug/plan``."""

    def __init__(self, *, has_debug: bool) -> None:
        self._has_debug = has_debug

    async def describe(self, request: Request) -> Response:
        """``GET /openapi.json``"""
        return JSONResponse(description(has_debug=self._has_debug))


@cache
def description(*, has_debug: bool) -> Schema:
    """Returns the API as an OpenAPI 3.1 object."""
    paths: dict[str, Schema] = {}
    for route in served_routes(has_debug=has_debug):
        path = route.path.replace(":path}", "}")
        paths.setdefault(path, {})[route.method.lower()] = _operation(route)
    schemas = request_schemas() | {"Error": _ERROR, "MessagesError": _MESSAGES_ERROR}
    version = versions().get("ownpath", "source")
    text = "HEAD is answered wherever GET is. Another path is 404, another method 405."
    return {
        "openapi": "3.1.0",
        "info": {"title": "ownpath", "version": version, "description": text},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": _KEYS},
    }


def _operation(route: RouteSpec) -> Schema:
    operation: Schema = {"summary": route.summary, "responses": _responses(route)}
    # A key is asked for only where the server has some: none is a way too.
    operation["security"] = [*({name: []} for name in _KEYS), {}] if route.wants_key else []
    names = re.findall(r"\{(\w+)", route.path)
    if names:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    if route.body:
        forms = [{"$ref": f"#/components/schemas/{name}"} for name in route.body]
        schema = forms[0] if len(forms) == 1 else {"anyOf": forms}
        operation["requestBody"] = {"required": True, "content": {Answered.JSON.value: {"schema": schema}}}
    return operation


def _responses(route: RouteSpec) -> Schema:
    shape = {
        "type": "object",
        "properties": {name: {"type": kind} for name, kind in route.answer},
        "required": [name for name, _ in route.answer],
    }
    schema = shape if route.answered is Answered.JSON else {"type": "string"}
    content: Schema = {route.answered.value: {"schema": schema}}
    if route.streams:
        content["text/event-stream"] = {"schema": _EVENT}
    error = {Answered.JSON.value: {"schema": {"$ref": f"#/components/schemas/{route.error}"}}}
    tells_status = ("status", "string") in route.answer
    responses = {}
    for status in sorted(route.statuses):
        has_own = status == 200 or (tells_status and status == 503)
        responses[str(status)] = {"description": STATUSES[status], "content": content if has_own else error}
    return responses
