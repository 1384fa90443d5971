"""The operand of products with unquantised weights, and a kernel that wraps any function that computes them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ownpath.formats import BF16, FP32
from ownpath.kernels.checks import require_input
from ownpath.kernels.contract import Config, StoredLinear
from ownpath.kernels.shards import fuse
from ownpath.qtensor import QuantTensor

DenseProduct = Callable[[torch.Tensor, torch.Tensor, torch.dtype], torch.Tensor]
"""(x [..., K], weight [N, K], dtype of y) -> y [..., N]."""


@dataclass(frozen=True)
class PlainOperand:
    """weight bfloat16 or float32 [N, K]."""

    weight_NK: torch.Tensor


class PlainKernel:
    """y = x Wᵀ in the dtype of x, or unrounded in a wider dtype."""

    def __init__(self, product: DenseProduct) -> None:
        self._product = product

    def prepare(self, stored: StoredLinear) -> PlainOperand:
        """Concatenates all shards' rows; a single shard is used as it is, without a copy."""
        return PlainOperand(fuse([shard.qdata for shard in stored.shards]))

    def restore(self, operand: PlainOperand) -> tuple[QuantTensor, ...]:
        """Returns all shards' rows as one matrix."""
        weight = operand.weight_NK
        return (QuantTensor(weight, None, None, BF16 if weight.dtype == torch.bfloat16 else FP32),)

    def padding(self, operand: PlainOperand) -> None:
        """Returns ``None``: the layout has no padding."""

    def configs(self, operand: PlainOperand) -> Sequence[Config]:
        """Returns nothing: no kernel is compiled to disk."""
        return ()

    def planned_configs(self, stored: StoredLinear) -> Sequence[Config]:
        """Returns nothing: no kernel is compiled to disk."""
        return ()

    def variant(self, x: torch.Tensor, operand: PlainOperand) -> str | None:
        """Returns ``None``: the kernel has no variants."""
        return None

    def workspace(self, operand: PlainOperand, num_tokens: int) -> None:
        """Returns ``None``: no call needs scratch."""

    def run(
        self,
        x: torch.Tensor,
        operand: PlainOperand,
        *,
        out: torch.Tensor | None = None,
        workspace: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes y [..., N] in the dtype of x, or of ``out``. Errors: ValueError naming what is wrong with x."""
        require_input(x, operand.weight_NK.shape[1], operand.weight_NK)
        y = self._product(x, operand.weight_NK, x.dtype if out is None else out.dtype)
        return y if out is None else out.copy_(y)

    def __call__(self, x: torch.Tensor, weight_NK: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
        """Computes the product with the signature of the twin."""
        return self._product(x, weight_NK, out_dtype)

    def rounds_to_powers(self, operand: PlainOperand, num_rows: int) -> bool:
        """See ``LinearKernel``."""
        return False

    def run_wide(self, x: torch.Tensor, operand: PlainOperand) -> torch.Tensor:
        """Computes y in at least float32, with unrounded sums."""
        require_input(x, operand.weight_NK.shape[1], operand.weight_NK)
        return self._product(x, operand.weight_NK, torch.promote_types(x.dtype, torch.float32))
