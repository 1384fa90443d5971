"""Every path that is served, and each status that it can answer with: the application, the metrics and
``/openapi.json`` are made from this table."""

from dataclasses import dataclass
from enum import Enum

PAGE_PATH, DOCS_PATH = "/", "/docs"
RESPONSES_PATH, MESSAGES_PATH = "/v1/responses", "/v1/messages"
COUNT_PATH = f"{MESSAGES_PATH}/count_tokens"
INPUT_TOKENS_PATH = f"{RESPONSES_PATH}/input_tokens"
_ADMIN_PATH = "/debug/plan"

STATUSES = {
    200: "the answer",
    400: "the request is at fault; param names the field",
    401: "a key is missing, where keys are asked for",
    403: "the server is not called by this name, or the key is not the admin's",
    404: "there is no such model, or no such path",
    408: "the request did not arrive in time",
    413: "the body is too large",
    415: "the body is not plain application/json",
    429: "there is no room now; Retry-After says when to come back",
    500: "the server failed; the request may be sent again",
    503: "the server runs no requests now",
    504: "the answer took too long",
    505: "the request is of another HTTP than 1",
}
"""Status -> its meaning. Errors have one shape, except that a connection may be closed with a bare 408 or 503."""

_ANY = frozenset({200, 400, 403, 408, 500, 503, 505})
"""Of every path: a head that is no HTTP, another HTTP, or late; a name that is not the server's; a fault; no room to
connect."""
_KEYED = _ANY | {401}
_BODY = _KEYED | {413, 415, 429}
_MODEL_BODY = _BODY | {404}


class Answered(Enum):
    """Content types of whole answers."""

    JSON = "application/json"
    TEXT = "text/plain"
    HTML = "text/html"


@dataclass(frozen=True)
class RouteSpec:
    """One path with one method.

    statuses: all that it can answer with. body: names of the schemas that its body may have; none: it has no body.
    answer: fields of the answer, name -> JSON type. streams: server-sent events if ``stream`` is true.
    error: name of the schema of its errors.
    """

    method: str
    path: str
    summary: str
    statuses: frozenset[int]
    body: tuple[str, ...] = ()
    answer: tuple[tuple[str, str], ...] = ()
    answered: Answered = Answered.JSON
    streams: bool = False
    error: str = "Error"

    @property
    def wants_key(self) -> bool:
        """True if the path asks for a key, where keys are asked for."""
        return 401 in self.statuses


_STATUS = (("status", "string"),)
_MODEL = (("id", "string"), ("object", "string"), ("created", "integer"), ("owned_by", "string"))
_CHOICES = (
    *(("id", "string"), ("object", "string"), ("created", "integer"), ("model", "string")),
    *(("choices", "array"), ("usage", "object"), ("system_fingerprint", "string")),
)

ROUTES = (
    RouteSpec(
        *("POST", "/v1/chat/completions", "answers a conversation", _MODEL_BODY | {504}),
        body=("ChatRequest",),
        answer=_CHOICES,
        streams=True,
    ),
    RouteSpec(
        *("POST", "/v1/completions", "continues text or token ids", _MODEL_BODY | {504}),
        body=("CompletionRequest",),
        answer=_CHOICES,
        streams=True,
    ),
    RouteSpec(
        *("POST", RESPONSES_PATH, "answers a conversation, as OpenAI's Responses", _MODEL_BODY | {504}),
        body=("ResponsesRequest",),
        answer=(
            *(("id", "string"), ("object", "string"), ("created_at", "integer"), ("model", "string")),
            *(("status", "string"), ("output", "array"), ("usage", "object")),
        ),
        streams=True,
    ),
    RouteSpec(
        *("POST", INPUT_TOKENS_PATH, "the number of a conversation's tokens, as OpenAI's Responses", _MODEL_BODY),
        body=("ResponsesRequest",),
        answer=(("object", "string"), ("input_tokens", "integer")),
    ),
    RouteSpec(
        *("POST", MESSAGES_PATH, "answers a conversation, as Anthropic's Messages", _MODEL_BODY | {504}),
        body=("MessagesRequest",),
        answer=(
            *(("id", "string"), ("type", "string"), ("role", "string"), ("model", "string")),
            *(("content", "array"), ("stop_reason", "string"), ("usage", "object")),
        ),
        streams=True,
        error="MessagesError",
    ),
    RouteSpec(
        *("POST", COUNT_PATH, "the number of a conversation's tokens, as Anthropic's Messages", _MODEL_BODY),
        body=("CountTokensRequest",),
        answer=(("input_tokens", "integer"),),
        error="MessagesError",
    ),
    RouteSpec("GET", "/v1/models", "the model under each of its names", _KEYED, answer=(("data", "array"),)),
    RouteSpec(
        *("GET", "/v1/models/{model_id:path}", "the model under one name", _KEYED | {404}),
        answer=(*_MODEL, ("max_model_len", "integer")),
    ),
    RouteSpec(
        *("POST", "/tokenize", "the token ids of a text or a conversation", _MODEL_BODY),
        body=("TokenizeTextRequest", "TokenizeChatRequest"),
        answer=(("count", "integer"), ("max_model_len", "integer"), ("tokens", "array")),
    ),
    RouteSpec(
        *("POST", "/detokenize", "the text of token ids", _MODEL_BODY),
        body=("DetokenizeRequest",),
        answer=(("prompt", "string"),),
    ),
    RouteSpec(
        *("GET", "/tokenizer_info", "names of the tokenizer's own tokens, and its sizes", _KEYED),
        answer=(("eos_token", "string"), ("add_bos_token", "boolean"), ("model_max_length", "integer")),
    ),
    RouteSpec("GET", "/health", "200 while the engine runs requests", _ANY - {403}, answer=_STATUS),
    RouteSpec("GET", "/ready", "200 if requests should be sent here", _ANY - {403}, answer=_STATUS),
    RouteSpec(
        *("GET", "/metrics", "counters, gauges and durations in Prometheus' format", _KEYED), answered=Answered.TEXT
    ),
    RouteSpec("GET", "/version", "ownpath's version", _KEYED, answer=(("version", "string"),)),
    RouteSpec("GET", "/openapi.json", "this description", _KEYED, answer=(("openapi", "string"), ("paths", "object"))),
    RouteSpec("GET", PAGE_PATH, "a page that chats and shows what runs", _ANY, answered=Answered.HTML),
    RouteSpec("GET", DOCS_PATH, "a page that shows this description", _ANY, answered=Answered.HTML),
    RouteSpec(
        *("GET", _ADMIN_PATH, "what was planned and what ran, for admins", _KEYED),
        answer=(("plan", "object"), ("ran", "array")),
    ),
    RouteSpec(
        *("POST", _ADMIN_PATH, "starts and ends the recording of calls, for admins", _BODY),
        body=("RecordingRequest",),
        answer=(("recording", "boolean"),),
    ),
)


def served_routes(*, has_debug: bool) -> tuple[RouteSpec, ...]:
    """Returns the routes of a server. has_debug: it has an admin key, which opens ``/debug/plan``."""
    return tuple(route for route in ROUTES if has_debug or route.path != _ADMIN_PATH)
