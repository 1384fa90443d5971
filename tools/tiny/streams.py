"""The frozen backbone's streams over rows of text: the input and the target of a draft's training."""

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
from tiny.batches import PADDING, Rows

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


class GrowingStreams:
    """Streams of rows that the backbone runs step by step, each row without its padding."""

    def __init__(self, model: Model, rows: Rows) -> None:
        self.model, self.rows, self.num_done = model, rows, 0
        self.lengths: list[int] = (rows.role != PADDING).sum(1).tolist()
        config, device = model.config, model.cache_spec.device
        shape = (*rows.ids.shape, config.hc_mult, config.hidden_size)
        self._streams = torch.zeros(shape, dtype=torch.bfloat16, device=device)
        self._h = torch.zeros(*rows.ids.shape, config.hidden_size, dtype=torch.bfloat16, device=device)

    @property
    def is_done(self) -> bool:
        return self.num_done == len(self.lengths)

    def step(self) -> None:
        """Runs as many of the next rows as make one step of the backbone."""
        device = self.model.cache_spec.device
        numbers = _next_step(self.lengths, self.num_done, _STEP_TOKENS[device.type])
        caches = [self.model.new_cache(self.lengths[i]) for i in numbers]
        chunks = [(self.rows.ids[i, : self.lengths[i]].tolist(), c) for i, c in zip(numbers, caches, strict=True)]
        hidden = self.model.hidden(ForwardBatch.of(chunks, device))
        lengths = torch.tensor(self.lengths[numbers.start : numbers.stop])
        row = torch.repeat_interleave(torch.tensor(list(numbers)), lengths).to(device)
        place = torch.cat([torch.arange(length) for length in lengths.tolist()]).to(device)
        self._streams[row, place] = hidden.streams_TSD.bfloat16()
        self._h[row, place] = hidden.h_TD.bfloat16()
        self.num_done = numbers.stop
        for cache in caches:
            cache.release()

    def found(self) -> Streams:
        """Returns those of the rows that were run."""
        done, device = self.num_done, str(self._h.device)
        rows = Rows(self.rows.ids[:done], self.rows.role[:done])
        return Streams(rows.to(device), self._streams[:done], self._h[:done])


def _next_step(lengths: list[int], start: int, most: int) -> range:
    """Returns the numbers of rows that make one step together."""
    stop, total = start, 0
    while stop < len(lengths) and stop - start < _STEP_ROWS and (stop == start or total + lengths[stop] <= most):
        total += lengths[stop]
        stop += 1
    return range(start, stop)


def backbone_streams(model: Model, rows: Rows) -> Streams:
    """Runs all rows."""
    growing = GrowingStreams(model, rows)
    while not growing.is_done:
        growing.step()
    return growing.found()


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
