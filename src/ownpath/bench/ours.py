"""This package's runners as contenders, through the public API: with the device's default kernel or a named one."""

from collections.abc import Sequence

import torch

from ownpath.bench.contender import (
    SWIGLU_LIMIT,
    W4A4_MAX_REL_L2,
    W4A8_MOE_MAX_REL_L2,
    W4A16_MAX_REL_L2,
    W8A8_MAX_REL_L2,
    LinearCall,
    Missing,
    MoeCall,
)
from ownpath.bench.operands import Fp8Operands, MoeOperands, Nvfp4Operands
from ownpath.formats import Format
from ownpath.kernels.registry import SPECS
from ownpath.kernels.spec import InputRounding, KernelSpec
from ownpath.loading import device_caps
from ownpath.official import PLAIN, Step
from ownpath.ops import OpKind
from ownpath.plan.select import Choice, Demands, select
from ownpath.runners import Fp8Linear, Nvfp4Linear, Nvfp4LinearW4A4, Nvfp4MoE, Nvfp4MoEW4A4

_MAX_REL_L2 = {
    InputRounding.EXACT: W4A16_MAX_REL_L2,
    InputRounding.E4M3: W8A8_MAX_REL_L2,
    InputRounding.E4M3_POWER_OF_TWO: W8A8_MAX_REL_L2,
    InputRounding.NVFP4: W4A4_MAX_REL_L2,
}
_INPUT_SCALE = 2.0**-9
"""Input scale for activations of unit variance: the largest value is 6 x 448 times it, 5.25."""


class _OwnSystem:
    """Base class of our contenders. kernel: ``None`` for the runner's default, under the name "ownpath"."""

    is_peer = False
    default_max_rel_l2 = W4A16_MAX_REL_L2

    def __init__(self, kernel: KernelSpec | None = None) -> None:
        self.kernel = kernel
        self.name = "ownpath" if kernel is None else kernel.name
        self.max_rel_l2 = self.default_max_rel_l2 if kernel is None else _MAX_REL_L2[kernel.rounding]

    def missing(self, device: str) -> Missing | None:
        """Returns None: the default runs everywhere, and a named kernel was chosen because it runs here."""
        return None

    @property
    def is_w4a4(self) -> bool:
        return self.kernel is not None and self.kernel.rounding is InputRounding.NVFP4


def own_kernels(kind: OpKind, stored: Format | None, device: str) -> list[KernelSpec]:
    """Returns the kernels that run on a device with bfloat16 activations, best first: of operations on weights those of
    plain numerics, and of experts with E4M3 inputs; of the others all."""
    caps = device_caps(device)

    def runs(spec: KernelSpec) -> bool:
        is_asked = stored is None or spec.official == {Step.FP8_EXPERTS}
        steps = spec.official if is_asked else PLAIN
        return isinstance(select(kind, stored, caps, (spec,), Demands("bfloat16", official=steps), steps=steps), Choice)

    return [spec for spec in SPECS if runs(spec)]


class OwnMoe(_OwnSystem):
    """``ownpath.Nvfp4MoE``, or ``Nvfp4MoEW4A4`` around a kernel that quantises activations."""

    def __init__(self, kernel: KernelSpec | None = None) -> None:
        super().__init__(kernel)
        if kernel is not None and kernel.rounding is InputRounding.E4M3_POWER_OF_TWO:
            self.max_rel_l2 = W4A8_MOE_MAX_REL_L2

    def prepare(self, operands: MoeOperands, num_tokens: Sequence[int], top_k: int) -> MoeCall:
        own = operands.clone()
        w13, w2 = (own.w13, own.w13_scale, own.w13_scale_2), (own.w2, own.w2_scale, own.w2_scale_2)
        if self.kernel is not None and self.is_w4a4:
            scale = torch.full_like(own.w2_scale_2, _INPUT_SCALE)
            return Nvfp4MoEW4A4((*w13, scale), (*w2, scale), SWIGLU_LIMIT, kernel=self.kernel)
        return Nvfp4MoE(*w13, *w2, swiglu_limit=SWIGLU_LIMIT, kernel=self.kernel)


class OwnNvfp4Linear(_OwnSystem):
    """``ownpath.Nvfp4Linear``, or ``Nvfp4LinearW4A4`` around a kernel that quantises activations."""

    def prepare(self, operands: Nvfp4Operands, num_rows: Sequence[int]) -> LinearCall:
        own = operands.clone()
        parts = own.weight, own.weight_scale, own.weight_scale_2
        if self.kernel is not None and self.is_w4a4:
            scale = torch.full_like(own.weight_scale_2, _INPUT_SCALE)
            return Nvfp4LinearW4A4(*parts, scale, kernel=self.kernel)
        return Nvfp4Linear(*parts, kernel=self.kernel)


class OwnFp8Linear(_OwnSystem):
    """``ownpath.runners.Fp8Linear``: W8A16, or W8A8 for many rows."""

    default_max_rel_l2 = W8A8_MAX_REL_L2

    def prepare(self, operands: Fp8Operands, num_rows: Sequence[int]) -> LinearCall:
        own = operands.clone()
        return Fp8Linear(own.weight, own.scale, kernel=self.kernel)
