"""Torch reference of the clamped SwiGLU.

Legend: T tokens, F half of a gate_up row.
"""

import torch

from ownpath.kernels.mixture import clamped_swiglu, sum_dtype


def swiglu(gate_up_TF2: torch.Tensor, limit: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit), gate columns first, in float32, rounded once."""
    gate, up = gate_up_TF2.to(sum_dtype(gate_up_TF2)).chunk(2, dim=-1)
    y = clamped_swiglu(gate, up, limit).to(gate_up_TF2.dtype)
    return y if out is None else out.copy_(y)
