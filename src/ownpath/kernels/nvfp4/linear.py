"""``cute.nvfp4_linear``: one dense NVFP4 product as a call. Its kernel: ``gemm_sm90``."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ownpath.kernels.nvfp4 import launch
from ownpath.kernels.nvfp4.choose import LinearChoice, choose_linear
from ownpath.kernels.nvfp4.config import GemmConfig
from ownpath.kernels.nvfp4.layout import check_scales, pack_weight_, plain_rows, unpack_weight

ROW_MULTIPLE, COL_MULTIPLE = 64, 128
TOKEN_COUNTS = (1, 16, 32, 64, 128, 512, 2048)
"""One number of tokens for each kernel that ``choose_linear`` may pick, except for tile widths of long prompts."""


@dataclass(frozen=True)
class LinearOperand:
    """A packed weight. schedule: unused by dense products, but a kernel's argument."""

    weight: launch.PackedWeight
    schedule: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.num_rows, self.weight.num_cols


class Nvfp4LinearKernel:
    """Packs weights in place and multiplies by them. is_batch_invariant: K is never split, whatever the batch."""

    def __init__(self, is_batch_invariant: bool, choose: Callable[..., LinearChoice] = choose_linear) -> None:
        self.is_batch_invariant = is_batch_invariant
        self._choose = choose

    def prepare(self, weight: torch.Tensor, scale: torch.Tensor, global_scale: torch.Tensor) -> LinearOperand:
        """Repacks in place: weight and scale afterwards hold the kernel's layout.

        Shapes: weight uint8 [N, K/2], scale E4M3 [N, K/16], global_scale float32 [N]; contiguous, on one CUDA device.
        Errors: ValueError naming the operand for sizes that are not multiples of 64 and 128, or a bad block scale.
        """
        num_rows, num_cols = weight.shape[0], 2 * weight.shape[1]
        if num_rows % ROW_MULTIPLE or num_cols % COL_MULTIPLE:
            raise ValueError(f"weight is [{num_rows}, {num_cols}]: rows must be a multiple of 64, columns of 128")
        require_packable("weight", weight)
        require_packable("weight_scale", scale)
        check_scales("weight_scale", scale)
        pack_weight_(weight, scale, plain_rows(num_rows).to(weight.device))
        per_row = global_scale.contiguous()
        # Kernels read weights before they wait for their predecessor: what wrote them must be over by then.
        torch.cuda.synchronize(weight.device)
        packed = launch.PackedWeight(weight, scale, per_row, num_rows, num_cols)
        return LinearOperand(packed, torch.zeros(4, dtype=torch.int32, device=weight.device))

    def restore(self, operand: LinearOperand) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What ``prepare`` took, read back out of the layout (``unpack_weight`` says what zero scales become)."""
        weight = operand.weight
        rows = plain_rows(weight.num_rows).to(weight.codes.device)
        return (*unpack_weight(weight.codes, weight.scales, rows, weight.num_cols), weight.global_scale)

    def configs(self, operand: LinearOperand) -> list[GemmConfig]:
        """Every kernel that a call may launch."""
        counts = (*TOKEN_COUNTS, *range(2048, 8193, 512))
        chosen = (self._choose(count, *operand.shape, self.is_batch_invariant).gemm for count in counts)
        return list({config.name: config for config in chosen}.values())

    def variant(self, x: torch.Tensor, operand: LinearOperand) -> str:
        """Name of the kernel that a call with these arguments launches."""
        return self._choose(len(x), *operand.shape, self.is_batch_invariant).gemm.name

    def __call__(self, x: torch.Tensor, operand: LinearOperand, out: torch.Tensor | None = None) -> torch.Tensor:
        """y = x W^T. Shapes: x bfloat16 [M, K], rows 16-byte aligned; y bfloat16 [M, N], ``out`` if given.

        Errors: ValueError naming x or out for a wrong dtype, shape, stride or alignment.
        """
        num_rows, num_cols = operand.shape
        require_rows("x", x, num_cols)
        if out is None:
            out = torch.empty(x.shape[0], num_rows, dtype=torch.bfloat16, device=x.device)
        else:
            require_rows("out", out, num_rows)
            if len(out) != len(x):
                raise ValueError(f"out has {len(out)} rows, x has {len(x)}")
        if len(x):
            choice = self._choose(len(x), num_rows, num_cols, self.is_batch_invariant)
            launch.gemm(choice.gemm, x, operand.weight, out, operand.schedule, choice.rows_per_tile, choice.grid)
        return out


def require_packable(name: str, tensor: torch.Tensor) -> None:
    """Errors: ValueError naming an operand that cannot be repacked in place or is not on a CUDA device."""
    if not tensor.is_cuda:
        raise ValueError(f"{name} is on {tensor.device}; this kernel runs on CUDA")
    if not tensor.is_contiguous() or tensor.data_ptr() % 128:
        raise ValueError(f"{name} must be contiguous and start at a multiple of 128 bytes")


def require_rows(name: str, tensor: torch.Tensor, width: int) -> None:
    """Errors: ValueError naming a matrix that the copy engine cannot read or the epilogue cannot write."""
    if tensor.dtype is not torch.bfloat16:
        raise ValueError(f"{name} must be torch.bfloat16, found {tensor.dtype}")
    if tensor.ndim != 2 or tensor.shape[1] != width:
        raise ValueError(f"{name} must have shape [rows, {width}], found {list(tensor.shape)}")
    if tensor.stride(1) != 1 or tensor.stride(0) % 8 or tensor.data_ptr() % 16:
        raise ValueError(f"{name} must have contiguous rows that start at multiples of 16 bytes")


nvfp4_linear = Nvfp4LinearKernel(is_batch_invariant=False)
nvfp4_linear_invariant = Nvfp4LinearKernel(is_batch_invariant=True)
