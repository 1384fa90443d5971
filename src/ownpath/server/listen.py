"""The port of the server, taken before a model is loaded: whoever asked for a taken one is told at once."""

import errno
import socket

_REASONS = {
    errno.EADDRINUSE: "another program listens there (--port 0 takes a free port)",
    errno.EACCES: "this user may not take that port; ports from 1024 on are free for everyone",
    errno.EADDRNOTAVAIL: "this machine has no such address",
}


Address = tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]
"""As ``getaddrinfo`` gives it."""


class CannotListen(ValueError):
    """The address cannot be taken; the message names the options."""


def take_port(host: str, port: int) -> socket.socket:
    """Returns a socket that holds the port but does not listen yet: a client is refused until the model is ready.

    Errors: CannotListen.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError):
        raise CannotListen(f"--host {host}: no address has this name") from None
    family, kind, protocol, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
    try:
        return _bound(socket.socket(family, kind, protocol), address, is_shared=False)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise _refusal(host, port, error) from None
    try:
        # The port may only wait for the packets of an earlier server; then it can be had by asking for that.
        return _bound(socket.socket(family, kind, protocol), address, is_shared=True)
    except OSError as error:
        raise _refusal(host, port, error) from None


def share_port(listener: socket.socket) -> None:
    """Lets the next server have the port at once when this one has ended; called when it begins to listen.

    Its connections inherit that. Until then nobody else may take the port, so that two servers cannot both load.
    """
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, True)


def _bound(listener: socket.socket, address: Address, *, is_shared: bool) -> socket.socket:
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, is_shared)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def _refusal(host: str, port: int, error: OSError) -> CannotListen:
    reason = _REASONS.get(error.errno or 0, error.strerror or "no reason is given")
    return CannotListen(f"--host {host} --port {port} cannot be served: {reason}")
