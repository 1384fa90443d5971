"""Checkpoint folders to break: rewritten tensors, and shards written byte by byte as the format's description says."""

import json
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ownpath.checkpoint.writer import INDEX_NAME, write_checkpoint

Tensors = dict[str, torch.Tensor]
ITEM_BYTES = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "F8_E8M0": 1, "U8": 1, "I8": 1, "I64": 8}


def change_tensors(folder: Path, change: Callable[[Tensors], object]) -> None:
    """Rewrites the checkpoint with changed tensors and a matching index."""
    tensors: Tensors = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(shard))
        shard.unlink()
    (folder / INDEX_NAME).unlink(missing_ok=True)
    change(tensors)
    write_checkpoint(folder, tensors.items(), max_shard_bytes=200_000)


def shard_bytes(header: bytes, data: bytes = b"") -> bytes:
    """A safetensors file of a header and data that need not fit each other."""
    return struct.pack("<Q", len(header)) + header + data


def change_header(shard: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrites a shard's header; the data stays what it is."""
    content = shard.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    shard.write_bytes(shard_bytes(json.dumps(header).encode(), content[8 + length :]))


def write_sparse_shard(path: Path, entries: Iterable[tuple[str, str, tuple[int, ...]]]) -> dict[str, int]:
    """A shard of zeros that takes no disk; returns where each tensor's data starts in the file."""
    header: dict[str, Any] = {}
    starts: dict[str, int] = {}
    end = 0
    for name, dtype, shape in entries:
        size = ITEM_BYTES[dtype]
        for length in shape:
            size *= length
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        starts[name] = end
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(shard_bytes(text))
        file.truncate(8 + len(text) + end)
    return {name: 8 + len(text) + start for name, start in starts.items()}
