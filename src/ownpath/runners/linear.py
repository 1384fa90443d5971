"""Runners of dense products."""

from collections.abc import Sequence
from typing import Protocol

import torch

from ownpath.formats import BF16, FP8_BLOCK, FP32, NVFP4, Format
from ownpath.kernels.checks import require
from ownpath.kernels.contract import Config, LinearKernel, StoredLinear
from ownpath.kernels.registry import KERNELS
from ownpath.numerics import fake_quantize_fp8, nvfp4_codes_times_scales
from ownpath.ops import OpKind
from ownpath.qtensor import QuantTensor
from ownpath.runners.ops import HANDLES
from ownpath.runners.runner import KernelOrName, KernelRunner, Runner, chosen_spec, default_spec

Shards = torch.Tensor | Sequence[torch.Tensor]
PACKED = (torch.uint8, torch.int8)
INPUT_BLOCK = 128
"""Columns of an FP8 weight's input that share a scale in official numerics."""


class Linear(Protocol):
    """y = x Wᵀ for x [..., K]; y [..., N] in the dtype of x."""

    in_features: int
    out_features: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


class LinearRunner(KernelRunner):
    """Product with one stored matrix, or with several fused ones whose rows follow each other in y.

    The runner takes ownership of the stored tensors: the kernel may repack them in place.
    Errors: ValueError naming a tensor that the kernel refuses.
    """

    def __init__(self, kernel: KernelOrName, stored: StoredLinear) -> None:
        self.spec = chosen_spec(kernel)
        self.out_features, self.in_features = stored.shape
        self.kernel: LinearKernel[object] = KERNELS[self.spec.name]
        self.operand = self.kernel.prepare(stored)
        self.handle = HANDLES.new(self)

    def run(
        self, x: torch.Tensor, *, out: torch.Tensor | None = None, workspace: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Computes y [..., N] in the dtype of x. With ``out`` and ``workspace`` the call allocates nothing.

        Errors: ValueError naming what is wrong with x, out or workspace.
        """
        return self.kernel.run(x, self.operand, out=out, workspace=workspace)

    def run_wide(self, x: torch.Tensor) -> torch.Tensor:
        """Computes y [..., N] in at least float32. Errors: ValueError naming what is wrong with x."""
        return self.kernel.run_wide(x, self.operand)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            y: torch.Tensor = torch.ops.ownpath.linear(x, self.handle)
            return y
        return self.kernel.run(x, self.operand)

    def wide(self, x: torch.Tensor) -> torch.Tensor:
        """Computes ``run_wide``, through the torch operation while torch compiles."""
        if torch.compiler.is_compiling():
            y: torch.Tensor = torch.ops.ownpath.linear_wide(x, self.handle)
            return y
        return self.kernel.run_wide(x, self.operand)

    def workspace(self, num_tokens: int) -> torch.Tensor | None:
        """Allocates uint8 scratch for calls of up to ``num_tokens`` rows; ``None`` if the kernel needs none."""
        return self.kernel.workspace(self.operand, num_tokens)

    def stored(self) -> tuple[QuantTensor, ...]:
        """Returns the shards, read back from the operand; a kernel that fuses shards returns one matrix."""
        return self.kernel.restore(self.operand)

    def padding(self) -> torch.Tensor | None:
        """Returns the padding bytes of the kernel's layout; ``None`` if it has none."""
        return self.kernel.padding(self.operand)

    def compile_configs(self) -> Sequence[Config]:
        """Returns the configurations of every kernel compiled to disk that calls may launch."""
        return self.kernel.configs(self.operand)

    def variant(self, x: torch.Tensor, *_: object) -> str | None:
        """Returns the names of the variants that a call with this x launches; ``None`` without variants."""
        return self.kernel.variant(x, self.operand)


def _as_list(value: Shards) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else list(value)


def _nvfp4_shards(weight: Shards, weight_scale: Shards, weight_scale_2: Shards) -> tuple[QuantTensor, ...]:
    """Pairs weights and scales into shards. Errors: ValueError naming the operand for a wrong dtype or shape."""
    weights, scales, globals_ = _as_list(weight), _as_list(weight_scale), _as_list(weight_scale_2)
    if not len(weights) == len(scales) == len(globals_):
        raise ValueError("weight, weight_scale and weight_scale_2 must have the same number of shards")
    for idx, (w, s, g) in enumerate(zip(weights, scales, globals_, strict=True)):
        num_rows, packed = w.shape
        require(f"weight[{idx}]", w, PACKED, (num_rows, weights[0].shape[1]))
        require(f"weight_scale[{idx}]", s, (torch.float8_e4m3fn,), (num_rows, packed // 8))
        require(f"weight_scale_2[{idx}]", g, (torch.float32,), (num_rows,) if g.ndim else ())
    return tuple(
        QuantTensor(w.view(torch.uint8), s, g, NVFP4) for w, s, g in zip(weights, scales, globals_, strict=True)
    )


class Nvfp4Linear(LinearRunner):
    """W4A16 product with an NVFP4 weight, or with several fused ones that keep their own global scales.

    Shapes: weight uint8 [N, K/2], low nibble = even k (int8 storage is viewed as uint8); weight_scale E4M3
        [N, K/16]; weight_scale_2 float32 [], a multiplier (ModelOpt's convention), or [N], one per output row.
        Lists of these are fused shards: their rows follow each other in y. x [..., K]; y [..., N] in its dtype.
    On a Hopper GPU the runner takes ownership of its operands: they are repacked in place, so that a weight never
    exists twice. Pass clones of tensors that are needed later. (Fused shards are copied together first and stay
    unchanged.)
    Errors: ValueError naming the operand for a wrong dtype, shape or device.
    Source: NVIDIA ModelOpt's NVFP4 export.
    """

    def __init__(
        self, weight: Shards, weight_scale: Shards, weight_scale_2: Shards, *, kernel: KernelOrName | None = None
    ) -> None:
        shards = _nvfp4_shards(weight, weight_scale, weight_scale_2)
        chosen = default_spec(OpKind.LINEAR, NVFP4, shards[0].qdata.device) if kernel is None else kernel
        super().__init__(chosen, StoredLinear(shards))


class Nvfp4LinearW4A4(LinearRunner):
    """W4A4, for Blackwell: product of an NVFP4 weight, or several fused ones, with activations quantised to NVFP4.

    Shapes: as ``Nvfp4Linear``, and input_scale float32 [] or [shards], a multiplier. The input is quantised once, with
        the largest input scale. x bfloat16 [..., K]; y bfloat16 [..., N].
    Errors: ValueError naming the operand for a wrong dtype, shape or device, K not a multiple of 64, or a scale that
        is not finite and positive; ProofError when the kernel differs from its twin on this device.
    """

    def __init__(
        self,
        weight: Shards,
        weight_scale: Shards,
        weight_scale_2: Shards,
        input_scale: Shards,
        *,
        kernel: KernelOrName = "triton.nvfp4_linear_w4a4_sm100",
    ) -> None:
        shards = _nvfp4_shards(weight, weight_scale, weight_scale_2)
        largest = torch.stack([scale.max() for scale in _as_list(input_scale)]).max()
        require("input_scale", largest, (torch.float32,), ())
        super().__init__(kernel, StoredLinear(shards, largest))


class Fp8Linear(LinearRunner):
    """Product with E4M3 weights in 128x128 blocks, one or several fused ones that keep their own grids of scales.

    With the torch reference: W8A16. With ``cute.fp8_linear_sm90``: W8A16 for few rows, W8A8 (activations quantised
    1 x 128 on the fly) from the number of rows that its spec names; the weights are repacked into a copy, so the
    tensors given are not needed afterwards.

    Shapes: weight E4M3 [N, K]; scale E8M0 or float32 [ceil(N/128), ceil(K/128)]; lists are fused shards, a shard's
        last block may hold fewer than 128 rows.
    Errors: ValueError naming the operand for a wrong dtype, shape, device, stride or alignment.
    """

    def __init__(self, weight: Shards, scale: Shards, *, kernel: KernelOrName | None = None) -> None:
        weights, scales = _as_list(weight), _as_list(scale)
        if len(weights) != len(scales):
            raise ValueError(f"{len(weights)} weights with {len(scales)} scales")
        for idx, (w, s) in enumerate(zip(weights, scales, strict=True)):
            num_rows, width = w.shape
            require(f"weight[{idx}]", w, (torch.float8_e4m3fn,), (num_rows, weights[0].shape[1]))
            blocks = (-(-num_rows // 128), -(-width // 128))
            require(f"scale[{idx}]", s, (torch.float8_e8m0fnu, torch.float32), blocks)
        shards = tuple(QuantTensor(w, s, None, FP8_BLOCK) for w, s in zip(weights, scales, strict=True))
        chosen = default_spec(OpKind.LINEAR, FP8_BLOCK, weights[0].device) if kernel is None else kernel
        super().__init__(chosen, StoredLinear(shards))


class PlainLinear(LinearRunner):
    """Product with an unquantised weight. Shapes: weight bfloat16 or float32 [N, K]; a list is fused shards."""

    def __init__(self, weight: Shards, *, kernel: KernelOrName = "ref.plain_linear") -> None:
        weights = _as_list(weight)
        for idx, w in enumerate(weights):
            require(f"weight[{idx}]", w, (torch.bfloat16, torch.float32), (len(w), weights[0].shape[1]))
        super().__init__(kernel, StoredLinear(tuple(QuantTensor(w, None, None, plain_format(w)) for w in weights)))


def plain_format(weight: torch.Tensor) -> Format:
    """Returns the format of an unquantised weight."""
    return BF16 if weight.dtype == torch.bfloat16 else FP32


class QuantizedLinear(LinearRunner):
    """A linear whose input is quantised and read back before the product; any activation dtype holds it exactly.

    FP8 weights: W8A8, E4M3 with a power-of-two scale per 1 x 128; a kernel that rounds its input so is left to do it,
    as rounding twice is rounding once. NVFP4 weights: W4A4 by a W4A16 kernel; the input's global scale (the largest of
    the shards') is multiplied into the weights' global scales.
    """

    def __init__(self, kernel: KernelOrName, stored: StoredLinear) -> None:
        self.input_scale = stored.input_scale
        if self.input_scale is not None:
            stored = StoredLinear(tuple(_scale_shard(shard, self.input_scale) for shard in stored.shards))
        super().__init__(kernel, stored)

    def quantize_input(self, x: torch.Tensor) -> torch.Tensor:
        """Quantises x and reads it back, without the global scale that is part of the weights'."""
        if self.input_scale is None:
            return fake_quantize_fp8(x, INPUT_BLOCK)
        return nvfp4_codes_times_scales(x.reshape(-1, x.shape[-1]), self.input_scale).view(x.shape)

    def run(
        self, x: torch.Tensor, *, out: torch.Tensor | None = None, workspace: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Computes as ``LinearRunner`` does, on the quantised x."""
        if self.input_scale is None and self.kernel.rounds_to_powers(self.operand, x.numel() // x.shape[-1]):
            return super().run(x, out=out, workspace=workspace)
        return super().run(self.quantize_input(x), out=out, workspace=workspace)

    def run_wide(self, x: torch.Tensor) -> torch.Tensor:
        """Computes as ``LinearRunner`` does, on the quantised x."""
        return super().run_wide(self.quantize_input(x.to(torch.promote_types(x.dtype, torch.float32))))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return super().__call__(x)
        return self.run(x)

    def wide(self, x: torch.Tensor) -> torch.Tensor:
        """Computes ``run_wide``, through the torch operation while torch compiles."""
        if torch.compiler.is_compiling():
            return super().wide(x)
        return self.run_wide(x)


def _scale_shard(shard: QuantTensor, input_scale: torch.Tensor) -> QuantTensor:
    assert shard.global_scale is not None
    return QuantTensor(shard.qdata, shard.scale, shard.global_scale * input_scale, shard.format)


class WideLinear(Runner):
    """A linear whose result is at least float32: sums are not rounded to the dtype of x."""

    def __init__(self, linear: LinearRunner) -> None:
        self.linear = linear
        self.in_features, self.out_features = linear.in_features, linear.out_features

    @property
    def leaves(self) -> tuple[KernelRunner, ...]:
        """The linear's leaves."""
        return self.linear.leaves

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear.wide(x)

    def wide(self, x: torch.Tensor) -> torch.Tensor:
        """Computes the same."""
        return self.linear.wide(x)


class ConcatLinear(Runner):
    """Several linears on the same input, outputs concatenated: a fused slot whose shards have different encodings."""

    def __init__(self, linears: Sequence[LinearRunner | WideLinear]) -> None:
        if len({linear.in_features for linear in linears}) != 1:
            raise ValueError("linears of one slot must take the same number of features")
        self.linears = tuple(linears)
        self.in_features = linears[0].in_features
        self.out_features = sum(linear.out_features for linear in linears)

    @property
    def leaves(self) -> tuple[KernelRunner, ...]:
        """All linears' leaves."""
        return tuple(leaf for linear in self.linears for leaf in linear.leaves)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([linear(x) for linear in self.linears], dim=-1)

    def wide(self, x: torch.Tensor) -> torch.Tensor:
        """Computes y in at least float32."""
        return torch.cat([linear.wide(x) for linear in self.linears], dim=-1)
