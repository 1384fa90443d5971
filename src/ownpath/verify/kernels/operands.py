"""A planned slot's stored weights in float64, and its kernel's rounding of activations before it multiplies.

Legend: M rows, K in, N out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ownpath.conformance.bounds import FP8_TENSOR_CORE
from ownpath.conformance.exact import ExpertMatrices, ExpertSteps, widen
from ownpath.kernels.spec import InputRounding
from ownpath.official import Step
from ownpath.oracle.formats import fp8, nvfp4
from ownpath.oracle.weights import StoredWeights
from ownpath.plan.ops import PlannedOp

INPUT_BLOCK = 128


@dataclass(frozen=True)
class InputReading:
    """A kernel's rounding of its activations. from_rows: applies to calls of so many rows or more. slack: added error
    of the sums."""

    quantize: Callable[[Tensor], Tensor] = widen
    from_rows: int = 1
    slack: float = 0.0


def inputs_of(op: PlannedOp, stored: StoredWeights) -> tuple[InputReading, ...]:
    """Returns a planned dense product's readings of its activations, by number of rows, ascending."""
    kernel, quantize = op.choice.kernel, _quantizer(op, stored)
    if kernel.rounds_from == 1:
        return (InputReading(quantize),)
    is_always_rounded = Step.FP8_INPUTS in kernel.official
    few = InputReading(quantize) if is_always_rounded else InputReading()
    return few, InputReading(quantize, kernel.rounds_from, FP8_TENSOR_CORE)


def _quantizer(op: PlannedOp, stored: StoredWeights) -> Callable[[Tensor], Tensor]:
    rounding, modules = op.choice.kernel.rounding, [module.name for module in op.spec.modules]
    if rounding is InputRounding.EXACT:
        return widen
    if rounding is InputRounding.NVFP4:
        scale = largest_input_scale(op, modules, stored)
        return lambda x: nvfp4(x, scale)
    is_e8m0 = rounding is InputRounding.E4M3_POWER_OF_TWO or all(_has_power_scales(op, m, stored) for m in modules)
    return lambda x: fp8(x, INPUT_BLOCK, is_e8m0)


def _fp8_inputs(x: Tensor) -> Tensor:
    return fp8(x, INPUT_BLOCK)


def _has_power_scales(op: PlannedOp, module: str, stored: StoredWeights) -> bool:
    if not any(part.role == "scale" for part in op.encoding.parts):
        return True
    return stored.index[op.encoding.key(module, "scale")].dtype == "F8_E8M0"


def largest_input_scale(op: PlannedOp, modules: Sequence[str], stored: StoredWeights) -> Tensor:
    """Returns the largest scale of fused modules, which share an input that is quantised once."""
    scales = [stored.input_scale(module, op.encoding) for module in modules]
    return torch.stack([scale for scale in scales if scale is not None]).amax().float()


def weight_of(op: PlannedOp, stored: StoredWeights) -> Tensor:
    """Returns the fused matrix of a dense op, float64 [N, K]."""
    parts = [stored.matrix(module.name, op.encoding) for module in op.spec.modules]
    return parts[0] if len(parts) == 1 else torch.cat(parts)  # cat copies even a single one


def loss_at_load(op: PlannedOp, weight_NK: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Bounds the change of a weight that its kernel converts to ``dtype``; ``None`` where it converts nothing."""
    if op.spec.is_wide or not op.choice.kernel.rounds_weight:
        return None
    lost = (weight_NK - weight_NK.to(dtype).double()).abs()
    return lost if bool(lost.any()) else None


def matrices_of(op: PlannedOp, stored: StoredWeights, expert: str) -> ExpertMatrices:
    """Reads the matrices of one routed expert, such as ``layers.3.ffn.experts.17``."""
    return ExpertMatrices(*(stored.matrix(f"{expert}.{name}", op.encoding) for name in ("w1", "w3", "w2")))


def steps_of(op: PlannedOp, stored: StoredWeights, expert: str, limit: float, dtype: torch.dtype) -> ExpertSteps:
    """Returns the roundings inside the planned experts."""
    kernel = op.choice.kernel
    first = Step.ROUTING_WEIGHT in kernel.official
    if kernel.rounding is InputRounding.NVFP4:
        x_scale = largest_input_scale(op, [f"{expert}.w1", f"{expert}.w3"], stored)
        h_scale = largest_input_scale(op, [f"{expert}.w2"], stored)
        return ExpertSteps(limit, dtype, lambda x: nvfp4(x, x_scale), lambda x: nvfp4(x, h_scale), first)
    if kernel.rounding is not InputRounding.EXACT:
        return ExpertSteps(limit, dtype, _fp8_inputs, _fp8_inputs, first, 0.0 if kernel.is_torch else FP8_TENSOR_CORE)
    return ExpertSteps(limit, dtype, rounds_products=first)
