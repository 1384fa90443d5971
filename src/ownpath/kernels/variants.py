"""Which form of a Triton kernel a call runs: the tile that its launcher picks for these arguments, spelled out.

Each function takes the arguments of the kernel it is named after, without those that results are written to.
"""

from typing import Any

import torch

from ownpath.kernels.grouped import launch as grouped
from ownpath.kernels.hyper import launch as hyper
from ownpath.kernels.hyper.ref import HyperWeights, Mix
from ownpath.kernels.norms import launch as norms
from ownpath.kernels.nvfp4_sm100 import launch as w4a4_sm100
from ownpath.kernels.nvfp4_sm100.layout import W4A4LinearOperand, W4A4MoeOperand
from ownpath.kernels.nvfp4_sm100.route_sm100 import num_tiles_bound
from ownpath.kernels.plain import invariant as plain
from ownpath.kernels.swiglu import launch as swiglu_launch


def rms_norm(x: torch.Tensor, weight_D: torch.Tensor | None, eps: float) -> str:
    """By width alone."""
    rows, block, num_warps = norms.norm_tile(x.shape[-1])
    return _spelled("rms_norm", rows=rows, block=block, warps=num_warps)


def swiglu(gate_up_TF2: torch.Tensor, limit: float) -> str:
    """By width alone."""
    return _spelled("swiglu", block=swiglu_launch.swiglu_block(gate_up_TF2.shape[-1] // 2))


def router(
    logits_TE: torch.Tensor | None,
    num_experts_per_tok: int,
    routed_scaling_factor: float,
    bias_E: torch.Tensor | None,
    token_ids_T: torch.Tensor | None,
    tid2eid_VK: torch.Tensor | None,
) -> str:
    """By how experts are chosen; the logits are not looked at."""
    return _spelled("router_by_score" if tid2eid_VK is None else "router_by_token", k=num_experts_per_tok)


def grouped_linear(o_TNH: torch.Tensor, cos_TA: torch.Tensor, sin_TA: torch.Tensor, weight_GRI: torch.Tensor) -> str:
    """By the number of tokens."""
    return _tiles("rope_grouped", grouped.choose_tiles(len(o_TNH), weight_GRI.shape[1], o_TNH.shape[2]))


def grouped_linear_invariant(
    o_TNH: torch.Tensor, cos_TA: torch.Tensor, sin_TA: torch.Tensor, weight_GRI: torch.Tensor
) -> str:
    """One for every number of tokens."""
    return _tiles("rope_grouped", grouped.invariant_tiles(o_TNH.shape[2]))


def hyper_boundary(x_TSD: torch.Tensor, y_TD: torch.Tensor | None, mix: Mix | None, weights: HyperWeights) -> str:
    """By the number of tokens."""
    return _tiles("hyper", hyper.choose_tiles(len(x_TSD), invariant=False))


def hyper_boundary_invariant(
    x_TSD: torch.Tensor, y_TD: torch.Tensor | None, mix: Mix | None, weights: HyperWeights
) -> str:
    """One for every number of tokens."""
    return _tiles("hyper", hyper.choose_tiles(len(x_TSD), invariant=True))


def plain_linear(x: torch.Tensor, weight_NK: torch.Tensor, out_dtype: torch.dtype) -> str:
    """By whether both operands are bfloat16."""
    kind = "plain_bfloat16" if x.dtype == weight_NK.dtype == torch.bfloat16 else "plain_float32"
    return _spelled(kind, rows=plain.ROWS, tokens=plain.TOKENS, step=plain.STEP)


def linear_w4a4(x_MK: torch.Tensor, operand: W4A4LinearOperand) -> str:
    """By the number of rows."""
    return _w4a4("linear", w4a4_sm100.columns_per_tile(len(x_MK), operand.shape[0]))


def linear_w4a4_invariant(x_MK: torch.Tensor, operand: W4A4LinearOperand) -> str:
    """One for every number of rows."""
    return _w4a4("linear", w4a4_sm100.NARROW)


def moe_w4a4(
    x_TD: torch.Tensor, topk_ids_TK: torch.Tensor, topk_weights_TK: torch.Tensor, operand: W4A4MoeOperand
) -> str:
    """By the most rows that the routing may need."""
    row_tile = w4a4_sm100.ROW_TILE
    num_rows = row_tile * num_tiles_bound(topk_ids_TK.numel(), operand.num_experts, row_tile)
    return _w4a4("moe", w4a4_sm100.columns_per_tile(num_rows, operand.hidden_size))


def moe_w4a4_invariant(
    x_TD: torch.Tensor, topk_ids_TK: torch.Tensor, topk_weights_TK: torch.Tensor, operand: W4A4MoeOperand
) -> str:
    """One for every number of tokens."""
    return _w4a4("moe", w4a4_sm100.NARROW)


def _w4a4(kind: str, columns: int) -> str:
    return _spelled(f"w4a4_{kind}", rows=w4a4_sm100.ROW_TILE, columns=columns)


def _tiles(name: str, tiles: grouped.Tiles | hyper.Tiles) -> str:
    return _spelled(name, **vars(tiles))


def _spelled(name: str, **sizes: Any) -> str:
    return "_".join([name, *(f"{size}{int(value)}" for size, value in sizes.items())])
