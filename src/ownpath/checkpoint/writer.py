"""Writes a sharded safetensors checkpoint and its index last, so that a partial write never looks like a checkpoint."""

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

from ownpath.checkpoint.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"


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
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        staged_index = Path(staging) / INDEX_NAME
        staged_index.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        staged_index.replace(folder / INDEX_NAME)


def _write_shards(
    staging: Path, tensors: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int
) -> tuple[list[tuple[Path, list[str]]], int]:
    shards: list[tuple[Path, list[str]]] = []
    seen: set[str] = set()
    shard: dict[str, torch.Tensor] = {}
    shard_bytes = total_bytes = 0

    def flush() -> None:
        path = staging / f"{len(shards)}.safetensors"
        save_file(shard, path, metadata={"format": "pt"})
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
