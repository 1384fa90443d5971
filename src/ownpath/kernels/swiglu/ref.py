"""Torch reference of the clamped SwiGLU.

Legend: T tokens, F half of a gate_up row.
"""

import torch

from ownpath.kernels.mixture import clamped_swiglu, sum_dtype
from ownpath.kernels.reference import Reference


def swiglu(gate_up_TF2: torch.Tensor, limit: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """Computes silu(min(gate, limit)) * clamp(up, -limit, limit), gate columns first, in float32, rounded once."""
    gate, up = gate_up_TF2.to(sum_dtype(gate_up_TF2)).chunk(2, dim=-1)
    y = clamped_swiglu(gate, up, limit).to(gate_up_TF2.dtype)
    return y if out is None else out.copy_(y)


class SwigluReference(Reference):
    """``swiglu`` as a kernel. The operand is the limit."""

    def prepare(self, limit: float) -> float:
        """Returns the limit."""
        return limit

    def variant(self, gate_up: torch.Tensor, operand: float) -> None:
        """Returns ``None``: the kernel has no variants."""

    def run(self, gate_up: torch.Tensor, operand: float, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """Computes y [..., F] for gate_up [..., 2F]."""
        return swiglu(gate_up, operand, out)

    def __call__(self, gate_up: torch.Tensor, limit: float, out: torch.Tensor | None = None) -> torch.Tensor:
        """Computes ``swiglu``."""
        return swiglu(gate_up, limit, out)


SWIGLU = SwigluReference()
