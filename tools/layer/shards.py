"""Writes a checkpoint of full-size V4 layers as NVIDIA exports them: real names and shapes, random values.

A product keeps the size of its input, scales are valid, norms are near one, each token's experts differ. Large tensors
are the same few megabytes of random bits from another place each, so that writing 20 GB takes only the disk's time;
small ones are drawn. For measuring rates and verifying, not for answers.
"""

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ownpath.bench.published import ONE_LAYER, SHAPES
from ownpath.checkpoint.tensor_info import TensorInfo
from ownpath.checkpoint.writer import INDEX_NAME
from ownpath.config import ModelConfig
from ownpath.plan.exports import headers

SHARD_BYTES = 2 * 10**9
NUM_WRITERS = 8
TILE_BYTES = 2**23
ITEM_BYTES = {"I64": 8, "F32": 4, "BF16": 2}
# dtype -> random bits to keep, and bits to set. BF16: near 2^-7; E4M3: 0.5 to 0.94; both signed; E8M0: 2^-7 or 2^-6.
BITS = {"BF16": (0x807F, 0x3C00), "U8": (0xFF, 0), "F8_E4M3": (0x87, 0x30), "F8_E8M0": (0x01, 0x78)}
BLOCK_SCALE_BITS = (0x0F, 0x30)  # E4M3 from 0.5 to 1.875
GLOBAL_EXPONENTS = (-9.0, -6.5)  # of NVFP4's global scales: rows of 4096 then keep their size, or grow up to 2.5 times
INPUT_SCALE = 0.01


def layer_fields(shape: str, ratios: list[int], num_hash_layers: int) -> dict[str, Any]:
    """Returns config.json's fields for layers of these ratios. shape: one of ``SHAPES``."""
    fields = SHAPES[shape] | ONE_LAYER | {"num_hidden_layers": len(ratios), "compress_ratios": ratios}
    return fields | {"num_hash_layers": min(num_hash_layers, len(ratios))}


def write_shards(folder: Path, shape: str, num_layers: int) -> int:
    """Writes the first layers of a published model; returns the bytes of tensors. shape: one of ``SHAPES``."""
    ratios = ([0, 0] + [4, 128] * num_layers)[:num_layers]
    return write_layers(folder, layer_fields(shape, ratios, 3))


def write_layers(folder: Path, fields: Mapping[str, Any]) -> int:
    """Writes the checkpoint of a config.json; returns its bytes of tensors. The index is written last."""
    infos = headers(ModelConfig.from_dict(dict(fields)), "nvidia").tensors.values()
    values = LayerValues(fields["n_routed_experts"])
    folder.mkdir(parents=True)
    shards = list(_shards(list(infos)))
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    with ThreadPoolExecutor(NUM_WRITERS) as pool:
        list(pool.map(lambda name, shard: _write(folder / name, shard, values), names, shards))
    (folder / "config.json").write_text(json.dumps(dict(fields)), encoding="utf-8")
    weight_map = {info.name: name for name, shard in zip(names, shards, strict=True) for info in shard}
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    return sum(info.num_bytes for info in infos)


class LayerValues:
    """The bytes of every tensor, which depend on its name alone."""

    def __init__(self, num_experts: int) -> None:
        random = np.random.default_rng(0).integers(0, 256, TILE_BYTES, np.uint8)
        kinds = {**BITS, "scale": BLOCK_SCALE_BITS}
        self._tiles = {kind: _tile(random, kind, bits) for kind, bits in kinds.items()}
        # Experts in turn: those of one token are neighbours, hence distinct.
        self._tiles["I64"] = (np.arange(TILE_BYTES // 8) % num_experts).astype("<i8").view(np.uint8).data

    def parts(self, info: TensorInfo) -> Iterator[memoryview]:
        """Yields a tensor's bytes, piece by piece."""
        drawn = _drawn(info)
        if drawn is not None:
            yield drawn.astype("<f4").reshape(-1).view(np.uint8).data if info.dtype == "F32" else _bf16(drawn)
            return
        tile = self._tiles["scale" if info.name.endswith("weight_scale") else info.dtype]
        start = 0 if info.dtype == "I64" else _seed(info.name) % (TILE_BYTES // 16) * 16
        left = info.num_bytes
        while left:
            part = tile[start : start + left]
            yield part
            left, start = left - len(part), 0


def _seed(name: str) -> int:
    return zlib.crc32(name.encode())


def _drawn(info: TensorInfo) -> np.ndarray | None:
    """Draws a parameter or a scalar, in float64; ``None`` for a matrix of bits."""
    leaf, name = info.name.rpartition(".")[2], info.name
    if leaf == "weight_scale_2":  # one for gate and up, as exporters have it
        draw = np.random.default_rng(_seed(name.replace(".w3.", ".w1.")))
        exponents: np.ndarray = draw.uniform(*GLOBAL_EXPONENTS, info.shape)
        return np.asarray(np.exp2(exponents))
    if leaf == "input_scale":
        return np.full(info.shape, INPUT_SCALE)
    noise = None if info.dtype not in ("F32", "BF16") else np.random.default_rng(_seed(name))
    if noise is None or (info.dtype == "BF16" and not name.endswith("norm.weight")):
        return None
    normal: np.ndarray = noise.standard_normal(info.shape)
    if name.endswith("norm.weight"):
        return 1 + 0.1 * normal
    if name.endswith("_fn"):
        return normal * float(info.shape[-1] ** -0.5)
    return 0.3 * normal + float(name.endswith("_scale"))


def _bf16(values: np.ndarray) -> memoryview:
    rounded: memoryview = (values.astype("<f4").view("<u4") >> 16).astype("<u2").view(np.uint8).data
    return rounded


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


def _write(path: Path, infos: list[TensorInfo], values: LayerValues) -> None:
    header, end = {}, 0
    for info in infos:
        offsets = [end, end := end + info.num_bytes]
        header[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=2**22) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for info in infos:
            for part in values.parts(info):
                file.write(part)
        file.flush()
        os.fsync(file.fileno())  # so that no writing back goes on while rates are taken
