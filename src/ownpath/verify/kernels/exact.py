"""Products in float64 from the stored weights, with the activations that the planned kernel really multiplies.

Legend: M rows, K in, N out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ownpath.kernels.fp8.spec import PREFILL_FROM
from ownpath.plan.plan import PlannedOp
from ownpath.verify.kernels.codes import fp8_float_scales, nvfp4_inputs
from ownpath.verify.kernels.compare import Exact
from ownpath.verify.kernels.limits import FP8_TENSOR_CORE, SPREAD, summing
from ownpath.verify.reference.rounding import fp8
from ownpath.verify.reference.stored import Stored

Quantize = Callable[[Tensor], Tensor]
ROUNDED_AT_LOAD = ("PlainLinear", "GroupedLinear")
"""Runners that may bring a weight to the activations' dtype before they multiply."""


INPUT_BLOCK = 128
ROWS_AT_ONCE = 8192


def as_it_is(x: Tensor) -> Tensor:
    """What W4A16 and W8A16 multiply."""
    return x.double()


def fp8_inputs(x: Tensor) -> Tensor:
    """What W8A8 multiplies where scales are powers of two."""
    return fp8(x, INPUT_BLOCK)


@dataclass(frozen=True)
class Inputs:
    """What a kernel makes of its activations. from_rows: from how many rows of a call on. slack: of the sums, more."""

    quantize: Quantize = as_it_is
    from_rows: int = 1
    slack: float = 0.0


def inputs_of(op: PlannedOp, stored: Stored) -> tuple[Inputs, ...]:
    """How a planned dense product reads its activations, by the number of rows; ascending."""
    kernel = op.choice.kernel
    if kernel.runner == "QuantizedFp8Linear":
        return _w8a8_from(kernel.name, Inputs(fp8_inputs), fp8_inputs)
    if kernel.runner in ("QuantizedNvfp4Linear", "Nvfp4LinearW4A4"):
        scale = largest_input_scale(op, [module.name for module in op.spec.modules], stored)
        return (Inputs(lambda x: nvfp4_inputs(x, scale)),)
    is_e8m0 = all(_has_power_scales(op, module.name, stored) for module in op.spec.modules)
    return _w8a8_from(kernel.name, Inputs(), fp8_inputs if is_e8m0 else fp8_float_scales)


def _w8a8_from(kernel: str, few: Inputs, quantize: Quantize) -> tuple[Inputs, ...]:
    if kernel != "cute.fp8_linear_sm90":
        return (few,)
    return few, Inputs(quantize, PREFILL_FROM, FP8_TENSOR_CORE)


def _has_power_scales(op: PlannedOp, module: str, stored: Stored) -> bool:
    if not any(part.role == "scale" for part in op.encoding.parts):
        return True
    return stored.index[op.encoding.key(module, "scale")].dtype == "F8_E8M0"


def largest_input_scale(op: PlannedOp, modules: Sequence[str], stored: Stored) -> Tensor:
    """Fused modules share an input, quantised once with the largest of their scales."""
    scales = [stored.input_scale(module, op.encoding) for module in modules]
    return torch.stack([scale for scale in scales if scale is not None]).amax().float()


def weight_of(op: PlannedOp, stored: Stored) -> Tensor:
    """The fused matrix of a dense op, float64 [N, K]."""
    parts = [stored.matrix(module.name, op.encoding) for module in op.spec.modules]
    return parts[0] if len(parts) == 1 else torch.cat(parts)  # cat copies even a single one


def product(x_MK: Tensor, weight_NK: Tensor, slack: float = 0.0) -> Exact:
    """x Wᵀ of float64 rows, and what its float32 sums may be off by."""
    # In parts: the head of a large model is 4 GB in float64, and one copy of it is enough.
    magnitude = torch.cat([x_MK.abs() @ part.abs().T for part in weight_NK.split(ROWS_AT_ONCE)], -1)
    return Exact(x_MK @ weight_NK.T, magnitude * (summing(x_MK.shape[-1]) + slack))


def loss_at_load(op: PlannedOp, weight_NK: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What bringing the weight to ``dtype`` changes, for kernels that do; ``None``: nothing."""
    if op.spec.is_wide or op.choice.kernel.runner not in ROUNDED_AT_LOAD:
        return None
    lost = (weight_NK - weight_NK.to(dtype).double()).abs()
    return lost if bool(lost.any()) else None


def independent(errors_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """What a product is off by when its inputs are off by as much, each for itself: [M, N]."""
    return SPREAD * (errors_MK.square() @ weight_NK.square().T).sqrt()
