"""Attacks on access: keys, names, origins, addresses; and the notes of a request."""

import hmac
import json
import logging
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from cpu.server.harness import HELLO, Gated, Harness, error, harness

from ownpath.cli import main
from ownpath.server import gate
from ownpath.server.access import LOOPBACK_NAMES, AccessPolicy, access_policy, api_keys, is_loopback
from ownpath.server.app import Rules
from ownpath.server.json_log import JsonFormatter
from ownpath.server.request_log import LogRequests
from ownpath.terminal.console import SafeFormatter

KEYS = ("first-key-of-several", "second-key-of-several")
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def keyed() -> Iterator[Harness]:
    with harness(rules=Rules(access=AccessPolicy(KEYS, origins=("https://app.example",)))) as served:
        yield served


PATHS = [
    "/v1", "/v1/models", "/v1/models/tiny", COMPLETIONS, CHAT, "/metrics", "/debug/plan", "/nothing",
    "http://test//v1/models", "http://test//docs", "http://test///", "/V1/models",
    "/v1/models/", "/health/", "/healthz", "/ready/../v1/models",
    "/health%2f..%2fv1/models", "/.health",
    "/v1/models?/health", "/v1/models;/health", "/openapi.json", "/docs/", "/docs/openapi.json", "/docs;/",
]  # fmt: skip


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS", "PUT", "PRI"])
def test_every_path_asks_for_a_key(method: str, keyed: Harness) -> None:
    for path in PATHS:
        for headers in ({}, bearer("wrong-key-of-several"), bearer(""), bearer(KEYS[0][:-1]), bearer(KEYS[0] + "x")):
            assert keyed.ask(method, path, headers=headers).status_code == 401, path


