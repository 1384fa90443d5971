"""Runners of ``wo_a``: one matrix per group of heads, behind the inverse rotation of attention's output."""

from collections.abc import Sequence

import torch

from ownpath.formats import FP8_BLOCK
from ownpath.kernels.checks import require, require_activations
from ownpath.kernels.contract import Config, GroupedKernel, StoredGroups
from ownpath.kernels.registry import KERNELS
from ownpath.qtensor import QuantTensor
from ownpath.runners.linear import plain_format
from ownpath.runners.ops import HANDLES
from ownpath.runners.runner import KernelOrName, KernelRunner, chosen_spec


class GroupedRunner(KernelRunner):
    """y[..., g] = W[g] x[..., g]: ``wo_a``, one matrix per group of heads, as stored or in plain floating point.

    Shapes: y [..., G, R]. x is [..., G, I]; or, with a rotation, attention's output [T, N, H], whose rotation is undone
    before the product.
    Errors: ValueError naming a tensor that the kernel refuses.
    """

    def __init__(self, kernel: KernelOrName, stored: StoredGroups) -> None:
        self.spec = chosen_spec(kernel)
        self.num_groups, self.out_features, self.in_features = stored.shape
        self.device = stored.matrix.qdata.device
        self.kernel: GroupedKernel[object] = KERNELS[self.spec.name]
        self.operand = self.kernel.prepare(stored)
        self.handle = HANDLES.new(self)

    def stored(self) -> tuple[QuantTensor, ...]:
        """Returns the operand's rows of all groups."""
        return self.kernel.restore(self.operand)

    def padding(self) -> None:
        """Returns ``None``: the layout has no padding."""

    def compile_configs(self) -> Sequence[Config]:
        """Returns the configurations of every kernel compiled to disk that calls may launch."""
        return self.kernel.configs(self.operand)

    def variant(self, o_TNH: torch.Tensor, *_: object) -> str | None:
        """Returns the names of the variants that a call with this input launches; ``None`` without variants."""
        return self.kernel.variant(o_TNH, self.operand)

    def new_out(self, o_TNH: torch.Tensor) -> torch.Tensor:
        """Allocates y [T, G, R]."""
        return o_TNH.new_empty((o_TNH.shape[0], self.num_groups, self.out_features))

    def run(
        self, o_TNH: torch.Tensor, cos_TA: torch.Tensor, sin_TA: torch.Tensor, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Undoes the rotation and multiplies. Errors: ValueError for heads that do not fit."""
        width = self.num_groups * self.in_features
        if o_TNH.ndim != 3 or o_TNH.shape[1] * o_TNH.shape[2] != width:
            raise ValueError(f"heads must be [T, N, H] with N * H = {width}, found {list(o_TNH.shape)}")
        if o_TNH.device != self.device or not o_TNH.is_floating_point():
            require_activations(o_TNH, self.device)
        return self.kernel.run(o_TNH, cos_TA, sin_TA, self.operand, out=out)

    def __call__(self, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        """Multiplies, and with a rotation undoes it first.

        rotation: (cos, sin) float32 [T, A] of each row's angles; none rotates nothing of [T, G, I].
        """
        if rotation is None:
            if x.shape[-2:] != (self.num_groups, self.in_features):
                raise ValueError(f"x must be [..., {self.num_groups}, {self.in_features}], found {list(x.shape)}")
            rows = x.flatten(0, -3)
            no_angles = torch.empty(len(rows), 0, device=x.device)
            return self(rows, (no_angles, no_angles)).reshape(*x.shape[:-1], self.out_features)
        if torch.compiler.is_compiling():
            y_TGR: torch.Tensor = torch.ops.ownpath.grouped_linear(x, *rotation, self.handle)
            return y_TGR
        return self.run(x, *rotation)


class GroupedLinear(GroupedRunner):
    """``GroupedRunner`` for plain floating point. Shapes: weight bfloat16 or float32 [G*R, I], group after group.

    Errors: ValueError for a wrong dtype or shape.
    """

    def __init__(self, weight: torch.Tensor, num_groups: int, *, kernel: KernelOrName = "ref.grouped_linear") -> None:
        require("weight", weight, (torch.bfloat16, torch.float32), (len(weight), weight.shape[1]))
        _require_groups(weight, num_groups)
        super().__init__(kernel, StoredGroups(QuantTensor(weight, None, None, plain_format(weight)), num_groups))


class Fp8GroupedLinear(GroupedRunner):
    """``GroupedRunner`` for FP8 weights, on Hopper. Shapes: weight E4M3 [G*R, I]; scale as ``Fp8Linear``.

    Errors: ValueError for a wrong dtype, shape or device.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        scale: torch.Tensor,
        num_groups: int,
        *,
        kernel: KernelOrName = "cute.grouped_linear_fp8_sm90",
    ) -> None:
        num_rows, width = weight.shape
        require("weight", weight, (torch.float8_e4m3fn,), (num_rows, width))
        require("scale", scale, (torch.float8_e8m0fnu, torch.float32), (-(-num_rows // 128), -(-width // 128)))
        _require_groups(weight, num_groups)
        super().__init__(kernel, StoredGroups(QuantTensor(weight, scale, None, FP8_BLOCK), num_groups))


def _require_groups(weight: torch.Tensor, num_groups: int) -> None:
    if len(weight) % num_groups:
        raise ValueError(f"weight has {len(weight)} rows, not a multiple of {num_groups} groups")
