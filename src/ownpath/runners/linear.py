"""Dense runners: an operand in its planned layout and the kernel that multiplies by it, behind one call."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from ownpath.formats import BF16, FP32, NVFP4
from ownpath.kernels.grouped.ref import grouped_linear
from ownpath.kernels.registry import KERNELS, Kernel
from ownpath.qtensor import QuantTensor
from ownpath.runners.checks import require, require_input
from ownpath.runners.prepare import compile_configs, default_kernel, prepared, restored


class Linear(Protocol):
    """y = x Wᵀ for x [..., K]; y [..., N] in the dtype of x."""

    in_features: int
    out_features: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


Shards = torch.Tensor | Sequence[torch.Tensor]


def _shards(value: Shards) -> tuple[torch.Tensor, ...]:
    return (value,) if isinstance(value, torch.Tensor) else tuple(value)


def _fuse(shards: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """One tensor of all rows; a single shard is used as it is, without a copy."""
    return shards[0] if len(shards) == 1 else torch.cat(shards)


def _plain(weight: torch.Tensor) -> QuantTensor:
    return QuantTensor(weight, None, None, BF16 if weight.dtype == torch.bfloat16 else FP32)


class Nvfp4Linear:
    """W4A16 product with an NVFP4 weight, or with several fused ones that keep their own global scales.

    Shapes: weight uint8 [N, K/2], low nibble = even k (int8 storage is viewed as uint8); weight_scale E4M3
        [N, K/16]; weight_scale_2 float32 [], a multiplier (ModelOpt's convention), or [N], one per output row.
        Lists of these are fused shards: their rows follow each other in y. x [..., K]; y [..., N] in its dtype.
    On a Hopper GPU the operands are taken over: they are repacked in place, so that a weight never exists twice. Pass
    clones of tensors that are needed later. (Fused shards are copied together first and stay as they are.)
    Errors: ValueError naming the operand for a wrong dtype, shape or device.
    Source: NVIDIA ModelOpt's NVFP4 export.
    """

    def __init__(
        self,
        weight: Shards,
        weight_scale: Shards,
        weight_scale_2: Shards,
        *,
        kernel: Kernel | None = None,
    ) -> None:
        weights, scales, globals_ = _shards(weight), _shards(weight_scale), _shards(weight_scale_2)
        if not len(weights) == len(scales) == len(globals_):
            raise ValueError("weight, weight_scale and weight_scale_2 must have the same number of shards")
        for idx, (w, s, g) in enumerate(zip(weights, scales, globals_, strict=True)):
            num_rows, packed = w.shape
            require(f"weight[{idx}]", w, (torch.uint8, torch.int8), (num_rows, weights[0].shape[1]))
            require(f"weight_scale[{idx}]", s, (torch.float8_e4m3fn,), (num_rows, packed // 8))
            require(f"weight_scale_2[{idx}]", g, (torch.float32,), (num_rows,) if g.ndim else ())
        rows = tuple(g.expand(len(w)) for w, g in zip(weights, globals_, strict=True))
        weight = _fuse(weights).view(torch.uint8)
        self.out_features, self.in_features = weight.shape[0], 2 * weight.shape[1]
        self._kernel = default_kernel("nvfp4_linear", weight) if kernel is None else kernel
        self._operand = prepared(self._kernel, weight, _fuse(scales), _fuse(rows))
        self._weight = weight

    def compile_configs(self) -> list[Any]:
        """The kernels that calls may launch, for compiling ahead."""
        return compile_configs(self._kernel, self._operand)

    def stored(self) -> tuple[QuantTensor, ...]:
        """What the kernel holds, read back out of its layout: all shards' rows, and a global scale for each [N]."""
        codes, scale, rows = restored(self._kernel, self._operand)
        return (QuantTensor(codes, scale, rows, NVFP4),)

    def kernel_arguments(self, x: torch.Tensor) -> tuple[Any, ...]:
        """What a call gives the kernel."""
        return x.reshape(-1, self.in_features), *self._operand

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        require_input(x, self.in_features, self._weight)
        y: torch.Tensor = self._kernel(x.reshape(-1, self.in_features), *self._operand)
        return y.view(*x.shape[:-1], self.out_features)


class PlainLinear:
    """Product with an unquantised weight. Shapes: weight bfloat16 or float32 [N, K]; a list is fused shards."""

    def __init__(self, weight: Shards, *, kernel: Kernel = KERNELS["ref.plain_linear"]) -> None:
        weights = _shards(weight)
        for idx, w in enumerate(weights):
            require(f"weight[{idx}]", w, (torch.bfloat16, torch.float32), (len(w), weights[0].shape[1]))
        self.weight = _fuse(weights)
        self.out_features, self.in_features = self.weight.shape
        self._kernel = kernel

    def stored(self) -> tuple[QuantTensor, ...]:
        """What the kernel holds: all shards' rows."""
        return (_plain(self.weight),)

    def kernel_arguments(self, x: torch.Tensor, out_dtype: torch.dtype | None = None) -> tuple[Any, ...]:
        """What a call gives the kernel."""
        return x, self.weight, out_dtype or x.dtype

    def __call__(self, x: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        """y in the dtype of x, or unrounded in a wider ``out_dtype``."""
        require_input(x, self.in_features, self.weight)
        y: torch.Tensor = self._kernel(x, self.weight, out_dtype or x.dtype)
        return y


class WideLinear:
    """A linear whose result is at least float32: sums are kept as they are, not rounded to the dtype of x."""

    def __init__(self, linear: Linear) -> None:
        self.linear = linear
        self.in_features, self.out_features = linear.in_features, linear.out_features

    @property
    def parts(self) -> tuple[Linear, ...]:
        """The runners that it calls."""
        return (self.linear,)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return self.linear(x, wide) if isinstance(self.linear, PlainLinear) else self.linear(x.to(wide))


class ConcatLinear:
    """Several linears on the same input, outputs side by side: a fused slot whose shards are stored differently."""

    def __init__(self, linears: Sequence[Linear]) -> None:
        if len({linear.in_features for linear in linears}) != 1:
            raise ValueError("linears of one slot must take the same number of features")
        self.linears = tuple(linears)
        self.in_features = linears[0].in_features
        self.out_features = sum(linear.out_features for linear in linears)

    @property
    def parts(self) -> tuple[Linear, ...]:
        """The runners that it calls."""
        return self.linears

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([linear(x) for linear in self.linears], dim=-1)


class GroupedLinear:
    """y[..., g] = W[g] x[..., g]: ``wo_a``, one matrix per group of heads, plain floating point.

    Shapes: weight bfloat16 or float32 [G*R, I], groups one after the other; y [..., G, R]. x is [..., G, I]; or, with
        a rotation, attention's output [T, N, H], whose rotary channels are turned back before the product.
    Errors: ValueError for a wrong dtype or shape.
    """

    def __init__(
        self, weight: torch.Tensor, num_groups: int, *, kernel: Kernel = KERNELS["ref.grouped_linear"]
    ) -> None:
        require("weight", weight, (torch.bfloat16, torch.float32), (len(weight), weight.shape[1]))
        if len(weight) % num_groups:
            raise ValueError(f"weight has {len(weight)} rows, not a multiple of {num_groups} groups")
        self.weight_GRI = weight.unflatten(0, (num_groups, -1))
        self.num_groups, self.out_features, self.in_features = self.weight_GRI.shape
        self._kernel = kernel

    def stored(self) -> tuple[QuantTensor, ...]:
        """What the kernel holds: rows of all groups."""
        return (_plain(self.weight_GRI.flatten(0, 1)),)

    def kernel_arguments(self, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> tuple[Any, ...]:
        """What a call with a rotation gives the kernel."""
        return x, *rotation, self.weight_GRI

    def __call__(self, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        """rotation: (cos, sin) float32 [T, A] of each row's angles, to be undone; the planned kernel does both."""
        if rotation is not None:
            return self._turned_back(x, *rotation)
        require_input(x, self.in_features, self.weight_GRI)
        if x.shape[-2] != self.num_groups:
            raise ValueError(f"x has {x.shape[-2]} groups, the weight {self.num_groups}")
        y = grouped_linear(x.flatten(0, -3), self.weight_GRI)
        return y.reshape(*x.shape[:-1], self.out_features)

    def _turned_back(self, o_TNH: torch.Tensor, cos_TA: torch.Tensor, sin_TA: torch.Tensor) -> torch.Tensor:
        if o_TNH.ndim != 3 or o_TNH.shape[1] * o_TNH.shape[2] != self.num_groups * self.in_features:
            width, found = self.num_groups * self.in_features, list(o_TNH.shape)
            raise ValueError(f"heads must be [T, N, H] with N * H = {width}, found {found}")
        require_input(o_TNH, o_TNH.shape[-1], self.weight_GRI)
        y_TGR: torch.Tensor = self._kernel(o_TNH, cos_TA, sin_TA, self.weight_GRI)
        return y_TGR
