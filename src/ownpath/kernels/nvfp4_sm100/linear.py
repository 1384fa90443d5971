"""``triton.nvfp4_linear_w4a4_sm100``: dense W4A4 products."""

from collections.abc import Sequence

import torch

from ownpath.formats import NVFP4
from ownpath.kernels.checks import check, require_input
from ownpath.kernels.contract import Config, StoredExperts, StoredLinear
from ownpath.kernels.nvfp4_sm100.launch import (
    NARROW,
    ROW_TILE,
    check_input,
    columns_per_tile,
    quantize_activation,
    run_product,
)
from ownpath.kernels.nvfp4_sm100.layout import W4A4LinearOperand, W4A4MoeOperand, linear_operand, scale_padding, unboxed
from ownpath.kernels.nvfp4_sm100.prove import prove_linear
from ownpath.kernels.shards import fuse_nvfp4
from ownpath.kernels.variants import variant_name
from ownpath.qtensor import QuantTensor


class TritonKernel:
    """Base class of both kernels, which Triton compiles at the first call.

    is_batch_invariant: the same tiles for every number of rows.
    """

    def __init__(self, is_batch_invariant: bool) -> None:
        self.is_batch_invariant = is_batch_invariant

    def configs(self, operand: W4A4LinearOperand | W4A4MoeOperand) -> Sequence[Config]:
        """Returns nothing: no kernel is compiled to disk."""
        return ()

    def planned_configs(self, stored: StoredLinear | StoredExperts) -> Sequence[Config]:
        """Returns nothing: no kernel is compiled to disk."""
        return ()


class Nvfp4LinearW4A4Kernel(TritonKernel):
    """y = x w^T with both operands NVFP4. is_batch_invariant: the same tiles for every number of rows."""

    def prepare(self, stored: StoredLinear) -> W4A4LinearOperand:
        """Swizzles the scales; codes are used as they are. The first call on a device proves the kernel there.

        Errors: OperandError as ``linear_operand``; ProofError when the kernel differs from its twin.
        """
        assert stored.input_scale is not None, "a W4A4 product without a calibrated input_scale has no meaning"
        operand = linear_operand(*fuse_nvfp4(stored), stored.input_scale)
        if operand.codes.is_cuda:
            prove_linear(self, operand.codes.device)
        return operand

    def restore(self, operand: W4A4LinearOperand) -> tuple[QuantTensor, ...]:
        """Reads all shards' rows back in the stored order. The global scales [N] include the input's."""
        num_rows, width = operand.shape
        return (QuantTensor(operand.codes, unboxed(operand.scale, num_rows, width // 16), operand.alpha, NVFP4),)

    def padding(self, operand: W4A4LinearOperand) -> torch.Tensor:
        """Returns the scales' padding."""
        num_rows, width = operand.shape
        return scale_padding(operand.scale, num_rows, width // 16)

    def _columns(self, num_rows: int, operand: W4A4LinearOperand) -> int:
        return NARROW if self.is_batch_invariant else columns_per_tile(num_rows, operand.shape[0])

    def variant(self, x: torch.Tensor, operand: W4A4LinearOperand) -> str:
        """Returns the variant's name. It depends on the number of rows, unless the kernel is batch-invariant."""
        columns = self._columns(x.numel() // x.shape[-1], operand)
        return variant_name("w4a4_linear", rows=ROW_TILE, columns=columns)

    def workspace(self, operand: W4A4LinearOperand, num_tokens: int) -> None:
        """Returns ``None``: scratch comes from torch's allocator."""

    def run(
        self,
        x: torch.Tensor,
        operand: W4A4LinearOperand,
        *,
        out: torch.Tensor | None = None,
        workspace: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes y. Shapes: x bfloat16 [..., K]; y bfloat16 [..., N].

        Errors: ValueError for another dtype, width, stride or device than the operand's, or a device without tcgen05.
        """
        n, k = operand.shape
        require_input(x, k, operand.codes)
        x_MK = x.reshape(-1, k)
        check_input(x_MK, k, operand.codes.device)
        if out is None:
            out = torch.empty((len(x_MK), n), dtype=torch.bfloat16, device=x_MK.device)
        else:
            check("out", out, (torch.bfloat16,), (*x.shape[:-1], n), x_MK.device)
        if len(x_MK):
            columns = self._columns(len(x_MK), operand)
            codes, scale = quantize_activation(x_MK, operand.input_scale)
            run_product(codes, scale, operand.codes, operand.scale, out.view(-1, n), operand.alpha, columns)
        return out.view(*x.shape[:-1], n)

    def rounds_to_powers(self, operand: W4A4LinearOperand, num_rows: int) -> bool:
        """See ``LinearKernel``."""
        return False

    def run_wide(self, x: torch.Tensor, operand: W4A4LinearOperand) -> torch.Tensor:
        """Refuses: this kernel does not write float32. Errors: ValueError."""
        return self.run(x.to(torch.promote_types(x.dtype, torch.float32)), operand)


nvfp4_linear_w4a4 = Nvfp4LinearW4A4Kernel(is_batch_invariant=False)
nvfp4_linear_w4a4_invariant = Nvfp4LinearW4A4Kernel(is_batch_invariant=True)
