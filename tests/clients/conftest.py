"""A real server of the embedded model for real clients. The clients' environment holds no torch, so the server has its
own interpreter: ``OWNPATH_PYTHON``, or this one."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

WAIT_S = 120
SRC = Path(__file__).parents[2] / "src"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "clients: runs a public client against a real server")


@dataclass(frozen=True)
class Served:
    """A running server. url: its ``/v1``. model: the path that it was given, as a client may name it."""

    url: str
    model: str


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with running(tmp_path_factory.mktemp("served"), max_model_len=8192) as server:
        yield server


@pytest.fixture(scope="session")
def served_small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server whose context bounds what a request at its defaults may take: 64 answers of it, at most."""
    with running(tmp_path_factory.mktemp("served"), max_model_len=64) as server:
        yield server


@contextlib.contextmanager
def running(folder: Path, max_model_len: int) -> Iterator[Served]:
    """Runs a server on a free port, and ends it."""
    model = folder / "model"
    model.symlink_to(SRC / "ownpath" / "assets" / "tiny-v4", target_is_directory=True)
    python = os.environ.get("OWNPATH_PYTHON", sys.executable)
    names = ["--served-model-name", "tiny-v4", "--served-model-name", "gpt-4o"]
    command = [
        python,
        "-m",
        "ownpath",
        "serve",
        str(model),
        "--port",
        "0",
        "--max-model-len",
        str(max_model_len),
        *names,
    ]
    environment = os.environ | {"PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        found = next(
            filter(None, (re.fullmatch(r"ownpath serves \S+ at (http://\S+)\n", line) for line in lines)), None
        )
        assert found, "the server did not start"
        # It writes a line for each request, and waits where nobody reads them.
        threading.Thread(target=lambda: [None for _ in lines], daemon=True).start()
        yield Served(found[1], str(model))
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 0
    finally:
        process.kill()
        process.wait()
