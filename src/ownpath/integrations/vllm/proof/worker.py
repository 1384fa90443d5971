"""Inside vLLM's workers: a loader that puts the taps on a model before it is profiled or captured, and what to ask it.

vLLM imports this module in every worker, by the name of the class ``ProofWorker`` (``worker_extension_cls``). Values go
through files, so that nothing but names and numbers travels between processes.
"""

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from vllm.config import LoadConfig, ModelConfig, VllmConfig
from vllm.model_executor.model_loader import DefaultModelLoader, register_model_loader

from ownpath.checkpoint.writer import write_shard
from ownpath.integrations.vllm.proof.points import layer_of, points_of
from ownpath.integrations.vllm.proof.taps import Taps
from ownpath.integrations.vllm.proof.walk import describe_modules
from ownpath.integrations.vllm.seam import installed_kernel
from ownpath.trace.launches import DeviceRecord

LOAD_FORMAT = "ownpath_taps"
EXTENSION = f"{__name__}.ProofWorker"
TAPS_FIELD = "ownpath_taps"
ENDS = "ends"
_NAME_LENGTH = 1000


def _model_class(model: torch.nn.Module) -> type:
    """Returns vLLM's own class of the model, in whose file its hyper-connections are called."""
    return next(kind for kind in type(model).__mro__ if kind.__module__.startswith("vllm."))


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@register_model_loader(LOAD_FORMAT)
class TappedLoader(DefaultModelLoader):  # type: ignore[misc]
    """vLLM's own loader, and taps on what it loaded, with room for the largest step. Its extra config says in which
    layers."""

    def __init__(self, load_config: LoadConfig) -> None:
        fields = dict(load_config.model_loader_extra_config)
        self._asked: dict[str, Any] = fields.pop(TAPS_FIELD)
        super().__init__(replace(load_config, load_format="auto", model_loader_extra_config=fields))

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> torch.nn.Module:
        """Loads the model, and taps it. Errors: as vLLM's."""
        model: torch.nn.Module = super().load_model(vllm_config, model_config, prefix)
        layers = self._asked["layers"]
        taps = Taps(vllm_config.scheduler_config.max_num_batched_tokens, is_capturing=_is_capturing)
        taps.add(model, points_of(None if layers is None else frozenset(layers)))
        model.ownpath_taps = taps  # type: ignore[assignment]
        return model


class ProofWorker:
    """The calls that the driver makes in every worker."""

    rank: int
    _ownpath_record: DeviceRecord | None = None

    def ownpath_start_step(self, is_recorded: bool) -> None:
        """Marks all buffers as unwritten. is_recorded: the device's record of the step is taken too."""
        self._ownpath_taps.start_step()
        if is_recorded and torch.cuda.is_available():
            self._ownpath_record = DeviceRecord()
            torch.cuda.synchronize()
            self._ownpath_record.start()

    def ownpath_take(self, num_rows: int, folder: str, step: str) -> dict[str, Any]:
        """Writes what the step's taps hold on this rank, a file for each layer; returns their names and which taps were
        missed."""
        taps, kernels = self._ownpath_taps, None
        if self._ownpath_record is not None:
            kernels = dict(Counter(launch.kernel[:_NAME_LENGTH] for launch in self._ownpath_record.stop()))
            self._ownpath_record = None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in taps.take(num_rows).items():
            layer = layer_of(key)
            parts.setdefault(ENDS if layer is None else str(layer), {})[key] = value.contiguous()
        files = {part: f"{step}.{part}.rank{self.rank}.safetensors" for part in parts}
        for part, tensors in parts.items():
            write_shard(Path(folder, files[part]), tensors, {})
        unwritten = sorted(set(taps.buffers) - {key for tensors in parts.values() for key in tensors})
        told = {"rank": self.rank, "files": files, "missed": taps.missed, "unwritten": unwritten}
        return told | {"from_python": taps.has_run, "kernels": kernels}

    def ownpath_walk(self) -> dict[str, Any]:
        """Describes every module of this worker, and the points that fitted none."""
        model: torch.nn.Module = self.get_model()  # type: ignore[attr-defined]
        told = {"rank": self.rank, "modules": describe_modules(model), "absent": self._ownpath_taps.absent}
        return told | {"hyper": installed_kernel(sys.modules[_model_class(model).__module__])}

    @property
    def _ownpath_taps(self) -> Taps:
        taps = self.get_model().ownpath_taps  # type: ignore[attr-defined]
        assert isinstance(taps, Taps)
        return taps
