"""Measures the largest input of each weight that will become NVFP4, while the source model reads a text.

The model runs as planned, and an observer sees every product's input. The input of a routed expert's ``w2`` exists only
inside a fused operation, so it is computed here again from the expert's stored weights.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ownpath.chat.tokenizer import Tokenizer
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.reader import TensorReader
from ownpath.config import EngineConfig, ModelConfig
from ownpath.loading import load_model, plan_model
from ownpath.model.batch import ForwardBatch
from ownpath.numerics import dequantize
from ownpath.quantize.convert import stored_weight
from ownpath.quantize.steps import Convert, QuantizeScope, plan_steps
from ownpath.runners import SwiGLU
from ownpath.trace.observers import CallArguments, Observer, Watched

NVFP4_MAX = 6 * 448
CHUNK_TOKENS = 512
"""Tokens per forward. The text is cut into pieces of this length, which do not see each other."""


def calibrate(source: Path, text: str, scope: QuantizeScope, device: str) -> dict[str, float]:
    """Returns ``input_scale`` = amax / 2688 of every weight that ``scope`` converts, by module.

    An expert that no token reached gets the largest value of its projection in its layer, or in any layer if no expert
    of its layer was reached.
    Memory: the whole model. Errors: ValueError for a text without tokens, and as ``load_model``.
    """
    token_ids = Tokenizer.from_folder(source).encode_text(text)
    if not token_ids:
        raise ValueError("the calibration text has no tokens")
    config = ModelConfig.from_file(source / "config.json")
    index = CheckpointIndex.open(source)
    converts = [step for step in plan_steps(index, config, scope) if isinstance(step, Convert)]
    model = load_model(source, replace(EngineConfig.for_device(device, CHUNK_TOKENS), max_num_seqs=1))
    slots = {op.spec.slot: [module.name for module in op.spec.modules] for op in plan_model(source, device).ops}
    with TensorReader(index) as read:
        inputs = _InputAmax(converts, slots, read, config.swiglu_limit)
        model.ledger.observers.attach(inputs)
        for start in range(0, len(token_ids), CHUNK_TOKENS):
            chunk = (token_ids[start : start + CHUNK_TOKENS], model.new_cache())
            model.forward(ForwardBatch.of([chunk], device))
    return input_scales([module.name for step in converts for module in step.modules], inputs.amax)


def input_scales(modules: Sequence[str], amax: Mapping[str, float]) -> dict[str, float]:
    """Returns amax / 2688 of each module; a module that was never reached gets the largest value of its kind."""
    near: dict[tuple[str, str], float] = defaultdict(float)
    far: dict[str, float] = defaultdict(float)
    for module, value in amax.items():
        group, projection = _kind(module)
        near[group, projection] = max(near[group, projection], value)
        far[projection] = max(far[projection], value)
    found = {}
    for module in modules:
        group, projection = _kind(module)
        value = amax.get(module) or near[group, projection] or far[projection]
        found[module] = value / NVFP4_MAX if value else 1.0
    return found


def _kind(module: str) -> tuple[str, str]:
    """Returns (the layer's experts or the module itself, projection)."""
    group, _, rest = module.partition(".experts.")
    return (group, rest.rpartition(".")[2]) if rest else (module, module.rpartition(".")[2])


class _InputAmax(Observer):
    """Records the largest magnitude of each weight's input over all calls."""

    def __init__(
        self, converts: Sequence[Convert], slots: Mapping[str, Sequence[str]], read: TensorReader, swiglu_limit: float
    ) -> None:
        self.amax: dict[str, float] = defaultdict(float)
        self._source = {module.name: step.source for step in converts for module in step.modules}
        self._slots, self._read = slots, read
        self._activation = SwiGLU(swiglu_limit)

    def before(self, call: Watched, args: CallArguments) -> None:
        slot = call.slot
        modules = [name for name in self._slots.get(slot, ()) if name in self._source]
        if modules and ".experts." in modules[0]:
            x, topk_ids = args[0].float(), args[1]
            for expert in topk_ids.unique().tolist():
                self._see_expert(f"{slot}.{expert}", x[(topk_ids == expert).any(dim=-1)])
        else:
            for module in modules:
                self._see(module, args[0])

    def _see_expert(self, expert: str, x: torch.Tensor) -> None:
        gate, up = (x @ self._values(f"{expert}.{name}", x.device).T for name in ("w1", "w3"))
        self._see(f"{expert}.w1", x)
        self._see(f"{expert}.w3", x)
        self._see(f"{expert}.w2", self._activation(torch.cat([gate, up], dim=-1)))

    def _values(self, module: str, device: torch.device) -> torch.Tensor:
        return dequantize(stored_weight(self._source[module], module, self._read)).to(device)

    def _see(self, module: str, x: torch.Tensor) -> None:
        self.amax[module] = max(self.amax[module], float(x.abs().max()))
