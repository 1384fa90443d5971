"""The application behind uvicorn: limits of the HTTP layer, one line at the start, a clean end."""

import logging
import signal
import socket
import sys

import uvicorn
from starlette.applications import Starlette

_MAX_HEADER_BYTES = 64 * 1024
_MAX_CONNECTIONS = 512
# How long answers may go on after SIGTERM before they are cut off.
_DRAIN_S = 5


class Server(uvicorn.Server):
    """uvicorn that says where the model can be reached, once it can."""

    def __init__(self, config: uvicorn.Config, model_id: str) -> None:
        super().__init__(config)
        self._model_id = model_id

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            host = f"[{host}]" if ":" in host else host
            print(f"ownpath serves {self._model_id} at http://{host}:{port}/v1", file=sys.stderr, flush=True)


def make_server(app: Starlette, host: str, port: int, model_id: str) -> Server:
    """A server that has not started yet."""
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http="h11",
        ws="none",
        log_level=logging.WARNING,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=_MAX_CONNECTIONS,
        h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
        timeout_graceful_shutdown=_DRAIN_S,
    )
    return Server(config, model_id)


def run_server(app: Starlette, host: str, port: int, model_id: str) -> int:
    """Serves until SIGINT or SIGTERM; 0 after a clean end, 1 if it could not start (uvicorn has said why)."""
    server = make_server(app, host, port, model_id)
    # uvicorn raises the signal again after its shutdown, for whoever handled it before. Being asked to end is not
    # a failure here: without these, a clean end would look like a crash to whoever started us.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    try:
        server.run()
    except SystemExit:
        return 1
    return 0 if server.started else 1
