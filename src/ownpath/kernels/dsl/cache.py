"""The cache of compiled kernels on disk, which machines without a compiler can load too.

A kernel is named by its configuration; its key is a hash of its sources, the architecture and the compiler's version,
so that a change of any of them recompiles it. Files: ``NAME-KEY.cubin`` and ``NAME-KEY.json``, the latter written last
and atomically: a cubin without it is ignored.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from threading import Lock

from ownpath.kernels.contract import Config
from ownpath.kernels.dsl.driver import Binary, Function, load_function

ARCH = "sm_90a"
COMPILER = "nvidia-cutlass-dsl 4.8.1"
SOURCES = Path(__file__).parents[1]


class CompileError(RuntimeError):
    """Raised for a kernel that is not in the cache and cannot be compiled here."""


def cache_dir() -> Path:
    """Returns ``$OWNPATH_KERNEL_CACHE``, or ``ownpath/kernels`` in the user's cache folder."""
    chosen = os.environ.get("OWNPATH_KERNEL_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ownpath" / "kernels"


@lru_cache(maxsize=64)
def source_key(sources: tuple[str, ...]) -> str:
    """Hashes the modules (paths in ``kernels``) that a kernel is compiled from."""
    digest = hashlib.sha256(f"{ARCH} {COMPILER}".encode())
    for name in sources:
        digest.update((SOURCES / name).read_bytes())
    return digest.hexdigest()[:16]


def stem(config: Config) -> Path:
    """Returns the path of a kernel's files without their suffix."""
    return cache_dir() / f"{config.name}-{source_key(config.sources)}"


def is_cached(config: Config) -> bool:
    """Returns True if a kernel's files are in the cache."""
    return stem(config).with_suffix(".json").exists()


def store(config: Config, code: bytes, facts: dict[str, str | int | bool]) -> None:
    """Writes a kernel atomically: a reader sees all of it or nothing."""
    target = stem(config)
    target.parent.mkdir(parents=True, exist_ok=True)
    for suffix, data in ((".cubin", code), (".json", json.dumps(facts).encode())):
        scratch = target.with_suffix(f".{os.getpid()}.tmp")
        scratch.write_bytes(data)
        scratch.replace(target.with_suffix(suffix))


def compile_missing(configs: Iterable[Config], progress: Callable[[int, int, str], None] | None = None) -> int:
    """Compiles the kernels that the cache lacks, one process per core, and returns their number.

    progress: called with (done, total, name) after each kernel. Errors: CompileError with the compiler's message.
    """
    missing = {config.name: config for config in configs if not is_cached(config)}
    if not missing:
        return 0
    queue, finished, lock = deque(missing.values()), list[str](), Lock()
    workers = min(len(queue), os.cpu_count() or 1)

    def count(name: str) -> None:
        with lock:
            finished.append(name)
            if progress:
                progress(len(finished), len(missing), name)

    with ThreadPoolExecutor(workers) as pool:
        # All processes finish before the first failure is raised, so that the cache keeps every kernel that compiles.
        for failure in list(pool.map(lambda _: _compile(queue, count), range(workers))):
            if failure:
                raise CompileError(failure)
    return len(missing)


def _compile(queue: deque[Config], count: Callable[[str], None]) -> str:
    """Compiles the queue's kernels one after the other in a new process; returns the failures."""
    with tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, "-m", "ownpath.kernels.dsl.build"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
        with suppress(BrokenPipeError), process:  # input that an ended process did not read
            failed = _feed(process, queue, count)
        if not failed:
            return ""
        errors.seek(0)
        words = errors.read()[-2000:]
    return (
        f"a kernel could not be compiled. The compiler is {COMPILER}: pip install 'ownpath[cute]', or bring a cache "
        f"that holds {failed}, ... in {cache_dir()}\n{words}"
    )


def _feed(process: subprocess.Popen[str], queue: deque[Config], count: Callable[[str], None]) -> str:
    """Sends a process one kernel at a time until the queue is empty; returns the name of the one that failed."""
    requests, answers = process.stdin, process.stdout
    assert requests
    assert answers
    with suppress(IndexError):
        while True:
            config = queue.popleft()
            with suppress(BrokenPipeError):  # an ended process, which prints nothing
                requests.write(json.dumps([type(config).__name__, vars(config)]) + "\n")
                requests.flush()
                if not queue:
                    requests.close()
            if all(line.strip() != config.name for line in answers):
                return config.name
            count(config.name)
    return ""


@lru_cache(maxsize=512)
def load(config: Config, device_index: int) -> Function:
    """Loads a kernel onto a device and compiles it if the cache lacks it. Errors: CompileError, CudaError."""
    compile_missing([config])
    facts = json.loads(stem(config).with_suffix(".json").read_text())
    code = stem(config).with_suffix(".cubin").read_bytes()
    return load_function(Binary(code, facts["entry"], facts["num_threads"], facts["cluster"]))
