"""Writes safetensors files and sharded checkpoints: whole or not at all, and the index last.

A partial write never looks like a checkpoint: each file gets its name when its bytes are on the disk, and the index
when all the others have theirs.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from ownpath.checkpoint.dtypes import NAMES
from ownpath.checkpoint.errors import CheckpointError
from ownpath.files import FileError, create_file, open_regular, sync_folder, write_json

INDEX_NAME = "model.safetensors.index.json"
_METADATA = {"format": "pt"}
_HEADER_ALIGNMENT = 8
_READ_BYTES = 2**20


class Fingerprint(NamedTuple):
    """The size of a file and the SHA-256 of its bytes, in hexadecimal."""

    num_bytes: int
    sha256: str


def write_shard(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> Fingerprint:
    """Writes one safetensors file, on the disk when this returns, and returns its fingerprint.

    Tensors of wide elements come first, so that each lies at a multiple of its element's size.
    Errors: FileError naming the file, of which nothing is then left.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(metadata or _METADATA)}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    digest = hashlib.sha256()
    with create_file(path) as write:
        parts: list[bytes | memoryview] = [len(text).to_bytes(8, "little"), text]
        for part in (*parts, *(_bytes_of(tensors[name]) for name in order)):
            digest.update(part)
            write(part)
    return Fingerprint(8 + len(text) + end, digest.hexdigest())


def fingerprint_of(path: Path) -> Fingerprint:
    """Reads a file, not through a link, and returns its fingerprint. Errors: FileError naming it."""
    digest, num_bytes, buffer = hashlib.sha256(), 0, memoryview(bytearray(_READ_BYTES))
    with open_regular(path, follow_links=False) as descriptor:
        try:
            while count := os.readv(descriptor, [buffer]):
                digest.update(buffer[:count])
                num_bytes += count
        except OSError as error:
            raise FileError(f"{path}: cannot be read ({error.strerror})") from None
    return Fingerprint(num_bytes, digest.hexdigest())


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_checkpoint(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int) -> None:
    """Writes ``model-0000i-of-0000n.safetensors`` shards and ``model.safetensors.index.json`` into ``folder``.

    Tensors are taken one by one, so that at most one shard is in memory. A shard holds at most
    ``max_shard_bytes`` of tensor data (one larger tensor gets a shard of its own). The index is written last.
    Errors: CheckpointError for a name given twice, no tensors, or a folder that already holds an index.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / INDEX_NAME).exists():
        raise CheckpointError(f"{folder / INDEX_NAME} exists; a checkpoint is never overwritten")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as staging:
        shards, total_bytes = _write_shards(Path(staging), tensors, max_shard_bytes)
        weight_map: dict[str, str] = {}
        for number, (path, names) in enumerate(shards, start=1):
            final = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            path.replace(folder / final)
            weight_map.update(dict.fromkeys(names, final))
        sync_folder(folder)
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / INDEX_NAME, index)


def _write_shards(
    staging: Path, tensors: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int
) -> tuple[list[tuple[Path, list[str]]], int]:
    shards: list[tuple[Path, list[str]]] = []
    seen: set[str] = set()
    shard: dict[str, torch.Tensor] = {}
    shard_bytes = total_bytes = 0

    def flush() -> None:
        path = staging / f"{len(shards)}.safetensors"
        write_shard(path, shard)
        shards.append((path, list(shard)))
        shard.clear()

    for name, tensor in tensors:
        if name in seen:
            raise CheckpointError(f"tensor {name!r} was given twice")
        seen.add(name)
        if shard and shard_bytes + tensor.nbytes > max_shard_bytes:
            flush()
            shard_bytes = 0
        shard[name] = tensor.detach().cpu().contiguous()
        shard_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    if not seen:
        raise CheckpointError("no tensors to write")
    flush()
    return shards, total_bytes
