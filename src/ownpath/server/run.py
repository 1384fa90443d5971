"""Runs the application in uvicorn: limits of the HTTP layer, one line at the start, a clean end."""

import asyncio
import logging
import signal
import socket

import uvicorn
from starlette.applications import Starlette

from ownpath.engine.engine import Engine
from ownpath.server.listen import share_port
from ownpath.terminal.console import tell

_MAX_HEADER_BYTES = 64 * 1024
_MAX_CONNECTIONS = 512
_DRAIN_S = 5.0
# After the engine has stopped, answers still have to be written out.
_WRITE_OUT_S = 5


class Server(uvicorn.Server):
    """uvicorn that prints the model's address, and that ends open answers with an error instead of cutting them off.

    drain_s: how long answers may go on after a signal; then the engine stops, which ends them.
    """

    def __init__(self, config: uvicorn.Config, model_id: str, engine: Engine, drain_s: float) -> None:
        super().__init__(config)
        self._model_id, self._engine, self._drain_s = model_id, engine, drain_s

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            host = f"[{host}]" if ":" in host else host
            tell(f"ownpath serves {self._model_id} at http://{host}:{port}/v1")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        draining = asyncio.ensure_future(self._stop_engine_after_drain())
        try:
            await super().shutdown(sockets)
        finally:
            draining.cancel()

    async def _stop_engine_after_drain(self) -> None:
        await asyncio.sleep(self._drain_s)
        await asyncio.to_thread(self._engine.stop)


def make_server(app: Starlette, engine: Engine, model_id: str, drain_s: float = _DRAIN_S) -> Server:
    """Makes a server that has not started yet; its sockets are given when it runs."""
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        log_config=None,  # as the process logs: one line for each record, controls escaped
        log_level=logging.WARNING,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=_MAX_CONNECTIONS,
        h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
        timeout_graceful_shutdown=int(drain_s) + _WRITE_OUT_S,
    )
    return Server(config, model_id, engine, drain_s)


def run_server(app: Starlette, engine: Engine, listener: socket.socket, model_id: str) -> int:
    """Serves until SIGINT or SIGTERM; returns 0 after a clean end, 1 if it could not start (uvicorn has said why)."""
    server = make_server(app, engine, model_id)
    # uvicorn raises the signal again after its shutdown, for the previous handler. Being asked to end is not a failure
    # here: without these, a clean end would look like a crash to the parent process.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    share_port(listener)
    try:
        server.run(sockets=[listener])
    except SystemExit:
        return 1
    return 0 if server.started else 1
