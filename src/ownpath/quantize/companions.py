"""Copies what belongs to a checkpoint beside its weights: tokenizer, chat format, generation settings, licence.

Only files of a known name are copied, none through a link that leaves the checkpoint: what a folder holds besides may
be somebody else's. A hub cache's own links, from a snapshot into its blobs, stay within it.
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ownpath.checkpoint.index import is_inside
from ownpath.checkpoint.writer import INDEX_NAME
from ownpath.files import MAX_FILE_BYTES, FileError, read_bytes, write_file

CONFIG, QUANT_CONFIG = "config.json", "hf_quant_config.json"
WRITTEN = frozenset({INDEX_NAME, CONFIG, QUANT_CONFIG})
"""Files that describe the source's weights: the run writes its own."""
KNOWN = frozenset(
    {"generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt"}
    | {"special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"}
)
KNOWN_STEMS = ("LICENSE", "LICENCE", "NOTICE", "README")
ENCODING = "encoding"
"""The folder with the release's chat format, which also tells which release a checkpoint is of."""
MAX_DEPTH, MAX_FILES = 3, 1000
_NOT_KNOWN = "no file that a checkpoint is known to have"


@dataclass(frozen=True)
class Companion:
    """A file beside the weights. name: its path in the folder. left_out: why it is not copied; empty if it is."""

    name: str
    left_out: str = ""


def find_companions(source: Path) -> list[Companion]:
    """Lists what lies beside the weights, without weights, files that the run writes itself, and hidden files."""
    found: list[Companion] = []
    for path in sorted(source.iterdir()):
        name = path.name
        if name == ENCODING:
            found += _within_encoding(source, path)
        elif not name.startswith(".") and path.suffix != ".safetensors" and name not in WRITTEN:
            is_known = name in KNOWN or name.partition(".")[0].partition("-")[0].upper() in KNOWN_STEMS
            found.append(Companion(name, _fault(source, path) if is_known else _NOT_KNOWN))
    return found


def copy_companions(source: Path, target: Path, scratch: Path) -> list[Companion]:
    """Copies the companions and returns those that were left out. Errors: FileError, OSError naming the file."""
    companions = find_companions(source)
    for one in companions:
        if not one.left_out:
            for folder in reversed(Path(one.name).parents[:-1]):
                _make_folder(target / folder)
            place = Path(os.path.realpath(source / one.name))
            write_file(target / one.name, [read_bytes(place, follow_links=False)], scratch)
    return [one for one in companions if one.left_out]


def _within_encoding(source: Path, folder: Path, depth: int = 1) -> Iterator[Companion]:
    """Lists the files below a folder, down to a limited depth and number."""
    name = folder.relative_to(source).as_posix()
    if folder.is_symlink() or not folder.is_dir():
        yield Companion(name, "no folder, or a link, which is not followed")
        return
    paths = sorted(folder.iterdir())
    if depth > MAX_DEPTH or len(paths) > MAX_FILES:
        yield Companion(name, f"deeper than {MAX_DEPTH} folders, or of more than {MAX_FILES} files")
        return
    for path in paths:
        if path.is_dir():
            if path.name != "__pycache__":
                yield from _within_encoding(source, path, depth + 1)
        else:
            yield Companion(path.relative_to(source).as_posix(), _fault(source, path))


def _fault(source: Path, path: Path) -> str:
    """Returns why a file of a known name cannot be copied; empty where it can."""
    if path.is_symlink() and not is_inside(path, source):
        return "a link out of the checkpoint folder"
    try:
        status = path.stat()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if not stat.S_ISREG(status.st_mode):
        return "no regular file"
    return f"more than {MAX_FILE_BYTES} bytes" if status.st_size > MAX_FILE_BYTES else ""


def _make_folder(path: Path) -> None:
    path.mkdir(exist_ok=True)
    if path.is_symlink():
        raise FileError(f"{path}: is a link; nothing is written through it")
