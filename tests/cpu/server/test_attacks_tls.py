"""https by ``--tls-cert`` and ``--tls-key``: what is served, what is refused, and handshakes that never end."""

import argparse
import contextlib
import os
import re
import signal
import ssl
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from cpu.server.harness import WAIT_S, harness, listening
from cpu.server.model_folder import write_model_folder
from cpu.server.sockets import connect, crowd

from ownpath.commands.serve_options import tls_of
from ownpath.server.connection import ConnectionLimits

_PASSWORD = "a password that nobody is asked for"


def openssl(*args: str) -> None:
    try:
        subprocess.run(["openssl", *args], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1, signed by itself, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1"]
    name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    openssl("req", "-x509", *kind, *name, "-out", str(cert), "-keyout", str(key))
    return cert, key


def served_by(cert: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """The context that the command makes of its two options."""
    return tls_of(argparse.Namespace(tls_cert=cert and str(cert), tls_key=key and str(key)))


def test_https_is_served_and_handshakes_that_idle_shut_nobody_out(certificate: tuple[Path, Path]) -> None:
    client = ssl.create_default_context(cafile=str(certificate[0]))
    limits = ConnectionLimits(max_total=12, max_per_site=8, head_s=5)
    tls = served_by(*certificate)
    with harness() as served, listening(served, connections=limits, tls=tls) as url, crowd(url, 20, b"\x16\x03\x01"):
        begin = time.monotonic()
        assert httpx.get(url + "/v1/models", verify=client, timeout=WAIT_S).status_code == 200
        assert time.monotonic() - begin < 4
        with connect(url, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n") as plain:
            plain.settimeout(WAIT_S)
            with contextlib.suppress(ConnectionError):
                assert not plain.recv(100).startswith(b"HTTP")
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(url + "/health", timeout=WAIT_S)


def test_one_file_may_hold_both_and_old_versions_are_not_spoken(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    both = tmp_path / "both.pem"
    both.write_bytes(b"".join(file.read_bytes() for file in certificate))
    context = served_by(both, None)
    assert context is not None
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2
    assert served_by(None, None) is None


def test_files_that_serve_no_https_are_refused_by_name(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    """A key with a password would ask for it on the terminal of whoever restarts the server: nobody."""
    cert, key = certificate
    locked, other, text = (tmp_path / name for name in ("locked.pem", "other.pem", "text.pem"))
    openssl("ec", "-in", str(key), "-aes256", "-passout", f"pass:{_PASSWORD}", "-out", str(locked))
    openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(other))
    text.write_text("no key\n", encoding="utf-8")
    for wrong in (locked, other, text, tmp_path / "none.pem"):
        with pytest.raises(ValueError, match=re.escape(f"--tls-cert, --tls-key: {cert} {wrong}: ")):
            served_by(cert, wrong)
    with pytest.raises(ValueError, match="--tls-key goes with --tls-cert"):
        served_by(None, key)


def test_the_command_serves_https(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "v4")
    options = ["--port", "0", "--max-model-len", "512", "--tls-cert", str(certificate[0]), "--tls-key"]
    full = [sys.executable, "-m", "ownpath", "serve", str(folder), *options, str(certificate[1])]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(full, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        said = (re.search(r"at (https://127\.0\.0\.1:\d+)/v1", line) for line in process.stderr)
        url = next(filter(None, said))[1]
        client = ssl.create_default_context(cafile=str(certificate[0]))
        body = {"prompt": "hello", "max_tokens": 2}
        answer = httpx.post(url + "/v1/completions", json=body, verify=client, timeout=WAIT_S)
        assert answer.json()["usage"]["completion_tokens"] == 2
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 0
    finally:
        process.kill()
        process.communicate()
