"""Attacks on connections: crowds of idle and dripping ones, clients that stop reading or sending, no descriptors left.

Crowds are small here; with ``OWNPATH_ATTACK=full`` in the environment they have their real size (2,000 connections).
"""

import asyncio
import logging
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from cpu.engine.fake_model import FakeModel, random_rule
from cpu.server.harness import HELLO, VOCAB, WAIT_S, Harness, eventually, harness, listening
from cpu.server.sockets import GET_HEALTH, HALF_A_HEAD, ask_health, connect, crowd, is_closed, post, received

from ownpath.server import accept
from ownpath.server.connection import MAX_BODY_PIECES, MAX_HEAD_BYTES, ConnectionLimits
from ownpath.server.roster import Roster, site_of

IS_FULL = os.environ.get("OWNPATH_ATTACK") == "full"
MAX_TOTAL, CROWD = (1024, 2000) if IS_FULL else (48, 100)
ANSWERED_S = 1.0
OK = b"HTTP/1.1 200 OK"


@pytest.fixture(scope="module")
def patient() -> Iterator[tuple[Harness, str]]:
    """A server that no crowd of a test outlasts, with room for fewer than come."""
    limits = ConnectionLimits(MAX_TOTAL, MAX_TOTAL * 3 // 4, head_s=60, idle_s=60, write_s=60)
    with harness() as served, listening(served, connections=limits) as url:
        yield served, url


HALF_A_BODY = post("/v1/completions", b"{" + b" " * 100)[:-50]


@pytest.mark.parametrize("data", [b"", HALF_A_HEAD, HALF_A_BODY, GET_HEALTH], ids=["idle", "head", "body", "kept"])
def test_a_crowd_shuts_nobody_out(data: bytes, patient: tuple[Harness, str]) -> None:
    """All from one address, as is who comes after them. The oldest go; the newest is answered, and may stay."""
    _, url = patient
    worst = 0.0
    with crowd(url, CROWD, data) as connections:
        for path in ("/health", "/ready", "/metrics"):
            begin = time.monotonic()
            assert httpx.get(url + path, timeout=WAIT_S).status_code == 200
            worst = max(worst, time.monotonic() - begin)
        answer = httpx.post(url + "/v1/chat/completions", json={"messages": HELLO, "max_tokens": 2}, timeout=WAIT_S)
        assert answer.status_code == 200
        num_kept = MAX_TOTAL * 3 // 4
        assert eventually(lambda: is_closed(connections[0]) or data == GET_HEALTH)
        if data in (b"", HALF_A_HEAD):
            closed = [is_closed(connection) for connection in connections]
            assert closed == sorted(closed, reverse=True), "the oldest"
            assert CROWD - num_kept <= sum(closed) <= CROWD - num_kept + 8
    print(f"{CROWD} connections: the slowest of three probes took {worst * 1000:.0f} ms")
    assert worst < ANSWERED_S


def test_a_crowd_that_keeps_coming_and_dripping_shuts_nobody_out(patient: tuple[Harness, str]) -> None:
    """Every connection sends a byte of its head again and again, and closed ones are opened anew."""
    _, url = patient
    stop = threading.Event()

    def drip() -> None:
        with crowd(url, CROWD, HALF_A_HEAD) as connections:
            while not stop.is_set():
                for index, connection in enumerate(connections):
                    try:
                        connection.sendall(b"x")
                    except OSError:
                        connection.close()
                        connections[index] = connect(url, HALF_A_HEAD)
                    if stop.is_set():
                        break
            for connection in connections:
                connection.close()

    attacker = threading.Thread(target=drip)
    attacker.start()
    try:
        times = []
        for _ in range(4 if not IS_FULL else 20):
            begin = time.monotonic()
            with connect(url) as connection:
                assert ask_health(connection) == OK
            times.append(time.monotonic() - begin)
    finally:
        stop.set()
        attacker.join()
    print(f"{CROWD} dripping: the slowest of {len(times)} probes took {max(times) * 1000:.0f} ms")
    assert max(times) < ANSWERED_S


def test_one_address_has_less_room_than_all_together() -> None:
    class Quiet:
        def drop(self) -> None:
            dropped.append(self)

        def check(self, now: float) -> None: ...

    dropped: list[Quiet] = []
    roster = Roster()
    ours, theirs = [Quiet() for _ in range(3)], [Quiet() for _ in range(3)]
    for one, other in zip(ours, theirs, strict=True):
        roster.add(one, "a", 1.0)
        roster.add(other, "b", 2.0)
    roster.work(theirs[0])
    assert roster.count_at("b") == 3
    assert roster.drop_oldest("b")
    assert roster.drop_oldest()
    roster.wait(theirs[0], 3.0)
    assert (roster.waits_since(), roster.waits_since("b"), roster.waits_since("c")) == (1.0, 2.0, None)
    assert dropped == [theirs[1], ours[0]]
    while roster.drop_oldest():
        pass
    assert dropped == [theirs[1], ours[0], ours[1], ours[2], theirs[2], theirs[0]], "by how long they wait"
    assert not roster.drop_oldest("a")
    assert (len(roster), roster.count_at("a"), roster.count_at("b")) == (0, 0, 0)


def test_a_site_is_an_address_or_a_network_of_ipv6() -> None:
    assert site_of("192.0.2.7") == site_of("::ffff:192.0.2.7") == "192.0.2.7"
    assert site_of("2001:db8:0:1::1") == site_of("2001:db8:0:1:ffff::9%eth0") != site_of("2001:db8:0:2::1")


@pytest.fixture(scope="module")
def hasty() -> Iterator[tuple[Harness, str]]:
    """A server with little patience."""
    limits = ConnectionLimits(head_s=0.4, idle_s=0.4, write_s=0.4)
    with harness() as served, listening(served, connections=limits) as url:
        yield served, url


def dripping(connection: socket.socket, seconds: float) -> None:
    """Sends a byte every 20 ms until the other side has had enough."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            connection.sendall(b"x")
        except OSError:
            return
        time.sleep(0.02)
    pytest.fail("still open")


def test_a_head_that_drips_in_is_given_up(hasty: tuple[Harness, str]) -> None:
    with connect(hasty[1], HALF_A_HEAD) as connection:
        begin = time.monotonic()
        assert received(connection).startswith(b"HTTP/1.1 408 ")
        assert 0.3 < time.monotonic() - begin < 3
    with connect(hasty[1], HALF_A_HEAD) as connection:
        dripping(connection, 5)


@pytest.mark.parametrize("data", [b"", GET_HEALTH], ids=["new", "kept"])
def test_a_connection_without_a_request_is_closed(data: bytes, hasty: tuple[Harness, str]) -> None:
    with connect(hasty[1], data) as connection:
        begin = time.monotonic()
        assert received(connection).startswith(OK) == bool(data)
        assert 0.3 < time.monotonic() - begin < 3


def test_a_body_that_nobody_wants_may_not_drip_for_ever(hasty: tuple[Harness, str]) -> None:
    """The path does not exist: the answer is there before the body, and nothing reads the rest."""
    with connect(hasty[1], post("/nothing", b"x" * 10_000)[:-9_000]) as connection:
        dripping(connection, 5)


def test_a_client_that_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer is generated no further, and its connection goes."""
    monkeypatch.setattr(accept, "_SEND_BUFFER_BYTES", 4096)
    model = FakeModel(random_rule(VOCAB), VOCAB, 4096)
    limits = ConnectionLimits(write_s=0.2)
    body = b'{"prompt": "hello", "stream": true, "max_tokens": 4000, "logprobs": 20}'  # 4 MB of answer
    with harness(model, max_model_len=4096) as served, listening(served, connections=limits) as url:
        parts = urlsplit(url)
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((parts.hostname, parts.port))
            connection.sendall(post("/v1/completions", body))
            assert eventually(lambda: served.engine.num_open == 1)
            assert eventually(lambda: served.engine.num_open == 0)
        assert len(model.step_sizes) < 3000
        assert httpx.get(url + "/health").status_code == 200


def test_a_body_in_very_many_pieces_is_refused(hasty: tuple[Harness, str]) -> None:
    """A byte in each chunk: 4 MiB would hold the event loop for half a minute."""
    head = post("/v1/completions", b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    begin = time.monotonic()
    with connect(hasty[1], head) as connection:
        try:
            for _ in range(MAX_BODY_PIECES // 1000 + 1):
                connection.sendall(b"1\r\n \r\n" * 1000)
        except OSError:
            pass
        found = received(connection)
    assert found == b"" or found.startswith(b"HTTP/1.1 400 ")
    assert time.monotonic() - begin < 2
    assert httpx.get(hasty[1] + "/health").status_code == 200


def test_what_is_not_http_is_refused_in_openais_shape(hasty: tuple[Harness, str]) -> None:
    for data in (b"\0\1\2\r\n\r\n", b"GET /" + b"a" * 2 * MAX_HEAD_BYTES):
        with connect(hasty[1], data) as connection:
            head, _, body = received(connection).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert b'"code":"invalid_http"' in body


@contextmanager
def few_descriptors(num_left: int) -> Iterator[None]:
    """Leaves this process so many descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = {int(entry.name) for entry in Path("/proc/self/fd").iterdir()}
    free = (number for number in range(hard) if number not in taken)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next(islice(free, num_left, None)), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_without_descriptors_there_is_room_and_no_storm_in_the_log(
    patient: tuple[Harness, str], caplog: pytest.LogCaptureFixture
) -> None:
    """10 descriptors for 40 idle connections and who comes after them: the idle ones make room."""
    parts = urlsplit(patient[1])
    with ExitStack() as stack:
        idle, probes = ([stack.enter_context(socket.socket()) for _ in range(count)] for count in (40, 3))
        with few_descriptors(10):
            for connection in idle:
                connection.connect((parts.hostname, parts.port))
            for connection in probes:
                connection.settimeout(WAIT_S)
                connection.connect((parts.hostname, parts.port))
                begin = time.monotonic()
                assert ask_health(connection) == OK
                assert time.monotonic() - begin < ANSWERED_S
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.getMessage() == "connections wait: Too many open files; idle ones are closed"


def test_the_limit_on_connections_fits_the_descriptors() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = ConnectionLimits(max_total=10 * hard)
    try:
        fitted = accept.fit_to_descriptors(wanted)
        assert 0 < fitted.max_per_site < fitted.max_total < hard
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
        assert accept.fit_to_descriptors(ConnectionLimits(8, 8)) == ConnectionLimits(8, 8)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_pipelined_half_request_has_no_more_time_than_another(hasty: tuple[Harness, str]) -> None:
    async def ask() -> bytes:
        parts = hasty[1].removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(parts[0], int(parts[1]))
        writer.write(GET_HEALTH + HALF_A_HEAD)
        found = await asyncio.wait_for(reader.read(), WAIT_S)
        writer.close()
        return found

    found = asyncio.run(ask())
    assert found.startswith(OK)
    assert b"HTTP/1.1 408 " in found
