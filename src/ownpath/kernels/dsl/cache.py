"""The cache of compiled kernels on disk, which machines without a compiler can load too.

A kernel is named by its configuration; its key is a hash of its sources, the architecture and the compiler's version,
so that a change of any of them recompiles it. Files: ``NAME-KEY.cubin`` and its note ``NAME-KEY.json``, written last.

Machine code runs with the rights of whoever loads it, so the cache is used only where nobody else can have written it:
folder and files belong to this user (or root) and others may not write them. A note holds the size and SHA-256 of its
code and both names; an entry that is not what its note says counts as missing and is compiled anew.
"""

import fcntl
import hashlib
import json
import os
import stat
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock

from ownpath.files import FileError, is_present, open_regular, parse_json, write_file
from ownpath.kernels.contract import Config
from ownpath.kernels.dsl.compilations import COMPILATIONS
from ownpath.kernels.dsl.compiler import compiler_name, why_not
from ownpath.kernels.dsl.driver import Binary, Function, load_function

ARCH = "sm_90a"
SOURCES = Path(__file__).parents[1]
MAX_CODE_BYTES, MAX_NOTE_BYTES = 64 * 2**20, 2**16
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_FACTS = {"entry": str, "num_threads": int, "cluster": int}


class CompileError(ValueError):
    """Raised for a kernel that is not in the cache and cannot be compiled here."""


class CacheError(CompileError):
    """Raised for a cache that others may have written; the message says how to mend that."""


@dataclass(frozen=True)
class StoredKernel:
    """A kernel's machine code and what launching it takes."""

    code: bytes
    entry: str
    num_threads: int
    cluster: int


