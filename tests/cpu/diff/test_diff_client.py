"""A failure before anything can be compared gives one line that names the URL, and exit code 2."""

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cpu.diff.other_server import serving
from cpu.server.model_folder import write_model_folder

from ownpath.cli import main
from ownpath.diff.client import CannotAsk, Client, Refused

Response = tuple[int, dict[str, str], bytes]


def answering(status: int, headers: dict[str, str], data: bytes) -> Callable[..., Response]:
    return lambda *_: (status, headers, data)


def asked(respond: Callable[..., Response], timeout_s: float = 10.0) -> str:
    """The error of one request."""
    with serving(respond) as url:
        with pytest.raises(CannotAsk) as caught:
            Client.of_url(url, timeout_s, "sesame").post("/v1/completions", {})
        text = str(caught.value)
        assert text.startswith(url + "/v1/completions: ")
    assert "sesame" not in text
    assert "\n" not in text
    return text


def test_every_failure_says_what_came_back() -> None:
    assert "is not JSON: <html>hello</html>" in asked(answering(200, {}, b"<html>\nhello</html>".replace(b"\n", b"")))
    assert "expected a JSON object, found [1]" in asked(answering(200, {}, b"[1]"))
    assert "400: no such field" in asked(answering(400, {}, b"no such\nfield"))
    assert "500: oh" in asked(answering(500, {}, b"oh"))
    assert "--api-key-env" in asked(answering(401, {}, b"{}"))
    assert "403" in asked(answering(403, {}, b"{}"))
    assert "\x1b" not in asked(answering(400, {}, b"\x1b[2J"))
    assert len(asked(answering(400, {}, b"x" * 100_000))) < 400


def test_a_server_that_hangs_is_left() -> None:
    def slow(*_: Any) -> Response:
        time.sleep(0.5)
        return 200, {}, b"{}"

    assert "no answer within 0.1 s" in asked(slow, 0.1)


def test_redirects_are_not_followed() -> None:
    """Neither the key nor a prompt reaches another host."""
    reached: list[str] = []

    def elsewhere(method: str, path: str, *_: Any) -> Response:
        reached.append(path)
        return 200, {}, b"{}"

    with serving(elsewhere) as other:
        for status in (301, 302, 303, 307, 308):
            assert "not followed" in asked(answering(status, {"Location": other + "/v1/completions"}, b""))
    assert reached == []


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8000",
        "ftp://host",
        "file:///etc/passwd",
        "http://",
        "http://h:99999",
        "http://h?a=1",
        "http://[::1",
    ],
)
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(CannotAsk):
        Client.of_url(url, 1.0)


def test_secrets_stay_out_of_messages() -> None:
    with pytest.raises(CannotAsk) as caught:
        Client.of_url("http://me:sesame@host", 1.0)
    assert "sesame" not in str(caught.value)
    assert "sesame" not in repr(Client.of_url("http://host", 1.0, "sesame"))
    with pytest.raises(CannotAsk):
        Client.of_url("http://host", 1.0, "a\r\nX-Other: b")


@pytest.mark.parametrize("url", ["http://host:1", "http://host:1/", "http://host:1/v1", "http://host:1/v1/"])
def test_the_version_in_the_url_is_optional(url: str) -> None:
    assert Client.of_url(url, 1.0).root == "http://host:1"


def test_a_refusal_keeps_its_status() -> None:
    with serving(answering(404, {}, b"{}")) as url, pytest.raises(Refused) as caught:
        Client.of_url(url, 1.0).get("/v1/models")
    assert caught.value.status == 404


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("random-v4"))


def failing(capsys: pytest.CaptureFixture[str], folder: Path, url: str, *options: str) -> str:
    assert main(["diff", str(folder), "--against", url, "--max-model-len", "256", *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ownpath")
    assert captured.err.count("\n") == 1
    return captured.err


def test_the_command_ends_with_2_when_it_cannot_ask(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = taken.getsockname()[1]
    assert "connection refused" in failing(capsys, folder, f"http://127.0.0.1:{free}")
    with serving(answering(404, {}, b"{}")) as url:
        assert "offers no log-probs" in failing(capsys, folder, url)
    without = json.dumps({"choices": [{"text": "hello", "logprobs": None}]}).encode()
    with serving(answering(200, {}, without)) as url:
        assert "logprobs: not in the answer" in failing(capsys, folder, url)
        assert "no such model folder" in failing(capsys, folder / "nothing", url)
    assert "NO_SUCH_KEY" in failing(capsys, folder, "http://h", "--api-key-env", "NO_SUCH_KEY")
