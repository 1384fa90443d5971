"""From a model folder to a running model: headers, plan, weights, runners, model, in that order."""

import os
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from ownpath.checkpoint.index import CheckpointIndex
from ownpath.config import EngineConfig, ModelConfig
from ownpath.formats import FP8_BLOCK
from ownpath.kernels.registry import KERNELS
from ownpath.model.build import Builder
from ownpath.model.model import Model
from ownpath.numerics import dequantize
from ownpath.plan.plan import Plan, PlannedOp, make_plan
from ownpath.plan.select import Caps
from ownpath.qtensor import QuantTensor
from ownpath.runners import ConcatLinear, Fp8Linear, GroupedLinear, Ledger, Nvfp4Linear, Nvfp4MoE, PlainLinear
from ownpath.weights.load import load_weights
from ownpath.weights.operands import Operand


def default_model_dir() -> Path:
    """The embedded model, ``assets/tiny-v4``."""
    return Path(str(files("ownpath"))) / "assets" / "tiny-v4"


def leave_a_core() -> None:
    """Gives torch all cores but one (at least one), for the whole process; entry points call it once.

    Torch's threads spin while they wait for each other. With as many of them as cores, anything else that runs (the
    HTTP server, a neighbour) stalls all of them: on two cores, decode of the embedded model fell from 39 to 7 tokens/s.
    """
    torch.set_num_threads(max(1, (os.cpu_count() or 2) - 1))


def device_caps(device: str) -> Caps:
    """What ``device`` is. Errors: ValueError when torch does not know it or it is absent."""
    try:
        parsed = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device {device!r} is not one torch knows") from None
    if parsed.type == "cpu":
        return Caps("cpu", "CPU")
    if parsed.type != "cuda":
        raise ValueError(f"device {device!r}: ownpath runs on cpu and cuda")
    if not torch.cuda.is_available():
        raise ValueError(f"device {device!r}: torch sees no CUDA device here")
    major, minor = torch.cuda.get_device_capability(parsed)
    return Caps("cuda", torch.cuda.get_device_name(parsed), 10 * major + minor)


def plan_model(folder: Path, device: str) -> Plan:
    """The plan of the checkpoint in ``folder``, from headers alone. Errors: as ``make_plan`` and ``ModelConfig``."""
    return _plan_and_index(folder, device)[0]


def load_model(folder: Path, engine_config: EngineConfig) -> Model:
    """Loads the checkpoint in ``folder`` as its plan says.

    Errors: ConfigError, CheckpointError or PlanError (all ValueError), naming the file, field, tensor or op.
    """
    plan, index = _plan_and_index(folder, engine_config.device)
    if engine_config.max_model_len > plan.config.max_position_embeddings:
        limit = f"max_position_embeddings {plan.config.max_position_embeddings}"
        raise ValueError(f"max_model_len {engine_config.max_model_len} exceeds {folder / 'config.json'}: {limit}")
    weights = load_weights(plan, index, torch.device(engine_config.device))
    ledger = Ledger()
    built: dict[str, list[Callable[..., Any]]] = {}
    for op, operand in zip(plan.ops, weights.operands, strict=True):
        built.setdefault(op.spec.slot, []).append(_runner(op, operand, plan.config))
    runners = {slot: _watch(slot, parts, plan, ledger) for slot, parts in built.items()}
    return Builder(plan.config, engine_config, runners, weights.params, ledger).model()


def _plan_and_index(folder: Path, device: str) -> tuple[Plan, CheckpointIndex]:
    config = ModelConfig.from_file(folder / "config.json")
    index = CheckpointIndex.open(folder)
    return make_plan(config, index, device_caps(device)), index


def _runner(op: PlannedOp, operand: Operand, config: ModelConfig) -> Callable[..., Any]:
    """The runner that the plan names, around its operand."""
    kernel = KERNELS[op.choice.kernel.name]
    buffers = operand.buffers
    if op.choice.kernel.runner == "Nvfp4MoE":
        names = ("w13", "w13_scale", "w13_scale_2", "w2", "w2_scale", "w2_scale_2")
        tensors = {name: buffers[name][0] for name in names}
        return Nvfp4MoE(**tensors, swiglu_limit=config.swiglu_limit, kernel=kernel)
    if op.choice.kernel.runner == "Nvfp4Linear":
        return Nvfp4Linear(buffers["weight"], buffers["weight_scale"], buffers["weight_scale_2"], kernel=kernel)
    if op.choice.kernel.runner == "Fp8Linear":
        return Fp8Linear(buffers["weight"], buffers["scale"], kernel=kernel)
    if op.choice.kernel.runner == "GroupedLinear":
        return GroupedLinear(_grouped_weight(op, operand), config.o_groups, kernel=kernel)
    assert op.choice.kernel.runner == "PlainLinear", op.choice.kernel.runner
    return PlainLinear(buffers["weight"], kernel=kernel)


def _grouped_weight(op: PlannedOp, operand: Operand) -> torch.Tensor:
    """``wo_a`` as plain floating point; from FP8, BF16 where that is exact (power-of-two scales), else float32."""
    (weight,) = operand.buffers["weight"]
    if op.choice.kernel.layout != "dequantized":
        return weight
    (scale,) = operand.buffers["scale"]
    dtype = torch.bfloat16 if scale.dtype == torch.float8_e8m0fnu else torch.float32
    return dequantize(QuantTensor(weight, scale, None, FP8_BLOCK), dtype)


def _watch(slot: str, parts: list[Callable[..., Any]], plan: Plan, ledger: Ledger) -> Callable[..., Any]:
    """One runner per slot, counted by the ledger under the plan's names."""
    kernels = [op.choice.kernel for op in plan.ops_of(slot)]
    runner = parts[0] if len(parts) == 1 else ConcatLinear(parts)  # type: ignore[arg-type]
    names = "+".join(dict.fromkeys(kernel.runner for kernel in kernels))
    return ledger.watch(slot, names, "+".join(dict.fromkeys(kernel.name for kernel in kernels)), runner)
