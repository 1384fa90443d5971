"""The port is taken before the model is loaded, by one server alone, and not opened until it is ready."""

import socket

import pytest

from ownpath.server.listen import CannotListen, share_port, take_port


def test_a_port_is_held_without_listening() -> None:
    with take_port("127.0.0.1", 0) as held:
        port = held.getsockname()[1]
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)
        with pytest.raises(CannotListen, match=f"--port {port} cannot be served: another program listens there"):
            take_port("127.0.0.1", port)
        held.listen()
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    take_port("127.0.0.1", port).close()


def test_a_port_that_waits_for_late_packets_is_free() -> None:
    """The side that closes first keeps the pair of addresses for a minute."""
    with take_port("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        share_port(first)
        first.listen()
        with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
            accepted, _ = first.accept()
            accepted.close()
            client.recv(1)
    take_port("127.0.0.1", port).close()


def test_the_hosts_name_is_looked_up_first() -> None:
    with take_port("localhost", 0) as held:
        assert held.family == socket.AF_INET
    with pytest.raises(CannotListen, match=r"--host no\.such\.host\.invalid"):
        take_port("no.such.host.invalid", 0)
    with pytest.raises(CannotListen, match="no such address"):
        take_port("192.0.2.1", 0)
