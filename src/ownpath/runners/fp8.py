"""``Fp8Linear``: E4M3 weights in 128 x 128 blocks, by the torch reference or by the Hopper kernels."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ownpath.formats import FP8_BLOCK
from ownpath.kernels.fp8.layout import PackedFp8, fp8_padding, restore_fp8
from ownpath.kernels.registry import KERNELS, Kernel
from ownpath.qtensor import QuantTensor
from ownpath.runners.checks import require

Shards = torch.Tensor | Sequence[torch.Tensor]

DEFAULT_WORKSPACE_ROWS = 2048
_HOPPER = (9, 0)


def _shards(value: Shards) -> tuple[torch.Tensor, ...]:
    return (value,) if isinstance(value, torch.Tensor) else tuple(value)


def default_fp8_kernel(device: torch.device) -> Kernel:
    """What a plan chooses as well: the Hopper kernels on a Hopper GPU, elsewhere the torch reference."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) == _HOPPER:
        return KERNELS["cute.fp8_linear_sm90"]
    return KERNELS["ref.fp8_linear"]


class Fp8Linear:
    """Product with E4M3 weights in 128x128 blocks, one or several fused ones that keep their own grids of scales.

    With the torch reference: W8A16. With ``cute.fp8_linear_sm90``: W8A16 for fewer rows than the kernel's
    ``prefill_from``, W8A8 (activations quantised 1 x 128 on the fly) from there; the weights are repacked at
    construction, so the tensors given are not needed afterwards.

    Shapes: weight E4M3 [N, K]; scale E8M0 or float32 [ceil(N/128), ceil(K/128)]; lists are fused shards, a shard's
        last block may hold fewer than 128 rows. workspace: uint8, for the quantised activations of W8A8; it may be
        shared by all linears of one stream. Rows that do not fit it are taken in turns. By default, 2048 rows.
    Errors: ValueError naming the operand for a wrong dtype, shape, device, stride or alignment.
    """

    def __init__(
        self, weight: Shards, scale: Shards, *, kernel: Kernel | None = None, workspace: torch.Tensor | None = None
    ) -> None:
        weights, scales = _shards(weight), _shards(scale)
        if len(weights) != len(scales):
            raise ValueError(f"{len(weights)} weights with {len(scales)} scales")
        for idx, (w, s) in enumerate(zip(weights, scales, strict=True)):
            num_rows, width = w.shape
            require(f"weight[{idx}]", w, (torch.float8_e4m3fn,), (num_rows, weights[0].shape[1]))
            blocks = (-(-num_rows // 128), -(-width // 128))
            require(f"scale[{idx}]", s, (torch.float8_e8m0fnu, torch.float32), blocks)
        self.shard_rows = tuple(len(w) for w in weights)
        self.out_features, self.in_features = sum(self.shard_rows), weights[0].shape[1]
        self._device = weights[0].device
        chosen: Any = default_fp8_kernel(weights[0].device) if kernel is None else kernel
        self._kernel = chosen
        self._is_packed = hasattr(chosen, "pack")
        self.shards: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
        if self._is_packed:
            self.operand: PackedFp8 = chosen.pack(weights, scales)
            # Kernels read weights before they wait for their predecessor: packing must be over by then.
            torch.cuda.synchronize(self._device)
            self.workspace = self._workspace(workspace)
        else:
            self.shards = tuple(zip(weights, scales, strict=True))

    def _workspace(self, given: torch.Tensor | None) -> torch.Tensor:
        needed = self._kernel.workspace_bytes(self.operand, 1)
        if given is None:
            num_bytes = self._kernel.workspace_bytes(self.operand, DEFAULT_WORKSPACE_ROWS)
            return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        if given.dtype != torch.uint8 or not given.is_contiguous() or given.device != self._device:
            raise ValueError(f"workspace must be contiguous uint8 on {self._device}")
        if given.numel() < needed or given.data_ptr() % 128:
            raise ValueError(f"workspace must hold {needed} bytes at a 128-byte aligned address, found {given.numel()}")
        return given

    def compile_configs(self) -> Iterator[Any]:
        """The compile-time configurations of every kernel that a call may launch."""
        return iter(self._kernel.configs(self.operand) if self._is_packed else ())

    def stored(self) -> tuple[QuantTensor, ...]:
        """What the kernel holds, read back out of its layout: a matrix and its grid of scales for each shard."""
        shards = restore_fp8(self.operand, self.shard_rows) if self._is_packed else self.shards
        return tuple(QuantTensor(weight, scale, None, FP8_BLOCK) for weight, scale in shards)

    def padding(self) -> torch.Tensor | None:
        """Bytes that the kernel may read beyond the matrix; None: its layout has none."""
        return fp8_padding(self.operand) if self._is_packed else None

    def kernel_arguments(self, x: torch.Tensor) -> tuple[Any, ...]:
        """What a call gives a kernel that packs."""
        return x.flatten(0, -2), self.operand, self.workspace

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._is_packed:
            return self._packed_product(x)
        self._check(x)
        rows = x.flatten(0, -2)
        y = [self._kernel(rows, weight, scale) for weight, scale in self.shards]
        fused: torch.Tensor = y[0] if len(y) == 1 else torch.cat(y, dim=-1)
        return fused.view(*x.shape[:-1], self.out_features)

    def _check(self, x: torch.Tensor) -> None:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x has {x.shape[-1]} features, the weight takes {self.in_features}")
        if not x.is_floating_point():
            raise ValueError(f"x must be floating point, found {x.dtype}")
        if x.device != self._device:
            raise ValueError(f"x is on {x.device}, the weight on {self._device}")

    def _packed_product(self, x: torch.Tensor) -> torch.Tensor:
        self._check(x)
        if x.dtype != torch.bfloat16:
            raise ValueError(f"x must be torch.bfloat16 for the Hopper kernels, found {x.dtype}")
        rows = x if x.ndim == 2 else x.flatten(0, -2)
        if rows.stride(-1) != 1 or rows.stride(0) % 8 or rows.data_ptr() % 16:
            raise ValueError("x must have contiguous features and rows that start at 16-byte aligned addresses")
        y = torch.empty(*x.shape[:-1], self.out_features, dtype=x.dtype, device=x.device)
        if len(rows):
            self._kernel(rows, self.operand, y.view(len(rows), self.out_features), self.workspace)
        return y
