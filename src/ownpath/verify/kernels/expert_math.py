"""One SwiGLU expert in float64, rounded where the planned kernel rounds, and how far a right kernel may be off.

Legend: S rows, D hidden, F expert width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ownpath.official import Step
from ownpath.plan.plan import PlannedOp
from ownpath.verify.kernels.codes import nvfp4_inputs
from ownpath.verify.kernels.compare import Exact
from ownpath.verify.kernels.exact import as_it_is, fp8_inputs, independent, largest_input_scale, product
from ownpath.verify.kernels.limits import EXP_STEPS, FLOAT32_ROUND, rounding
from ownpath.verify.reference.stored import Stored

SILU_SLOPE = 1.1
"""silu is nowhere steeper."""


@dataclass(frozen=True)
class Matrices:
    """w1 (gate) and w3 (up) [F, D], w2 (down) [D, F], float64."""

    w1: Tensor
    w3: Tensor
    w2: Tensor

    @classmethod
    def of(cls, stored: Stored, op: PlannedOp, expert: str) -> "Matrices":
        """Those of the expert so named, such as ``layers.3.ffn.experts.17``."""
        w1, w3, w2 = (stored.matrix(f"{expert}.{name}", op.encoding) for name in ("w1", "w3", "w2"))
        return cls(w1, w3, w2)


@dataclass(frozen=True)
class Steps:
    """What is rounded on the way. inputs, hidden: quantisers in front of the two products.

    rounds_products: gate and up are rounded to ``dtype`` before the activation.
    """

    limit: float
    dtype: torch.dtype
    inputs: Callable[[Tensor], Tensor] = as_it_is
    hidden: Callable[[Tensor], Tensor] = as_it_is
    rounds_products: bool = False


def steps_of(op: PlannedOp, stored: Stored, expert: str, limit: float, dtype: torch.dtype) -> Steps:
    """The planned experts' steps."""
    kernel = op.choice.kernel
    first = Step.ROUTING_WEIGHT in kernel.official
    if kernel.runner == "Nvfp4MoEW4A4" or Step.NVFP4_INPUTS in kernel.official:
        x_scale = largest_input_scale(op, [f"{expert}.w1", f"{expert}.w3"], stored)
        h_scale = largest_input_scale(op, [f"{expert}.w2"], stored)
        inputs, hidden = (lambda x: nvfp4_inputs(x, x_scale)), (lambda x: nvfp4_inputs(x, h_scale))
        return Steps(limit, dtype, inputs, hidden, first)
    if Step.FP8_INPUTS in kernel.official:
        return Steps(limit, dtype, fp8_inputs, fp8_inputs, first)
    return Steps(limit, dtype, rounds_products=first)


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """The clamped activation: silu of the gate up to the limit, times up between the limits."""
    gate = gate.clamp(max=limit)
    return gate * torch.sigmoid(gate) * up.clamp(-limit, limit)


def expert(x_SD: Tensor, matrices: Matrices, steps: Steps) -> Exact:
    """w2 swiglu(w1 x, w3 x), not rounded. x: activations in the engine's dtype."""
    rows = steps.inputs(x_SD)
    gate, up = product(rows, matrices.w1), product(rows, matrices.w3)
    if steps.rounds_products:
        gate, up = _rounded(gate, steps.dtype), _rounded(up, steps.dtype)
    hidden = _activated(gate, up, steps.limit)
    middle, error = _kept(hidden, steps)
    down = product(middle, matrices.w2)
    return Exact(down.value, down.bound + independent(error, matrices.w2))


def _rounded(exact: Exact, dtype: torch.dtype) -> Exact:
    """What is left when it is rounded, and what an error before may have made of it."""
    value = exact.value.to(dtype).double()
    ends = ((exact.value + sign * exact.bound).to(dtype).double() for sign in (1, -1))
    low, high = ((end - value).abs() for end in ends)
    return Exact(value, torch.maximum(low, high))


def _activated(gate: Exact, up: Exact, limit: float) -> Exact:
    """Errors die where a clamp cuts them off."""
    value = swiglu(gate.value, up.value, limit)
    gate_error = torch.where(gate.value - gate.bound > limit, 0.0, gate.bound)
    up_error = torch.where(up.value.abs() - up.bound > limit, 0.0, up.bound)
    silu = swiglu(gate.value, torch.ones_like(value), limit).abs()
    spread = SILU_SLOPE * gate_error * (up.value.abs().clamp(max=limit) + up_error) + silu * up_error
    return Exact(value, spread + EXP_STEPS * FLOAT32_ROUND * value.abs())


def _kept(hidden: Exact, steps: Steps) -> tuple[Tensor, Tensor]:
    """Hidden values as the second product reads them, and how far from those a right kernel's may be."""
    sign, size = hidden.value.sign(), hidden.value.abs()

    def read(magnitude: Tensor) -> Tensor:
        return steps.hidden((sign * magnitude).to(steps.dtype)).abs()

    middle = read(size)
    low, high = read((size - hidden.bound).clamp(min=0)), read(size + hidden.bound)
    # A hidden value so small that its error may turn its sign may be off by both.
    crossing = torch.where(hidden.bound > size, middle + high, 0.0)
    return sign * middle, torch.maximum((high - middle).abs(), (middle - low).abs()) + crossing


def output_rounding(exact: Exact, dtype: torch.dtype) -> Tensor:
    """A kernel may round each expert's output before it sums them."""
    return rounding(dtype) * exact.value.abs()
