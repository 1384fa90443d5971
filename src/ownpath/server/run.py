"""Runs the application in uvicorn: its own accept layer, one line at the start, a clean end, one after a fault."""

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import ssl
import sys
from dataclasses import dataclass

import uvicorn
from starlette.applications import Starlette

from ownpath.server.accept import Acceptor, fit_to_descriptors
from ownpath.server.connection import ConnectionLimits, HttpConnection
from ownpath.server.listen import share_port
from ownpath.server.roster import Roster
from ownpath.server.vitals import Vitals
from ownpath.terminal.console import tell

logger = logging.getLogger(__name__)

ENGINE_FAILED = 75
"""Exit code after the engine has stopped by itself (EX_TEMPFAIL: started again, it may work)."""
_LOOK_EVERY_S = 0.1
SWITCH_S = 0.0001
"""Time a thread waits before it asks another one for Python's lock."""
_CONNECTIONS = ConnectionLimits()
# After the engine has stopped, answers still have to be written out.
_WRITE_OUT_S = 5


@dataclass(frozen=True)
class ServerSettings:
    """Settings of how the server listens and ends.

    drain_s: how long answers may go on after a signal; then the engine stops, which ends them.
    farewell_s: from a fault of the engine to the end of the process, for ``/health`` to tell it.
    """

    connections: ConnectionLimits = _CONNECTIONS
    tls: ssl.SSLContext | None = None
    drain_s: float = 5.0
    farewell_s: float = 2.0


class Server(uvicorn.Server):
    """uvicorn that accepts connections itself, and ends open answers with an error instead of cutting them off.

    fault: why the engine stopped by itself; the server has ended because of it.
    """

    def __init__(self, config: uvicorn.Config, model_id: str, vitals: Vitals, settings: ServerSettings) -> None:
        super().__init__(config)
        self.fault: str | None = None
        self.addresses: list[tuple[str, int]] = []
        self._model_id, self._vitals, self._settings = model_id, vitals, settings
        self._limits = fit_to_descriptors(settings.connections)
        self._roster = Roster()
        self._acceptors: list[Acceptor] = []
        self._watch: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to accept on the sockets, which are bound and do not listen yet."""
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            sys.exit(1)
        self.servers = []  # uvicorn's own, which would accept without limits
        for listener in sockets or []:
            host, port = listener.getsockname()[:2]
            self.addresses.append((f"[{host}]" if ":" in host else host, port))
            acceptor = Acceptor(listener, self._roster, self._limits, self._new_connection, self._settings.tls)
            acceptor.start()
            self._acceptors.append(acceptor)
        self._watch = asyncio.create_task(self._watch_over())
        self.started = True
        scheme = "http" if self._settings.tls is None else "https"
        for host, port in self.addresses:
            tell(f"ownpath serves {self._model_id} at {scheme}://{host}:{port}/v1")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Lets open answers end, while ``/ready`` says that no more is taken; then ends what is left."""
        self._vitals.is_draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.drain_s):
                while self._vitals.engine.num_open and not self.force_exit:
                    await asyncio.sleep(_LOOK_EVERY_S / 2)
        for acceptor in self._acceptors:
            acceptor.close()
        if self._watch is not None:
            self._watch.cancel()
        await asyncio.to_thread(self._vitals.engine.stop)
        await super().shutdown(None)

    def _new_connection(self) -> HttpConnection:
        return HttpConnection(self.config, self.server_state, self.lifespan.state, self._roster, self._limits)

    async def _watch_over(self) -> None:
        """Ends connections that take too long, and the server when its engine has stopped by itself."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            now = loop.time()
            for connection in self._roster:
                connection.check(now)
            if self.fault is None and (fault := self._vitals.look(now)) is not None:
                self.fault = fault
                logger.error("%s: the server ends with exit code %d", fault, ENGINE_FAILED)
                loop.call_later(self._settings.farewell_s, self._end)

    def _end(self) -> None:
        self.should_exit = True


def make_server(app: Starlette, vitals: Vitals, model_id: str, settings: ServerSettings | None = None) -> Server:
    """Makes a server that has not started yet; its sockets are given when it runs."""
    settings = settings or ServerSettings()
    config = uvicorn.Config(
        app,
        loop="asyncio",
        http="h11",
        ws="none",
        log_config=None,  # as the process logs: one line for each record, controls escaped
        log_level=logging.ERROR,  # a warning for each line that is not HTTP would fill the log
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=int(settings.connections.idle_s) + 1,
        timeout_graceful_shutdown=_WRITE_OUT_S,
    )
    return Server(config, model_id, vitals, settings)


def run_server(
    app: Starlette, vitals: Vitals, listener: socket.socket, model_id: str, settings: ServerSettings | None = None
) -> int:
    """Serves until SIGINT or SIGTERM; returns 0 after a clean end, 1 if it could not start (uvicorn has said why), and
    ``ENGINE_FAILED`` if the engine has stopped by itself."""
    # uvicorn raises the signal again after its shutdown, for the previous handler. Being asked to end is not a failure
    # here: without these, a clean end would look like a crash to the parent process.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    server = make_server(app, vitals, model_id, settings)
    share_port(listener)
    # What is there now stays: a search for garbage among it would stop every answer for a moment, again and again.
    gc.collect()
    gc.freeze()
    # Torch gives Python's lock back in each operation, and a step has hundreds: beside a thread that parses a large
    # body each of them waits for the lock as long as this, five milliseconds by default.
    sys.setswitchinterval(SWITCH_S)
    try:
        server.run(sockets=[listener])
    except SystemExit:
        return 1
    if server.fault is not None:
        return ENGINE_FAILED
    return 0 if server.started else 1
