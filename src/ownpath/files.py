"""Reads and writes files that others may have made: regular ones of a limited size, each replaced whole or not at all.

Every JSON and text file of a checkpoint is read here. A FIFO or a device is never waited for, a file that grows while
it is read ends at the limit, and JSON that could fill the memory is refused before it is parsed.
"""

import errno
import gc
import json
import os
import re
import reprlib
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MAX_FILE_BYTES = 64 * 2**20
"""Limit of a file that is read whole. The largest honest ones are tokenizers and indexes of some 30 MB."""
MAX_JSON_VALUES = 4_000_000
"""Limit of the commas and opening brackets of a JSON text, which bound its values: a header has 8 for each tensor."""
MAX_JSON_KEYS = 2_000_000
"""Limit of the colons of a JSON text, which bound its keys: a header has 4 for each tensor."""
MAX_JSON_DEPTH = 64
_CHUNK_BYTES = 2**20
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)

JsonPairs = list[tuple[str, object]]


class FileError(ValueError):
    """Raised for a file that cannot be used as it is; the message names it."""


class MissingFileError(FileError):
    """Raised for a file that is not there, or a link to none."""


@contextmanager
def open_regular(path: Path, *, follow_links: bool = True) -> Iterator[int]:
    """Opens a regular file for reading and yields its descriptor. Nothing else is opened, and nothing is waited for.

    Errors: FileError naming the file; MissingFileError where there is none.
    """
    descriptor = open_descriptor(path, follow_links=follow_links)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def open_descriptor(path: Path, *, follow_links: bool = True) -> int:
    """Does what ``open_regular`` does, for a caller that closes the descriptor later."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY | (0 if follow_links else os.O_NOFOLLOW)
    try:
        _require_regular(path, path.stat(follow_symlinks=follow_links))  # some devices act when they are opened
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        what = "is a link to a file that does not exist" if path.is_symlink() else "no such file"
        raise MissingFileError(f"{path}: {what}") from None
    except FileError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise FileError(f"{path}: cannot be read ({_reason(error)})") from None
    try:
        _require_regular(path, os.fstat(descriptor))
    except FileError:
        os.close(descriptor)
        raise
    return descriptor


def _require_regular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(status.st_mode)), "a link")
        raise FileError(f"{path}: not a regular file but {kind}")


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def is_present(path: Path) -> bool:
    """Returns True for anything of this name, also a link to nothing, or a folder that keeps it from being seen."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a name with a zero byte
        return False
    except OSError:  # reading it will say why
        return True
    return True


def read_bytes(path: Path, max_bytes: int = MAX_FILE_BYTES, *, follow_links: bool = True) -> bytes:
    """Reads a regular file. Errors: FileError naming the file, also one of more than ``max_bytes``."""
    chunks: list[bytes] = []
    with open_regular(path, follow_links=follow_links) as descriptor:
        num_bytes = os.fstat(descriptor).st_size
        try:
            while num_bytes <= max_bytes and (chunk := os.read(descriptor, _CHUNK_BYTES)):
                chunks.append(chunk)
                num_bytes = max(num_bytes, sum(map(len, chunks)))
        except OSError as error:
            raise FileError(f"{path}: cannot be read ({_reason(error)})") from None
    if num_bytes > max_bytes:
        raise FileError(f"{path}: has {num_bytes} bytes or more; at most {max_bytes} are read")
    return b"".join(chunks)


