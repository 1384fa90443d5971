"""`ownpath serve` of several ranks in processes of their own, and what becomes of them."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

READY_S = 240
ADDRESS = re.compile(r"at (http://127\.0\.0\.1:\d+)/v1")


@dataclass
class Served:
    """A running server. log: what it has printed."""

    process: "subprocess.Popen[bytes]"
    log: Path
    url: str = ""

    def wait_until_ready(self) -> None:
        end = time.monotonic() + READY_S
        while time.monotonic() < end:
            found = ADDRESS.search(self.log.read_text(encoding="utf-8", errors="replace"))
            if found is not None:
                self.url = found[1]
                with suppress(httpx.HTTPError):
                    if httpx.get(f"{self.url}/ready", timeout=5).status_code == 200:
                        return
            assert self.process.poll() is None, self.log.read_text(encoding="utf-8")
            time.sleep(0.1)
        raise AssertionError(self.log.read_text(encoding="utf-8"))

    def ranks(self) -> dict[int, int]:
        """The process ids of all ranks but the first, by rank."""
        found, mark = {}, f"TORCHELASTIC_RUN_ID=started by ownpath, process {self.process.pid}".encode()
        for folder in Path("/proc").iterdir():
            if folder.name.isdecimal() and (folder / "environ").exists():
                with suppress(OSError):
                    entries = (folder / "environ").read_bytes().split(b"\0")
                    parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
                    if int(parent) == self.process.pid and mark in entries:
                        rank = next(entry for entry in entries if entry.startswith(b"RANK="))
                        found[int(rank.partition(b"=")[2])] = int(folder.name)
        return found


@contextmanager
def served(log: Path, arguments: Sequence[str]) -> Iterator[Served]:
    """Starts the server on a free port; whatever happens, no process is left."""
    command = [sys.executable, "-m", "ownpath", "serve", "--port", "0", *arguments]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=dict(os.environ, OMP_NUM_THREADS="1")
        )
    running = Served(process, log)
    try:
        running.wait_until_ready()
        yield running
    finally:
        for pid in running.ranks().values():
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait()