def cache_dir() -> Path:
    """Returns ``$OWNPATH_KERNEL_CACHE``, or ``ownpath/kernels`` in the user's cache folder."""
    chosen = os.environ.get("OWNPATH_KERNEL_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ownpath" / "kernels"


def source_key(sources: tuple[str, ...]) -> str:
    """Hashes the modules (paths in ``kernels``) that a kernel is compiled from, and the compiler's name."""
    return _hash_sources(sources, compiler_name())


@lru_cache(maxsize=64)
def _hash_sources(sources: tuple[str, ...], compiler: str) -> str:
    digest = hashlib.sha256(f"{ARCH} {compiler}".encode())
    for name in sources:
        digest.update((SOURCES / name).read_bytes())
    return digest.hexdigest()[:16]


def stem(config: Config) -> Path:
    """Returns the path of a kernel's files without their suffix."""
    return cache_dir() / f"{config.name}-{source_key(config.sources)}"


def is_cached(config: Config) -> bool:
    """Returns True if a kernel is in the cache, whole, and the cache may be used."""
    try:
        read_entry(config)
    except (FileError, CacheError):
        return False
    return True


def is_noted(config: Config) -> bool:
    """Returns True if the cache holds a kernel's note, whatever its entry is worth."""
    return is_present(stem(config).with_suffix(".json"))


def read_entry(config: Config) -> StoredKernel:
    """Reads a kernel from the cache. Errors: FileError naming a file that is not there or damaged, CacheError."""
    require_own(cache_dir())
    note_path, code_path = (stem(config).with_suffix(suffix) for suffix in (".json", ".cubin"))
    note = parse_json(_read_own(note_path, MAX_NOTE_BYTES), str(note_path))
    if not isinstance(note, dict) or any(type(note.get(key)) is not kind for key, kind in _FACTS.items()):
        raise FileError(f"{note_path}: it does not tell {', '.join(_FACTS)}")
    code = _read_own(code_path, MAX_CODE_BYTES)
    if {key: note.get(key) for key in ("kernel", "num_bytes", "sha256")} != _identity(config, code):
        raise FileError(f"{code_path}: not the code that its note was written for")
    return StoredKernel(code, note["entry"], note["num_threads"], note["cluster"])


def store(config: Config, code: bytes, facts: Mapping[str, str | int | bool]) -> None:
    """Writes a kernel, its note last. A whole entry that another process wrote meanwhile is kept.

    Errors: CacheError, FileError naming a file that cannot be written.
    """
    target = stem(config)
    _make_own_folder(target.parent)
    with _alone(target.parent):
        if is_cached(config):
            return
        target.with_suffix(".json").unlink(missing_ok=True)
        note = json.dumps({**facts, **_identity(config, code)}).encode()
        for suffix, data in ((".cubin", code), (".json", note)):
            write_file(target.with_suffix(suffix), [data], mode=0o644)


def require_own(folder: Path) -> None:
    """Errors: CacheError for a folder that is there and is not this user's or root's, or that others may write."""
    try:
        _check_owner(folder, folder.stat())
    except FileNotFoundError:
        return


def _check_owner(path: Path, status: os.stat_result) -> None:
    if status.st_uid not in (os.geteuid(), 0):
        fault = f"belongs to user {status.st_uid}, not to this one"
    elif status.st_mode & _OTHERS_WRITE:
        fault = f"may be written by others (mode {stat.S_IMODE(status.st_mode):o}): chmod go-w"
    else:
        return
    words = "is not used: machine code from it would run with your rights"
    raise CacheError(f"kernel cache {path} {words}. It {fault}, or set OWNPATH_KERNEL_CACHE to a folder of your own")


def _read_own(path: Path, max_bytes: int) -> bytes:
    """Reads a file of the cache, not through a link. Errors: FileError, also where others may have written it."""
    with open_regular(path, follow_links=False) as descriptor:
        status = os.fstat(descriptor)
        try:
            _check_owner(path, status)
        except CacheError as error:
            raise FileError(str(error)) from None
        if status.st_size > max_bytes:
            raise FileError(f"{path}: has {status.st_size} bytes; at most {max_bytes} are read")
        return os.pread(descriptor, max_bytes, 0)


def _identity(config: Config, code: bytes) -> dict[str, object]:
    return {"kernel": stem(config).name, "num_bytes": len(code), "sha256": hashlib.sha256(code).hexdigest()}


def _make_own_folder(folder: Path) -> None:
    """Makes the cache's folder, for this user alone where it is missing. Errors: CacheError."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    require_own(folder)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lets one process at a time write to the folder, where its file system has locks."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def compile_missing(configs: Iterable[Config], progress: Callable[[int, int, str], None] | None = None) -> int:
    """Compiles the kernels that the cache lacks, one process per core, and returns their number.

    progress: called with (done, total, name) after each kernel. Errors: CompileError with the compiler's message, or
    CacheError.
    """
    require_own(cache_dir())
    missing = {config.name: config for config in configs if not is_cached(config)}
    if not missing:
        return 0
    lack = why_not()
    if lack:
        raise CompileError(_tell_missing(list(missing), lack))
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
    COMPILATIONS.count += len(missing)
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
        f"a kernel could not be compiled. The compiler is {compiler_name()}: pip install 'ownpath[cute]', or bring a "
        f"cache that holds {failed}, ... in {cache_dir()}\n{words}"
    )


def _tell_missing(names: list[str], lack: str) -> str:
    """Names the kernels that can be neither loaded nor compiled."""
    others = f" and {len(names) - 3} others" if len(names) > 3 else ""
    return (
        f"kernels can be neither loaded nor compiled: {', '.join(names[:3])}{others}. They are not in {cache_dir()}, "
        f"and {lack}. Install a compiler (pip install 'ownpath[cute]', or 'ownpath[vllm]' beside vLLM), or bring a "
        f"cache that was filled by {compiler_name()}"
    )


def _path_of(kind: type) -> str:
    """Returns "module:name" below ``ownpath.kernels``."""
    return f"{kind.__module__.removeprefix('ownpath.kernels.')}:{kind.__qualname__}"


def _feed(process: subprocess.Popen[str], queue: deque[Config], count: Callable[[str], None]) -> str:
    """Sends a process one kernel at a time until the queue is empty; returns the name of the one that failed."""
    requests, answers = process.stdin, process.stdout
    assert requests
    assert answers
    with suppress(IndexError):
        while True:
            config = queue.popleft()
            with suppress(BrokenPipeError):  # an ended process, which prints nothing
                requests.write(json.dumps([_path_of(type(config)), vars(config)]) + "\n")
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
    try:
        kernel = read_entry(config)
    except FileError as error:
        raise CompileError(f"the kernel that was compiled just now cannot be read: {error}") from None
    return load_function(Binary(kernel.code, kernel.entry, kernel.num_threads, kernel.cluster))