@pytest.mark.parametrize("header", ["Basic {}", "{}", "bearer{}", "Bearer {},", "Bearer \u00e4{}", "Bearer {} {}"])
def test_only_the_bearer_form_opens(header: str, keyed: Harness) -> None:
    value = header.format(KEYS[0], KEYS[0]).encode("latin-1")
    response = keyed.ask("GET", "/v1/models", headers={"Authorization": value})
    assert error(response, 401)["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"
    assert not any(key in response.text for key in KEYS)


def test_each_key_opens_and_probes_need_none(keyed: Harness) -> None:
    for key in KEYS:
        for scheme in ("Bearer", "bearer"):
            assert keyed.ask("GET", "/v1/models", headers={"Authorization": f"{scheme} {key}"}).status_code == 200
    assert (
        keyed.ask("POST", CHAT, headers=bearer(KEYS[1]), json={"messages": HELLO, "max_tokens": 1}).status_code == 200
    )
    for path in ("/health", "/ready"):
        assert keyed.ask("GET", path).status_code == 200


def test_every_key_is_compared_whichever_fits(keyed: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """And by digests of one length, so that no time tells a length or a beginning."""
    compared: list[tuple[int, int]] = []
    compare = hmac.compare_digest

    def noting(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return compare(one, other)

    monkeypatch.setattr(gate.hmac, "compare_digest", noting)
    for key in (*KEYS, "wrong", ""):
        keyed.ask("GET", "/v1/models", headers=bearer(key))
    assert compared == [(32, 32)] * len(KEYS) * 4


def test_keys_come_from_a_file_and_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\n{KEYS[0]}\n\n  {KEYS[1]}  \n{KEYS[0]}\n", encoding="utf-8")
    assert api_keys(file, {}) == KEYS
    assert api_keys(None, {"OWNPATH_API_KEYS": f"{KEYS[1]}, {KEYS[0]},"}) == KEYS[::-1]
    assert api_keys(file, {"OWNPATH_API_KEYS": "third-key-of-several"}) == (*KEYS, "third-key-of-several")
    assert api_keys(None, {}) == ()


@pytest.mark.parametrize(
    ("content", "place"),
    [(b"", "holds no API key"), (b"# none\n", "holds no API key"), (b"a-long-enough-key\nshort-secret\n", "line 2"),
     (b"a secret with spaces", "line 1"), ("geheim-schlüssel-secret".encode(), "line 1"), (b"\xff" * 20, "not UTF-8"),
     (b"secret-key-secret-key\n" * 60_000, "larger than")],
)  # fmt: skip
def test_a_file_that_holds_no_keys_is_refused_without_telling_it(content: bytes, place: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_bytes(content)
    with pytest.raises(ValueError, match=place) as caught:
        api_keys(tmp_path / "keys", {})
    assert "secret" not in str(caught.value)


def test_a_short_key_of_the_environment_is_refused() -> None:
    with pytest.raises(ValueError, match="OWNPATH_API_KEYS: key 2") as caught:
        api_keys(None, {"OWNPATH_API_KEYS": f"{KEYS[0]},hush"})
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("host", "own"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("::ffff:127.0.0.1", True), ("0.0.0.0", False),
     ("::", False), ("192.168.1.2", False), ("fe80::1%eth0", False)],
)  # fmt: skip
def test_beyond_this_machine_a_key_is_needed(host: str, own: bool) -> None:
    assert is_loopback(host) == own
    assert access_policy(host, KEYS, (), (), is_insecure=False) == AccessPolicy(KEYS)
    assert access_policy(host, (), (), (), is_insecure=True) == AccessPolicy(hosts=LOOPBACK_NAMES if own else ())
    if own:
        assert access_policy(host, (), ("a.example",), (), is_insecure=False).hosts == ("a.example",)
    else:
        with pytest.raises(ValueError, match="--api-key-file"):
            access_policy(host, (), (), (), is_insecure=False)


def test_the_command_refuses_before_it_loads(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OWNPATH_API_KEYS", raising=False)
    monkeypatch.setattr("ownpath.commands.session.open_session", lambda *args: pytest.fail("nothing is loaded"))
    for options, reason in (
        (["--host", "0.0.0.0"], "other machines reach 0.0.0.0, and no API key is asked for"),
        (["--api-key-file", str(tmp_path / "none")], "No such file"),
        (["--tls-key", "a"], "--tls-key goes with --tls-cert"),
        (["--tls-cert", str(tmp_path / "none")], "none"),
    ):
        assert main(["serve", "--port", "0", *options]) == 2
        told = capsys.readouterr().err
        assert reason in told
        assert told.count("\n") == 1


@pytest.fixture(scope="module")
def named() -> Iterator[Harness]:
    with harness(rules=Rules(access=AccessPolicy(hosts=(*LOOPBACK_NAMES, "*.models.example")))) as served:
        yield served


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "LOCALHOST", "127.0.0.1:1", "[::1]:8000", "a.models.example", "localhost."]
)
def test_the_servers_own_names_are_answered(host: str, named: Harness) -> None:
    assert named.ask("GET", "/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "localhost.evil.example", "models.example", "evilmodels.example", "",
     "127.0.0.1.evil.example", "[::2]", "localhost@evil.example", "evil.example#localhost"],
)  # fmt: skip
def test_other_names_are_refused(host: str, named: Harness) -> None:
    """A name that an attacker's DNS points at this machine (rebinding). Probes come by any name."""
    found = error(named.ask("GET", "/v1/models", headers={"Host": host}), 403)
    assert found["code"] == "host_not_allowed"
    assert "--allowed-hosts" in found["message"]
    assert named.ask("GET", "/health", headers={"Host": host}).status_code == 200


def test_pages_of_other_origins_read_nothing_unless_asked_for(keyed: Harness, named: Harness) -> None:
    def preflight(served: Harness, origin: str) -> httpx.Response:
        asks = {"Origin": origin, "Access-Control-Request-Method": "POST", "Host": "localhost"}
        return served.ask("OPTIONS", CHAT, headers=asks | {"Access-Control-Request-Headers": "authorization"})

    assert "access-control-allow-origin" not in preflight(named, "https://app.example").headers
    allowed = preflight(keyed, "https://app.example")
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"
    assert "access-control-allow-origin" not in preflight(keyed, "https://evil.example").headers
    answer = keyed.ask("GET", "/v1/models", headers=bearer(KEYS[0]) | {"Origin": "https://app.example"})
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    assert "access-control-allow-credentials" not in answer.headers


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_request_has_a_deadline(is_stream: bool) -> None:
    model = Gated()
    with harness(model, rules=Rules(timeout_s=0.2)) as served:
        model.permits.release()
        response = served.post(COMPLETIONS, prompt="hello", stream=is_stream)
        if is_stream:
            assert '"code":"deadline_exceeded"' in response.text
            assert "[DONE]" not in response.text
        else:
            assert error(response, 504)["code"] == "deadline_exceeded"
        for _ in range(9):
            model.permits.release()
        assert served.settled()


@pytest.mark.parametrize(
    ("path", "status"), [("/health", 200), ("/nothing", 404), ("/v1/models", 401), (COMPLETIONS, 401)]
)
def test_every_answer_has_the_requests_id(path: str, status: int, keyed: Harness) -> None:
    given = "req-1_2.3:4/5+6="
    response = keyed.ask("GET", path, headers={"X-Request-Id": given} | (bearer(KEYS[0]) if status == 404 else {}))
    assert (response.status_code, response.headers["x-request-id"]) == (status, given)
    fresh = [keyed.ask("GET", path).headers["x-request-id"] for _ in range(2)]
    assert re.fullmatch("[0-9a-f]{32}", fresh[0])
    assert fresh[0] != fresh[1]


@pytest.mark.parametrize("given", ["a b", "a\x1b[31m", "\u00e4".encode("latin-1"), "x" * 129, "", "a,b", '"'])
def test_an_id_that_would_not_fit_a_line_is_replaced(given: str | bytes, keyed: Harness) -> None:
    shown = keyed.ask("GET", "/health", headers={"X-Request-Id": given}).headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", shown)


@pytest.mark.parametrize("tells", list(LogRequests))
def test_the_log_tells_as_much_as_is_asked_for(tells: LogRequests, caplog: pytest.LogCaptureFixture) -> None:
    secret = "the prompt is a secret\x1b[2J"
    with harness(rules=Rules(log_requests=tells)) as served, caplog.at_level(logging.INFO, "ownpath.access"):
        served.complete(prompt=secret, max_tokens=1)
        served.ask("GET", "/a%0Ab%1B[31m" + "c" * 1000 + "?key=secret")
    text, lines = SafeFormatter(), JsonFormatter()
    records = [record for record in caplog.records if record.name == "ownpath.access"]
    assert len(records) == {LogRequests.OFF: 0, LogRequests.ACCESS: 2, LogRequests.BODIES: 3}[tells]
    told = [text.format(record) for record in records]
    assert all(line.isprintable() and len(line) < 500 for line in told), "one line, no controls"
    assert ("secret" in "".join(told)) == (tells is LogRequests.BODIES)
    fields = [json.loads(lines.format(record)) for record in records]
    assert all(one["logger"] == "ownpath.access" for one in fields)
    if tells is not LogRequests.OFF:
        assert re.fullmatch(r"info: 127\.0\.0\.1 POST /v1/completions 200 in \d+\.\d+ s, id [0-9a-f]{32}", told[0])
        assert (fields[-1]["status"], fields[-1]["path"][:4]) == (404, "/a\nb")


def test_what_is_not_loopback_is_found_by_the_bound_address() -> None:
    with socket.socket() as bound:
        bound.bind(("localhost", 0))
        assert is_loopback(bound.getsockname()[0])
    assert os.environ.get("OWNPATH_API_KEYS") is None
