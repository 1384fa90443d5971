"""One way to corrupt a checkpoint, a loaded model or a kernel, and what `ownpath verify` must say of it."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ownpath.assembly import LoadedPart
from ownpath.formats import CacheFormat
from ownpath.verify.layer import LoadedLayer
from ownpath.weights.load import LoadedWeights
from support.broken import Tensors, change_tensors
from support.mutations.interference import Interference

OnDisk = Callable[[Path], object]
LOAD_AND_KERNELS = ("load", "kernels")
"""For what the kernels stage finds: the layers stage would find it once more, at twice the time."""
LAYERS = ("layers", "ledger")
"""For what only a whole layer shows, and no kernel alone."""


NO_INTERFERENCE = Interference()
MODULE_IDX = 1
"""The MTP module of the model "drafting", as a layer."""


@dataclass(frozen=True)
class Mutation:
    """what: what is corrupted. check, where: of the first finding that must fail.

    on_disk: done to a copy of the checkpoint. interference: done to what was loaded.
    layer_idx: the one layer to be verified (``--layers``); ``None``: all. stages: those to be run (``--stages``);
    empty: all. source: whether another export is given (``--source``). device: whose plan is loaded.
    model: which intact one is corrupted, by its name in ``runs.write_models``. is_official: ``--numerics official``.
    is_warning: it is told as a warning, and nothing fails: the answer here is right all the same.
    cache_format: of keys (``--cache-format``). drafts: whether the MTP module alone is verified (``--draft``).
    in_plan: done to what `ownpath plan --json` wrote before (``--ledger``).
    """

    what: str
    check: str
    where: str
    on_disk: OnDisk | None = None
    interference: Interference = NO_INTERFERENCE
    layer_idx: int | None = None
    stages: tuple[str, ...] = ()
    source: bool = False
    device: str = "CPU"
    model: str = "small"
    is_official: bool = False
    is_warning: bool = False
    in_plan: Callable[[dict[str, Any]], object] | None = None
    cache_format: CacheFormat = CacheFormat.BF16
    drafts: bool = False

    @property
    def options(self) -> str:
        """Arguments that make the command run the same."""
        options = [] if self.layer_idx is None else [f"--layers {self.layer_idx}"]
        options += [f"--stages {','.join(self.stages)}"] if self.stages else []
        options += ["--source DIR"] if self.source else []
        options += ["--numerics official"] if self.is_official else []
        options += [f"--cache-format {self.cache_format}"] if self.cache_format is not CacheFormat.BF16 else []
        options += [f"--draft --layers {MODULE_IDX}"] if self.drafts else []
        options += ["--ledger PLAN"] if self.in_plan is not None else []
        return " ".join(options)


def tensors_changed(change: Callable[[Tensors], object]) -> OnDisk:
    return lambda folder: change_tensors(folder, change)


def assigned(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> OnDisk:
    """One tensor written anew."""

    def changed(tensors: Tensors) -> None:
        tensors[key] = change(tensors[key]).contiguous()

    return tensors_changed(changed)


def json_changed(name: str, change: Callable[[dict[str, Any]], object]) -> OnDisk:
    """A file of fields written anew; made where there is none."""

    def changed(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        change(content)
        path.write_text(json.dumps(content), encoding="utf-8")

    return changed


def in_config(**fields: Any) -> OnDisk:
    return json_changed("config.json", lambda config: config.update(fields))


def on_weights(change: Callable[[LoadedWeights], object]) -> Interference:
    """A change in place of everything that is loaded and has what it changes."""

    def changed(weights: LoadedWeights) -> LoadedWeights:
        change(weights)
        return weights

    return Interference(weights=changed)


def on_slot(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Interference:
    """Changes one tensor after loading; the change gets its bytes where its dtype does not support arithmetic."""

    def changed(weights: LoadedWeights) -> None:
        targets = {
            slot.key: slot.target for operand in weights.operands for slot in operand.destinations
        } | weights.params
        if key in targets:
            target = _writable(targets[key])
            target.copy_(change(target.clone()))

    return on_weights(changed)


def on_part(change: Callable[[LoadedPart], object]) -> Interference:
    def changed(part: LoadedPart) -> LoadedPart:
        change(part)
        return part

    return Interference(part=changed)


def on_layer(layer_idx: int, change: Callable[[LoadedLayer], LoadedLayer]) -> Interference:
    return Interference(layer=lambda loaded: change(loaded) if loaded.layer_idx == layer_idx else loaded)


class Around:
    """A runner with something else around its call; its attributes are the runner's."""

    def __init__(self, runner: Any, call: Callable[..., Any]) -> None:
        self._runner, self._call = runner, call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def __call__(self, *args: Any, **given: Any) -> Any:
        return self._call(self._runner, *args, **given)


def around(watched: Any, call: Callable[..., Any]) -> Any:
    """The same slot, whose runner is called by ``call(runner, *args)``."""
    return replace(watched, runner=Around(watched.runner, call))


def _writable(target: torch.Tensor) -> torch.Tensor:
    return target.view(torch.uint8) if target.dtype.itemsize == 1 else target
