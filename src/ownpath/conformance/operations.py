"""Operands of the operations without a quantised weight, at the shapes of ``kernels/*/cases.py``, and the judging of
their results. Tests and bench share it.

A judge compares with the exact results and the bounds of ``exact``, by which ``verify`` judges too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

import torch

from ownpath.conformance.bounds import (
    FLOAT32_ROUND,
    MAX_REL_L2,
    Exact,
    assert_allowed,
    assert_rounded_once,
    relative_l2,
)
from ownpath.conformance.call import KernelCall
from ownpath.conformance.exact import (
    ExactBoundary,
    boundary_deviations,
    grouped_product,
    norm,
    product,
    rotate_back,
    swiglu,
)
from ownpath.conformance.router import ExpectedChoice, RouterRule
from ownpath.kernels.cases import KernelCase
from ownpath.kernels.contract import RouterWeights
from ownpath.kernels.hyper.ref import HyperOut, HyperWeights, Mix, sinkhorn
from ownpath.kernels.registry import families
from ownpath.ops import OpKind
from ownpath.oracle import formulas

Inputs = tuple[Any, ...]


def _uniform(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=generator, device=generator.device)


def _normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device)


def hyper_inputs(case: KernelCase, num_tokens: int, g: torch.Generator) -> Inputs:
    """Draws streams, output and mix of the sublayer before, weights of the coming one, and the output's second part."""
    dim, num_mix, num_parts = case.sizes
    x_TSD = _normal(g, num_tokens, 4, dim).bfloat16()
    fn = _normal(g, num_mix, 4 * dim) * (4 * dim) ** -0.5
    scale = _uniform(g, 3 if num_mix == 24 else 1) + 0.5
    norm_weight = (1 + 0.1 * _normal(g, dim)).bfloat16()
    weights = HyperWeights(fn, _normal(g, num_mix), scale, norm_weight, 20, 1e-6, 1e-6, 1e-6)
    if not num_parts:
        return x_TSD, None, None, weights
    comb_TSS = sinkhorn(_normal(g, num_tokens, 4, 4), 20, 1e-6)
    y_TD, *others = (_normal(g, num_tokens, dim).bfloat16() for _ in range(num_parts))
    return x_TSD, y_TD, Mix(2 * _uniform(g, num_tokens, 4), comb_TSS), weights, *others


def router_inputs(case: KernelCase, num_tokens: int, g: torch.Generator) -> Inputs:
    """Draws logits over several magnitudes; half of the cases choose by token id."""
    num_experts, k, by_token = case.sizes
    logits_TE = _normal(g, num_tokens, num_experts) * 10 ** (2 * _uniform(g, num_tokens, 1) - 1)
    if not by_token:
        return logits_TE, k, 2.5, _normal(g, num_experts), None, None
    table = _uniform(g, 1000, num_experts).argsort(dim=1)[:, :k].contiguous()
    token_ids_T = (_uniform(g, num_tokens) * 1000).long()
    return logits_TE, k, 2.5, None, token_ids_T, table


def route_inputs(case: KernelCase, num_tokens: int, g: torch.Generator) -> Inputs:
    """Draws the gate's input and matrix; half of the cases choose by token id, and some tokens are padding."""
    num_experts, k, by_token, width = case.sizes
    x_TD, gate_ED = _normal(g, num_tokens, width).bfloat16(), (_normal(g, num_experts, width) * width**-0.5).bfloat16()
    table = _uniform(g, 1000, num_experts).argsort(dim=1)[:, :k].contiguous()
    bias_E, token_ids_T = 0.3 * _normal(g, num_experts), (_uniform(g, num_tokens) * 1000).long()
    token_ids_T[2::3] = -1
    choice = (None, table) if by_token else (bias_E, None)
    return x_TD, gate_ED, RouterWeights(k, 2.5, *choice), token_ids_T


def norm_inputs(case: KernelCase, num_tokens: int, g: torch.Generator) -> Inputs:
    """Draws rows of several magnitudes, or heads without a weight, as slices of wider rows."""
    dim, num_heads, pitch = case.sizes
    if num_heads:
        rows = (_normal(g, num_tokens, max(pitch, num_heads * dim)) * 3).bfloat16()
        return rows[:, : num_heads * dim].unflatten(1, (num_heads, dim)), None, 1e-6
    x = (_normal(g, num_tokens, pitch) * 10 ** (4 * _uniform(g, num_tokens, 1) - 2)).bfloat16()
    return x[:, :dim], (1 + 0.1 * _normal(g, dim)).bfloat16(), 1e-6


