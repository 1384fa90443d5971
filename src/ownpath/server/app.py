"""The ASGI application: its paths, its error responses, and the end of the engine."""

import contextlib
import time
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import Route

from ownpath.chat.effort import DEFAULT, Release
from ownpath.chat.tokenizer import Tokenizer
from ownpath.engine.engine import Engine
from ownpath.server import errors
from ownpath.server.body import Limits
from ownpath.server.debug import DebugPlan
from ownpath.server.metrics import Metrics
from ownpath.server.routes import Api


def create_app(
    engine: Engine,
    tokenizer: Tokenizer,
    model_id: str,
    limits: Limits | None = None,
    release: Release | None = None,
    debug: DebugPlan | None = None,
) -> Starlette:
    """Creates the application for one model. The engine must be started; the application stops it when it shuts down.

    release: the release whose ``reasoning_effort`` words the model knows; ``None``: the first.
    debug: the data behind ``/debug/plan``; without it there is no such path.
    """
    api = Api(
        engine,
        tokenizer,
        model_id,
        int(time.time()),
        limits or Limits(),
        release or Release(DEFAULT, "default"),
        Metrics(),
    )

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        engine.stop()

    routes = [
        Route("/health", api.health),
        Route("/metrics", api.prometheus),
        Route("/v1/models", api.models),
        Route("/v1/models/{model_id:path}", api.model),
        Route("/v1/completions", api.completions, methods=["POST"]),
        Route("/v1/chat/completions", api.chat_completions, methods=["POST"]),
    ]
    if debug is not None:
        routes += [Route("/debug/plan", debug.show), Route("/debug/plan", debug.record, methods=["POST"])]
    handlers = {
        errors.ApiError: errors.on_api_error,
        errors.ClientGone: errors.on_client_gone,
        HTTPException: errors.on_http_error,
        Exception: errors.on_unexpected_error,
    }
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
    # A redirect would be built from the client's own Host header, and POST clients do not follow it anyway.
    app.router.redirect_slashes = False
    return app
