"""Reads and converts the tensors of one step and names them as ModelOpt does."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.schema import MODELOPT_NVFP4, Encoding
from ownpath.formats import MXFP4
from ownpath.numerics import dequantize, mxfp4_as_nvfp4, nvfp4_global_scale, quantize_nvfp4
from ownpath.qtensor import QuantTensor
from ownpath.quantize.steps import Carry, Convert, WriteStep

UNCALIBRATED = 1.0
"""``input_scale`` without calibration: block scales then cover activations from 0.01 to 2688.
Runners with BF16 activations do not read it."""

Read = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class Counts:
    """Counts of blocks of 32 MXFP4 values that were cast, of those that had to be rounded, and of quantised weights."""

    num_cast: int = 0
    num_rounded: int = 0
    num_quantized: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.num_cast + other.num_cast,
            self.num_rounded + other.num_rounded,
            self.num_quantized + other.num_quantized,
        )


def step_tensors(
    step: WriteStep, read: Read, input_scales: Mapping[str, float]
) -> tuple[dict[str, torch.Tensor], Counts]:
    """Returns the tensors that a step writes. input_scales: by module; without one, a module is uncalibrated.

    Errors: CheckpointError naming the weight.
    """
    if isinstance(step, Carry):
        return {step.key: read(step.key)}, Counts()
    try:
        weights, counts = _convert(step, [stored_weight(step.source, module.name, read) for module in step.modules])
    except ValueError as error:
        raise CheckpointError(f"{' and '.join(module.name for module in step.modules)}: {error}") from None
    return dict(_named(step, weights, input_scales)), counts


def stored_weight(source: Encoding, module: str, read: Read) -> QuantTensor:
    """Reads a weight as the source stores it; packed codes become bytes."""
    parts = {part.role: read(f"{module}.{part.suffix}") for part in source.parts}
    is_packed = source.format.packed_per_byte > 1
    codes = parts["qdata"].view(torch.uint8) if is_packed else parts["qdata"]
    return QuantTensor(codes, parts.get("scale"), None, source.format)


def _convert(step: Convert, stored: list[QuantTensor]) -> tuple[list[QuantTensor], Counts]:
    if step.source.format is MXFP4:
        weights, num_rounded = mxfp4_as_nvfp4(stored)
        return weights, Counts(num_cast=sum(w.scale.numel() for w in stored if w.scale is not None),
                               num_rounded=num_rounded)  # fmt: skip
    values = [dequantize(weight) for weight in stored]
    shared = torch.stack(
        [nvfp4_global_scale(value) for value in values if bool((value != 0).any())] or [torch.ones(())]
    )
    weights = [quantize_nvfp4(value, shared.max()) for value in values]
    return weights, Counts(num_quantized=len(weights))


def _named(
    step: Convert, weights: list[QuantTensor], input_scales: Mapping[str, float]
) -> Iterator[tuple[str, torch.Tensor]]:
    for module, weight in zip(step.modules, weights, strict=True):
        input_scale = torch.tensor(input_scales.get(module.name, UNCALIBRATED))
        yield from MODELOPT_NVFP4.encode(module.name, weight, input_scale)
