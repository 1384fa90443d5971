"""The ASGI application: its paths, what every request passes on its way to them, and its error responses."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ownpath.chat.effort import DEFAULT, Release
from ownpath.chat.tokenizer import Tokenizer
from ownpath.server import errors
from ownpath.server.access import AccessPolicy
from ownpath.server.agent_api import AgentApi
from ownpath.server.api_reference import ApiReference
from ownpath.server.body import BodyReader, Limits
from ownpath.server.debug import DebugPlan
from ownpath.server.fingerprint import system_fingerprint
from ownpath.server.gate import HostGate, KeyGate
from ownpath.server.grammar_desk import GrammarDesk
from ownpath.server.labels import LabelLog
from ownpath.server.metrics import Metrics
from ownpath.server.policy import RequestPolicy
from ownpath.server.request_log import LogRequests, RequestLog
from ownpath.server.route_table import (
    COUNT_PATH,
    DOCS_PATH,
    INPUT_TOKENS_PATH,
    MESSAGES_PATH,
    PAGE_PATH,
    RESPONSES_PATH,
    served_routes,
)
from ownpath.server.routes import Api
from ownpath.server.static_page import StaticPage
from ownpath.server.token_api import TokenApi
from ownpath.server.traces import TraceRecorder, TraceRequests
from ownpath.server.vitals import Vitals

Endpoint = Callable[[Request], Awaitable[Response]]
_DEBUG_PATH = "/debug/plan"
_ANTHROPIC_HEADERS = (
    *("X-Api-Key", "Anthropic-Version", "Anthropic-Beta"),
    "Anthropic-Dangerous-Direct-Browser-Access",
)
_LIMITS, _OPEN = Limits(), AccessPolicy()


@dataclass(frozen=True)
class Rules:
    """Rules that hold for every request.

    limits: on its body. access: who may send it. timeout_s: from its prompt to the end of its answer. recorder: makes
    traces; ``None``: there are none.
    """

    limits: Limits = _LIMITS
    access: AccessPolicy = _OPEN
    log_requests: LogRequests = LogRequests.OFF
    timeout_s: float = 3600.0
    recorder: TraceRecorder | None = None


def create_app(
    vitals: Vitals,
    tokenizer: Tokenizer,
    model_id: str,
    rules: Rules | None = None,
    release: Release | None = None,
    debug: DebugPlan | None = None,
    policy: RequestPolicy | None = None,
    grammars: GrammarDesk | None = None,
) -> Starlette:
    """Creates the application for one model. The engine must be started; the application stops it when it shuts down.

    vitals: of the engine that answers.
    release: the release whose ``reasoning_effort`` words the model knows; ``None``: the first.
    policy: what becomes of requests that ask for what is not there, and further names of the model.
    grammars: compiles what answers must fit; ``None``: its own, which starts with the first such request.
    debug: the data behind ``/debug/plan``; without it there is no such path.
    """
    rules = rules or Rules()
    bodies = BodyReader(rules.limits)
    metrics = Metrics()
    base = (
        vitals,
        tokenizer,
        model_id,
        int(time.time()),
        bodies,
        release or Release(DEFAULT, "default"),
        metrics,
        rules.timeout_s,
    )
    desk = grammars or GrammarDesk(tokenizer, vitals.engine.end_token_ids)
    api = Api(*base, policy or RequestPolicy(), system_fingerprint(vitals.engine.config), LabelLog(), desk)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        vitals.engine.stop()
        bodies.close()
        desk.close()
        if rules.recorder is not None:
            await asyncio.to_thread(rules.recorder.close)

    endpoints = _endpoints(api, debug)
    declared = served_routes(has_debug=debug is not None)
    assert sorted((it.path, it.method) for it in declared) == sorted((p, m) for p in endpoints for m in endpoints[p])
    routes = [Route(it.path, endpoints[it.path][it.method], methods=[it.method]) for it in declared]
    handlers = {
        errors.ApiError: errors.on_api_error,
        errors.ClientGone: errors.on_client_gone,
        HTTPException: errors.on_http_error,
    }
    open_paths = {PAGE_PATH, DOCS_PATH} if debug is None else {PAGE_PATH, DOCS_PATH, _DEBUG_PATH}
    layers = _layers(rules, metrics, open_paths=frozenset(open_paths))
    app = Starlette(routes=routes, middleware=layers, exception_handlers=handlers, lifespan=lifespan)
    # A redirect would be built from the client's own Host header, and POST clients do not follow it anyway.
    app.router.redirect_slashes = False
    return app


def _endpoints(api: Api, debug: DebugPlan | None) -> dict[str, Mapping[str, Endpoint]]:
    """Returns each path with its methods."""
    tokens, agents, reference = TokenApi(api), AgentApi(api), ApiReference(has_debug=debug is not None)
    paths: dict[str, Mapping[str, Endpoint]] = {
        PAGE_PATH: {"GET": StaticPage("page.html").show},
        "/health": {"GET": api.health},
        "/ready": {"GET": api.ready},
        "/metrics": {"GET": api.prometheus},
        "/v1/models": {"GET": api.models},
        "/v1/models/{model_id:path}": {"GET": api.model},
        "/v1/completions": {"POST": api.completions},
        "/v1/chat/completions": {"POST": api.chat_completions},
        RESPONSES_PATH: {"POST": agents.responses},
        INPUT_TOKENS_PATH: {"POST": agents.input_tokens},
        MESSAGES_PATH: {"POST": agents.messages},
        COUNT_PATH: {"POST": agents.count_tokens},
        "/tokenize": {"POST": tokens.tokenize},
        "/detokenize": {"POST": tokens.detokenize},
        "/tokenizer_info": {"GET": tokens.tokenizer_info},
        "/version": {"GET": tokens.version},
        "/openapi.json": {"GET": reference.describe},
        DOCS_PATH: {"GET": StaticPage("docs.html").show},
    }
    return paths if debug is None else paths | {_DEBUG_PATH: {"GET": debug.show, "POST": debug.record}}


def _layers(rules: Rules, metrics: Metrics, open_paths: frozenset[str]) -> list[Middleware]:
    """Returns what a request passes, in order. A browser's preflight request carries no key: CORS comes before keys."""
    access = rules.access
    layers = [] if rules.recorder is None else [Middleware(TraceRequests, recorder=rules.recorder)]
    layers.append(Middleware(RequestLog, metrics=metrics, tells=rules.log_requests))
    if access.hosts:
        layers.append(Middleware(HostGate, hosts=access.hosts))
    if access.origins:
        layers.append(
            Middleware(
                CORSMiddleware,
                allow_origins=access.origins,
                allow_methods=("GET", "POST"),
                allow_headers=("Authorization", "Content-Type", "X-Request-Id", *_ANTHROPIC_HEADERS),
                expose_headers=("X-Request-Id", "Retry-After"),
            )
        )
    if access.keys:
        layers.append(Middleware(KeyGate, keys=access.keys, open_paths=open_paths))
    return layers