def read_text(path: Path, max_bytes: int = MAX_FILE_BYTES) -> str:
    """Reads a regular file of UTF-8 text. Errors: FileError naming the file."""
    try:
        return read_bytes(path, max_bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def read_json_object(
    path: Path, on_twice: Callable[[str], None] | None = None, *, follow_links: bool = True
) -> dict[str, object]:
    """Reads a regular file that holds one JSON object. Errors: as ``read_bytes`` and ``parse_json``."""
    content = parse_json(read_bytes(path, follow_links=follow_links), str(path), on_twice)
    if not isinstance(content, dict):
        raise FileError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def parse_json(data: bytes, source: str, on_twice: Callable[[str], None] | None = None) -> object:
    """Parses JSON in UTF-8: without NaN and infinities, bounded in values and depth.

    on_twice: called with a key that one object holds twice; without it that is an error.
    Errors: FileError naming ``source``.
    """
    num_values = sum(map(data.count, (b",", b"[", b"{")))
    if num_values > MAX_JSON_VALUES:
        raise FileError(f"{source}: JSON of {num_values} values; at most {MAX_JSON_VALUES} are read")
    if data.count(b":") > MAX_JSON_KEYS:
        raise FileError(f"{source}: JSON of {data.count(b':')} keys; at most {MAX_JSON_KEYS} are read")

    def unique(pairs: JsonPairs) -> dict[str, object]:
        content = dict(pairs)
        if len(content) != len(pairs):
            for key in sorted(_repeated(pairs)):
                if on_twice is None:
                    raise FileError(f"{source}: an object holds the key {shorten(key)} twice")
                on_twice(key)
        return content

    try:
        with _uncollected():
            content = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=_refuse_constant)
        if _SURROGATE.search(data):
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except FileError:
        raise
    except UnicodeEncodeError:
        raise FileError(f"{source}: not JSON: a text holds half of a surrogate pair") from None
    except UnicodeDecodeError as error:
        raise FileError(f"{source}: not JSON: not UTF-8 ({error.reason} at byte {error.start})") from None
    except ValueError as error:
        raise FileError(f"{source}: not JSON: {error}") from None
    except RecursionError:
        content = None
        is_deep = True
    else:
        is_deep = _is_deep(content)
    if is_deep:
        raise FileError(f"{source}: JSON nested deeper than {MAX_JSON_DEPTH} levels")
    return content


@contextmanager
def _uncollected() -> Iterator[None]:
    """Looks for no garbage meanwhile: millions of new values that are none take half of the time otherwise."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _refuse_constant(name: str) -> object:
    raise ValueError(f"it holds {name}, which is no JSON")


def _repeated(pairs: JsonPairs) -> set[str]:
    seen: set[str] = set()
    return {key for key, _ in pairs if key in seen or seen.add(key)}  # type: ignore[func-returns-value]


def _is_deep(content: object) -> bool:
    """Returns True where containers are nested deeper than the limit. Such a value could not be printed either."""
    level = [content]
    for _ in range(MAX_JSON_DEPTH + 1):
        level = [
            inner
            for value in level
            for inner in (value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def shorten(value: object) -> str:
    """Formats a value that a file holds for a message: at most some 80 characters."""
    return _BRIEF.repr(value)


_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother, _BRIEF.maxlong = 2, 80, 80, 40


@contextmanager
def create_file(path: Path, scratch: Path | None = None, *, mode: int = 0o666) -> Iterator[Callable[[object], None]]:
    """Writes a file under a name nobody can guess, syncs it, and renames it to ``path`` when the block ends well.

    Yields the function that writes bytes (any buffer). A link under ``path`` is replaced, not followed.
    scratch: folder for the unfinished file, on the same file system; ``path``'s own by default.
    Errors: FileError naming ``path``; the unfinished file is then removed.
    """
    beside = (scratch or path.parent) / f".{secrets.token_hex(8)}.tmp"
    descriptor = -1
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(beside, flags, mode)
        yield lambda data: _write_all(descriptor, data)
        os.fsync(descriptor)
        os.close(descriptor)
        descriptor = -1
        beside.replace(path)
        sync_folder(path.parent)
    except BaseException as error:
        if descriptor != -1:
            os.close(descriptor)
        with suppress(OSError):
            beside.unlink()
        if isinstance(error, OSError):
            raise FileError(f"{path}: cannot be written ({_reason(error)})") from None
        raise


def _write_all(descriptor: int, data: object) -> None:
    view = memoryview(data).cast("B")  # type: ignore[arg-type]
    while view:
        view = view[os.write(descriptor, view) :]


def write_file(path: Path, chunks: Iterable[bytes], scratch: Path | None = None, *, mode: int = 0o666) -> None:
    """Writes a file as ``create_file`` does."""
    with create_file(path, scratch, mode=mode) as write:
        for chunk in chunks:
            write(chunk)


def write_json(path: Path, fields: object, scratch: Path | None = None) -> None:
    """Writes JSON as ``create_file`` does."""
    write_file(path, [(json.dumps(fields, indent=1) + "\n").encode()], scratch)


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder durable. Errors: OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot
            raise
    finally:
        os.close(descriptor)
