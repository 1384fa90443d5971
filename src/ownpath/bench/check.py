"""Is a contender's answer right? A time without this says nothing."""

import torch

from ownpath.bench.operands import Fp8Operands, MoeOperands, Nvfp4Operands
from ownpath.bench.routing import Routing
from ownpath.kernels.fp8.ref import fp8_linear
from ownpath.kernels.nvfp4.ref import nvfp4_linear, nvfp4_moe

NUM_SAMPLED = 8
"""Rows compared with float64; every row must be finite."""


def sample(num_rows: int) -> torch.Tensor:
    """Row ids spread over the batch, first and last included."""
    return torch.linspace(0, num_rows - 1, min(num_rows, NUM_SAMPLED)).round().to(torch.int64)


def moe_reference(x: torch.Tensor, routing: Routing, operands: MoeOperands, swiglu_limit: float) -> torch.Tensor:
    """float64 of the dequantised operands, for the sampled tokens only. Shapes: x [T, D] -> [sampled, D]."""
    rows = sample(len(x)).to(x.device)
    w13_scale_2 = operands.w13_scale_2[:, None].expand(-1, 2)
    return nvfp4_moe(
        x[rows].double(),
        routing.topk_ids[rows],
        routing.topk_weights[rows].double(),
        (operands.w13, operands.w13_scale, w13_scale_2),
        (operands.w2, operands.w2_scale, operands.w2_scale_2),
        swiglu_limit,
    )


def nvfp4_reference(x: torch.Tensor, operands: Nvfp4Operands) -> torch.Tensor:
    """float64 product for the sampled rows. Shapes: x [M, K] -> [sampled, N]."""
    rows = x[sample(len(x)).to(x.device)].double()
    scale_2 = operands.weight_scale_2.expand(len(operands.weight))
    return nvfp4_linear(rows, operands.weight, operands.weight_scale, scale_2)


def fp8_reference(x: torch.Tensor, operands: Fp8Operands) -> torch.Tensor:
    """float64 product for the sampled rows. Shapes: x [M, K] -> [sampled, N]."""
    return fp8_linear(x[sample(len(x)).to(x.device)].double(), operands.weight, operands.scale)


def poison(like: tuple[int, ...], device: torch.device) -> None:
    """Fills the memory that the next allocations of this bfloat16 shape will get with NaN.

    torch's caching allocator hands freed blocks out again, so that a row which a kernel forgets to write shows.
    """
    blocks = [torch.full(like, torch.nan, dtype=torch.bfloat16, device=device) for _ in range(4)]
    del blocks


def rel_l2(y: torch.Tensor, reference: torch.Tensor) -> float:
    """||y - reference|| / ||reference|| over the sampled rows of y; NaN when any element of y is not finite."""
    if not bool(y.isfinite().all()):
        return float("nan")
    difference = y[sample(len(y)).to(y.device)].double() - reference
    return float(difference.norm() / reference.norm())
