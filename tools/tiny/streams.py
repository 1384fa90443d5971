"""The frozen backbone's streams over rows of text: the input and the target of a draft's training."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ownpath.checkpoint.reader import read_file
from ownpath.config import EngineConfig
from ownpath.formats import FP8_BLOCK, NVFP4
from ownpath.loading import load_model
from ownpath.model.batch import ForwardBatch
from ownpath.model.model import Model
from ownpath.numerics import dequantize
from ownpath.qtensor import QuantTensor
from tiny.batches import Rows

MAX_TOKENS = 1024
_STEP_TOKENS = {"cpu": 1024, "cuda": 8192}
_STEP_ROWS = 256


@dataclass(frozen=True)
class Streams:
    """The backbone's hidden of rows of one width.

    Shapes: ids and role as of ``Rows``; streams bfloat16 [num_rows, width, S, D]; h bfloat16 [num_rows, width, D], of
    which the head makes logits. Padding holds zeros.
    """

    rows: Rows
    streams: Tensor
    h: Tensor


def load_backbone(folder: Path, device: str, dtype: str | None = None) -> Model:
    """Loads the checkpoint to run documents of at most ``MAX_TOKENS`` tokens, many at once.

    Products are torch's, so that hardly a kernel has to be compiled for so short a use.
    """
    default = EngineConfig.for_device(device).dtype if dtype is None else getattr(torch, dtype)
    tokens = _STEP_TOKENS[torch.device(device).type]
    products = frozenset({"layers.*"})
    engine = EngineConfig(device, default, MAX_TOKENS, _STEP_ROWS, tokens, reference=products, graphs=False)
    return load_model(folder, engine)


def backbone_streams(model: Model, rows: Rows, lengths: Tensor) -> Streams:
    """Runs all rows, each without its padding. lengths: tokens of each row."""
    device = model.cache_spec.device
    count, width = rows.ids.shape
    config = model.config
    streams = torch.zeros(count, width, config.hc_mult, config.hidden_size, dtype=torch.bfloat16, device=device)
    h = torch.zeros(count, width, config.hidden_size, dtype=torch.bfloat16, device=device)
    for numbers in _steps(lengths.tolist(), _STEP_TOKENS[device.type]):
        caches = [model.new_cache(int(lengths[i])) for i in numbers]
        chunks = [(rows.ids[i, : lengths[i]].tolist(), cache) for i, cache in zip(numbers, caches, strict=True)]
        hidden = model.hidden(ForwardBatch.of(chunks, device))
        row = torch.repeat_interleave(torch.tensor(numbers), lengths[numbers]).to(device)
        place = torch.cat([torch.arange(int(lengths[i])) for i in numbers]).to(device)
        streams[row, place] = hidden.streams_TSD.bfloat16()
        h[row, place] = hidden.h_TD.bfloat16()
        for cache in caches:
            cache.release()
    return Streams(rows.to(str(device)), streams, h)


def _steps(lengths: list[int], most: int) -> Iterator[list[int]]:
    """Yields the numbers of rows that make one step together."""
    numbers: list[int] = []
    total = 0
    for number, length in enumerate(lengths):
        if numbers and (total + length > most or len(numbers) == _STEP_ROWS):
            yield numbers
            numbers, total = [], 0
        numbers.append(number)
        total += length
    if numbers:
        yield numbers


def decoded_weights(folder: Path) -> dict[str, Tensor]:
    """Returns the values that the checkpoint's tensors mean, in float32 where they are quantised, under their names."""
    stored: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        stored |= read_file(shard)[1]
    found = {}
    for name, tensor in stored.items():
        module = name.removesuffix(".weight")
        if not name.endswith(".weight"):
            found[name] = tensor
        elif f"{module}.weight_scale_2" in stored:
            scales = stored[f"{module}.weight_scale"], stored[f"{module}.weight_scale_2"]
            found[name] = dequantize(QuantTensor(tensor, *scales, NVFP4))
        elif f"{module}.scale" in stored:
            found[name] = dequantize(QuantTensor(tensor, stored[f"{module}.scale"], None, FP8_BLOCK))
        else:
            found[name] = tensor
    return found
