"""Checks a contender's result against float64. Only the time of a right result counts."""

import torch

from ownpath.bench.operands import Fp8Operands, MoeOperands, Nvfp4Operands
from ownpath.bench.routing import TopkRouting
from ownpath.conformance import quant_weights
from ownpath.oracle.formats import decode, e4m3_of, e8m0_of
from ownpath.oracle.weights import spread_blocks

NUM_SAMPLED = 8
"""Rows compared with float64; every row must be finite."""


def sample(num_rows: int) -> torch.Tensor:
    """Returns row ids spread over the batch, first and last included."""
    return torch.linspace(0, num_rows - 1, min(num_rows, NUM_SAMPLED)).round().to(torch.int64)


def moe_reference(x: torch.Tensor, routing: TopkRouting, operands: MoeOperands, swiglu_limit: float) -> torch.Tensor:
    """Computes the sampled tokens in float64 from dequantised operands. Shapes: x [T, D] -> [sampled, D]."""
    rows = sample(len(x)).to(x.device)
    parts = operands.w13, operands.w13_scale, operands.w13_scale_2[:, None].expand(-1, 2)
    experts = quant_weights.ExpertStacks(*parts, operands.w2, operands.w2_scale, operands.w2_scale_2)
    routed = quant_weights.RoutedTokens(x[rows], routing.topk_ids[rows], routing.topk_weights[rows])
    return quant_weights.exact_mixture(experts, routed, swiglu_limit).value


def nvfp4_reference(x: torch.Tensor, operands: Nvfp4Operands) -> torch.Tensor:
    """Computes the sampled rows in float64. Shapes: x [M, K] -> [sampled, N]."""
    scale_2 = operands.weight_scale_2.expand(len(operands.weight))
    weight = quant_weights.DenseWeight(operands.weight, operands.weight_scale, scale_2).weight()
    return x[sample(len(x)).to(x.device)].double() @ weight.T


def fp8_reference(x: torch.Tensor, operands: Fp8Operands) -> torch.Tensor:
    """Computes the sampled rows in float64. Shapes: x [M, K] -> [sampled, N]."""
    weight = decode(operands.weight, e4m3_of) * spread_blocks(decode(operands.scale, e8m0_of), operands.weight.shape)
    return x[sample(len(x)).to(x.device)].double() @ weight.T


def poison(like: tuple[int, ...], device: torch.device) -> None:
    """Fills with NaN the memory that the next allocations of this bfloat16 shape will reuse.

    torch's caching allocator reuses freed blocks, so that a row which a kernel does not write reads as NaN.
    """
    blocks = [torch.full(like, torch.nan, dtype=torch.bfloat16, device=device) for _ in range(4)]
    del blocks


def rel_l2(y: torch.Tensor, reference: torch.Tensor) -> float:
    """Computes ||y - reference|| / ||reference|| over the sampled rows; NaN if any element of y is not finite."""
    if not bool(y.isfinite().all()):
        return float("nan")
    difference = y[sample(len(y)).to(y.device)].double() - reference
    return float(difference.norm() / reference.norm())
