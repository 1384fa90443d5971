"""Writes a checkpoint of full-size V4-Flash layers as NVIDIA exports them: real names and shapes, random values.

The values are random bits of a plausible size (a product keeps the size of its input, scales are valid, each token's
experts differ), the same few megabytes repeated, so that writing 20 GB takes only the disk's time. For measuring rates
and verifying, not for answers.
"""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ownpath.bench.published import ONE_LAYER, SHAPES
from ownpath.bench.synthetic import headers
from ownpath.checkpoint.tensor_info import TensorInfo
from ownpath.checkpoint.writer import INDEX_NAME
from ownpath.config import ModelConfig

SHARD_BYTES = 2 * 10**9
NUM_WRITERS = 8
ITEM_BYTES = {"I64": 8, "F32": 4, "BF16": 2}
# dtype -> random bits to keep, and bits to set. F32: positive, near 2^-11; BF16: near 2^-7; E4M3: 0.5 to 0.94 with a
# sign; E8M0: 2^-7 or 2^-6.
BITS = {"F32": (0x007FFFFF, 0x3A000000), "BF16": (0x807F, 0x3C00), "U8": (0xFF, 0)}
BITS |= {"F8_E4M3": (0x87, 0x30), "F8_E8M0": (0x01, 0x78)}
BLOCK_SCALE_BITS = (0x0F, 0x30)  # E4M3 from 0.5 to 1.875


def write_shards(folder: Path, shape: str, num_layers: int) -> int:
    """Writes the checkpoint; returns its bytes of tensors. The index is written last. shape: one of ``SHAPES``."""
    ratios = ([0, 0] + [4, 128] * num_layers)[:num_layers]
    fields = SHAPES[shape] | ONE_LAYER | {"num_hidden_layers": num_layers, "compress_ratios": ratios}
    fields["num_hash_layers"] = min(3, num_layers)
    infos = headers(ModelConfig.from_dict(fields), "nvidia").tensors.values()
    random = np.random.default_rng(0).integers(0, 256, 2**23, np.uint8)
    tiles = {key: _tile(random, dtype, bits) for key, (dtype, bits) in _kinds().items()}
    # Experts in turn: those of one token are neighbours, hence distinct.
    tiles["I64"] = (np.arange(2**20) % fields["n_routed_experts"]).astype("<i8").view(np.uint8).data
    folder.mkdir(parents=True)
    shards = list(_shards(list(infos)))
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    with ThreadPoolExecutor(NUM_WRITERS) as pool:
        list(pool.map(lambda name, shard: _write(folder / name, shard, tiles), names, shards))
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    weight_map = {info.name: name for name, shard in zip(names, shards, strict=True) for info in shard}
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    return sum(info.num_bytes for info in infos)


def _kinds() -> dict[str, tuple[str, tuple[int, int]]]:
    return {dtype: (dtype, bits) for dtype, bits in BITS.items()} | {"scale": ("F8_E4M3", BLOCK_SCALE_BITS)}


def _tile(random: np.ndarray, dtype: str, bits: tuple[int, int]) -> memoryview:
    values = random.view(f"<u{ITEM_BYTES.get(dtype, 1)}")
    keep, put = bits
    tile: memoryview = ((values & values.dtype.type(keep)) | values.dtype.type(put)).view(np.uint8).data
    return tile


def _shards(infos: list[TensorInfo]) -> Iterator[list[TensorInfo]]:
    """Groups tensors by layer, as exporters do; in a shard wide elements first, then by name, as safetensors does."""
    shard: list[TensorInfo] = []
    num_bytes = 0
    for info in sorted(infos, key=lambda info: info.name):
        num_bytes += info.num_bytes
        if shard and num_bytes > SHARD_BYTES:
            yield sorted(shard, key=_order)
            shard, num_bytes = [], info.num_bytes
        shard.append(info)
    yield sorted(shard, key=_order)


def _order(info: TensorInfo) -> tuple[int, str]:
    return -ITEM_BYTES.get(info.dtype, 1), info.name


def _write(path: Path, infos: list[TensorInfo], tiles: dict[str, memoryview]) -> None:
    header, end = {}, 0
    for info in infos:
        offsets = [end, end := end + info.num_bytes]
        header[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=2**22) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for info in infos:
            tile = tiles["scale" if info.name.endswith("weight_scale") else info.dtype]
            for start in range(0, info.num_bytes, len(tile)):
                file.write(tile[: info.num_bytes - start])
        file.flush()
        os.fsync(file.fileno())  # so that no writing back goes on while rates are taken