def swiglu_inputs(case: KernelCase, num_tokens: int, g: torch.Generator) -> Inputs:
    """Draws values on both sides of the clamp, and exactly on it."""
    gate_up = _normal(g, num_tokens, 2 * case.sizes[0]) * 8
    gate_up[:, ::7] = 10.0
    gate_up[:, 3::11] = -10.0
    return gate_up.bfloat16(), 10.0


def grouped_inputs(case: KernelCase, num_tokens: int, g: torch.Generator) -> Inputs:
    """Draws attention outputs, angles of positions up to a million, one matrix per group."""
    num_groups, num_heads, head_dim, rotary_dim, num_rows = case.sizes
    o_TNH = _normal(g, num_tokens, num_groups * num_heads, head_dim).bfloat16()
    angles_TA = _uniform(g, num_tokens, rotary_dim // 2) * 1e6
    width = num_heads * head_dim
    weight_GRI = (_normal(g, num_groups, num_rows, width) * width**-0.5).bfloat16()
    return o_TNH, angles_TA.cos(), angles_TA.sin(), weight_GRI


def judge_hyper(result: HyperOut, inputs: Inputs) -> None:
    """Judges streams; then everything else by the streams that were stored."""
    x_TSD, y_TD, mix, weights, *others = inputs
    mixing, num_streams = mixing_of(weights), x_TSD.shape[1]
    given = None if mix is None else (x_TSD, y_TD, mix, *others)
    for what, found in boundary_deviations(result, given, mixing, weights.norm_weight.double()):
        assert found.is_allowed, f"{what}: {found}"
    assert given is not None or torch.equal(result.x_TSD, x_TSD)
    assert (result.mix is None) == (len(weights.fn) == num_streams)
    new_TSD = result.x_TSD.double()
    wanted = ExactBoundary(new_TSD, mixing).normed_input(weights.norm_weight.double(), result.h_TD.dtype)
    assert relative_l2(result.h_TD, wanted.value) <= MAX_REL_L2, "normed input"
    if result.mix is not None:
        # Sums of 16384 products in blocks, then 39 divisions: 128 float32 roundings cover them in the mean.
        logits = mixing.logits(new_TSD)
        assert relative_l2(result.mix.post_TS, mixing.post(logits, num_streams)) <= 128 * FLOAT32_ROUND, "post"
        assert relative_l2(result.mix.comb_TSS, mixing.comb(logits, num_streams)) <= 128 * FLOAT32_ROUND, "comb"


def mixing_of(weights: HyperWeights) -> formulas.Mixing:
    """Converts a boundary's weights for the oracle, in float64."""
    fn, scale, base = (part.double() for part in (weights.fn, weights.scale, weights.base))
    return formulas.Mixing(fn, scale, base, weights.num_iters, weights.eps, weights.mix_norm_eps)


def judge_router(result: tuple[torch.Tensor, torch.Tensor], inputs: Inputs) -> None:
    """Judges ids and weights by the scores of the given logits."""
    logits_TE, k, factor, bias_E, token_ids_T, table = inputs
    rule = RouterRule(k, factor, bias_E, None if table is None else table[token_ids_T])
    exact = Exact(logits_TE.double(), torch.zeros_like(logits_TE, dtype=torch.float64))
    problem = ExpectedChoice(exact, rule).problem(*result)
    assert not problem, problem


def judge_route(result: tuple[torch.Tensor, torch.Tensor], inputs: Inputs) -> None:
    """Judges ids and weights by the scores of the exact logits. A padded row has expert -1 and weight 0."""
    x_TD, gate_ED, (k, factor, bias_E, table), token_ids_T = *inputs[:2], vars(inputs[2]).values(), inputs[3]
    real_R, (ids_TK, weights_TK) = token_ids_T >= 0, result
    assert bool((ids_TK[~real_R] == -1).all())
    assert not bool(weights_TK[~real_R].any())
    exact = product(x_TD[real_R].double(), gate_ED.double())
    rule = RouterRule(k, factor, bias_E, None if table is None else table[token_ids_T[real_R]])
    problem = ExpectedChoice(exact, rule).problem(ids_TK[real_R], weights_TK[real_R])
    assert not problem, problem


def judge_norm(result: torch.Tensor, inputs: Inputs) -> None:
    """Judges normed rows."""
    x, weight, eps = inputs
    assert_allowed(result, norm(x, eps, None if weight is None else weight.double()))


def judge_swiglu(result: torch.Tensor, inputs: Inputs) -> None:
    """Judges activations around the clamp."""
    gate_up, limit = inputs
    gate, up = gate_up.chunk(2, dim=-1)
    assert_allowed(result, swiglu(gate, up, limit))


def judge_grouped(result: torch.Tensor, inputs: Inputs) -> None:
    """Judges the products of each group of heads, which are rotated back before."""
    o_TNH, cos_TA, sin_TA, weight_GRI = inputs
    rotated = rotate_back(o_TNH, (cos_TA, sin_TA))
    exact = grouped_product(*rotated, len(weight_GRI), weight_GRI.flatten(0, 1).double())
    assert_rounded_once(result.flatten(1), exact)


@dataclass(frozen=True)
class Operation:
    """inputs: draws operands. judge: asserts that a result is theirs. num_bytes: by sizes and number of tokens."""

    kind: OpKind
    inputs: Callable[[KernelCase, int, torch.Generator], Inputs]
    judge: Callable[[Any, Inputs], None]
    num_bytes: Callable[[tuple[int, ...], int], int]


def _hyper_bytes(sizes: tuple[int, ...], num_tokens: int) -> int:
    dim, num_mix, num_parts = sizes
    return 16 * num_mix * dim + num_tokens * (2 * 4 * dim * 2 + max(num_parts + 1, 2) * dim * 2)


def _grouped_bytes(sizes: tuple[int, ...], num_tokens: int) -> int:
    num_groups, num_heads, head_dim, _, num_rows = sizes
    width = num_heads * head_dim
    return 2 * num_groups * (num_rows * width + num_tokens * (width + num_rows))


def _route_bytes(sizes: tuple[int, ...], num_tokens: int) -> int:
    num_experts, k, _, width = sizes
    return 2 * width * (num_experts + num_tokens) + 12 * num_tokens * k


OPERATIONS = MappingProxyType(
    {
        "hyper_boundary": Operation(OpKind.HYPER, hyper_inputs, judge_hyper, _hyper_bytes),
        "router": Operation(OpKind.ROUTER, router_inputs, judge_router, lambda s, t: t * (4 * s[0] + 12 * s[1])),
        "route": Operation(OpKind.ROUTE, route_inputs, judge_route, _route_bytes),
        "rms_norm": Operation(OpKind.NORM, norm_inputs, judge_norm, lambda s, t: 4 * t * s[0] * max(1, s[1])),
        "swiglu": Operation(OpKind.SWIGLU, swiglu_inputs, judge_swiglu, lambda s, t: 6 * t * s[0]),
        "grouped_linear": Operation(OpKind.GROUPED, grouped_inputs, judge_grouped, _grouped_bytes),
    }
)


def find_cases() -> tuple[KernelCase, ...]:
    """Finds the cases of every family whose operands are made here."""
    modules = (f"ownpath.kernels.{family}.cases" for family in families())
    found = (import_module(name).CASES for name in modules if find_spec(name) is not None)
    return tuple(case for cases in found for case in cases if isinstance(case, KernelCase) and case.op in OPERATIONS)


CASES = find_cases()


def make_inputs(case: KernelCase, num_tokens: int, device: torch.device, seed: int = 0) -> Inputs:
    """Draws fresh operands of a case."""
    return OPERATIONS[case.op].inputs(case, num_tokens, torch.Generator(device).manual_seed(seed))


def call_of(case: KernelCase, kernel: Callable[..., Any], inputs: Inputs) -> KernelCall:
    """One call as ``memory`` looks at it."""
    return KernelCall(case.label, OPERATIONS[case.op].kind, kernel, inputs)


def judge(case: KernelCase, result: Any, inputs: Inputs) -> None:
    """Judges a result. Errors: AssertionError when it is not what the operation defines."""
    OPERATIONS[case.op].judge(result, inputs)


def num_bytes(case: KernelCase, num_tokens: int) -> int:
    """Counts the bytes that any implementation must move: each operand once, each result once."""
    return OPERATIONS[case.op].num_bytes(case.sizes, num_tokens)
