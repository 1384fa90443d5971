"""Operands of the operations without a quantised weight, at the shapes of ``kernels/*/cases.py``, and the judging of
their results. Tests and bench share it.

A judge compares with the oracle's formulas in float64. Bounds come from the formats: BF16 is the unit roundoff of the
stored results, F32 that of the arithmetic, and each bound names how many roundings it covers.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

import torch

from ownpath.conformance.call import KernelCall
from ownpath.kernels.cases import KernelCase
from ownpath.kernels.hyper.ref import HyperOut, HyperWeights, Mix, sinkhorn
from ownpath.kernels.registry import families
from ownpath.ops import OpKind
from ownpath.oracle import formulas

BF16, F32 = 2.0**-8, 2.0**-24
Inputs = tuple[Any, ...]


def _uniform(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=generator, device=generator.device)


def _normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device)


def hyper_inputs(case: KernelCase, num_tokens: int, g: torch.Generator) -> Inputs:
    """Draws streams, output and mix of the sublayer before, and weights of the coming one."""
    dim, num_mix, has_post = case.sizes
    x_TSD = _normal(g, num_tokens, 4, dim).bfloat16()
    fn = _normal(g, num_mix, 4 * dim) * (4 * dim) ** -0.5
    scale = _uniform(g, 3 if num_mix == 24 else 1) + 0.5
    norm_weight = (1 + 0.1 * _normal(g, dim)).bfloat16()
    weights = HyperWeights(fn, _normal(g, num_mix), scale, norm_weight, 20, 1e-6, 1e-6, 1e-6)
    if not has_post:
        return x_TSD, None, None, weights
    comb_TSS = sinkhorn(_normal(g, num_tokens, 4, 4), 20, 1e-6)
    return x_TSD, _normal(g, num_tokens, dim).bfloat16(), Mix(2 * _uniform(g, num_tokens, 4), comb_TSS), weights


def router_inputs(case: KernelCase, num_tokens: int, g: torch.Generator) -> Inputs:
    """Draws logits over several magnitudes; half of the cases choose by token id."""
    num_experts, k, by_token = case.sizes
    logits_TE = _normal(g, num_tokens, num_experts) * 10 ** (2 * _uniform(g, num_tokens, 1) - 1)
    if not by_token:
        return logits_TE, k, 2.5, _normal(g, num_experts), None, None
    table = _uniform(g, 1000, num_experts).argsort(dim=1)[:, :k].contiguous()
    token_ids_T = (_uniform(g, num_tokens) * 1000).long()
    return logits_TE, k, 2.5, None, token_ids_T, table


def norm_inputs(case: KernelCase, num_tokens: int, g: torch.Generator) -> Inputs:
    """Draws rows of several magnitudes, as a slice of a wider tensor or as heads without a weight."""
    dim, num_heads, pitch = case.sizes
    if num_heads:
        return (_normal(g, num_tokens, num_heads, dim) * 3).bfloat16(), None, 1e-6
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


INPUTS: dict[str, Callable[[KernelCase, int, torch.Generator], Inputs]] = {
    "hyper_boundary": hyper_inputs,
    "router": router_inputs,
    "rms_norm": norm_inputs,
    "swiglu": swiglu_inputs,
    "grouped_linear": grouped_inputs,
}


def listed_cases() -> tuple[KernelCase, ...]:
    """Lists the cases of every family whose operands are made here."""
    modules = (f"ownpath.kernels.{family}.cases" for family in families())
    found = (import_module(name).CASES for name in modules if find_spec(name) is not None)
    return tuple(case for cases in found for case in cases if isinstance(case, KernelCase) and case.op in INPUTS)


CASES = listed_cases()


def make_inputs(case: KernelCase, num_tokens: int, device: torch.device, seed: int = 0) -> Inputs:
    """Draws fresh operands of a case."""
    return INPUTS[case.op](case, num_tokens, torch.Generator(device).manual_seed(seed))


def call_of(case: KernelCase, kernel: Callable[..., Any], inputs: Inputs) -> KernelCall:
    """One call as ``memory`` looks at it."""
    return KernelCall(case.label, KINDS[case.op], kernel, inputs)


KINDS = MappingProxyType(
    {
        "hyper_boundary": OpKind.HYPER,
        "router": OpKind.ROUTER,
        "rms_norm": OpKind.NORM,
        "swiglu": OpKind.SWIGLU,
        "grouped_linear": OpKind.GROUPED,
    }
)


def _within(name: str, got: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor) -> None:
    """Asserts that every element is finite and within its bound; the message gives the first that is not."""
    assert got.isfinite().all(), f"{name}: not finite"
    excess = (got.double() - expected).abs() - bound
    if (excess > 0).any():
        at = tuple(int(i) for i in (excess > 0).nonzero()[0])
        raise AssertionError(f"{name}{list(at)}: {got[at].item()} instead of {expected[at].item()}")


def _close(name: str, got: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
    """Asserts a relative L2 distance of at most ``limit``."""
    distance = ((got.double() - expected).norm() / expected.norm()).item()
    assert distance <= limit, f"{name}: relative L2 {distance:.2e} above {limit:.2e}"


def judge_hyper(result: HyperOut, inputs: Inputs) -> None:
    """Judges streams against float64; then everything else against float64 of the streams that were stored."""
    x_TSD, y_TD, mix, weights = inputs
    new_TSD, num_streams = result.x_TSD.double(), x_TSD.shape[1]
    if mix is None:
        assert torch.equal(result.x_TSD, x_TSD)
    else:
        wide = tuple(part.double() for part in (x_TSD, y_TD, mix.post_TS, mix.comb_TSS))
        expected, terms = formulas.write_streams(*wide), formulas.write_streams(*(part.abs() for part in wide))
        _within("x", result.x_TSD, expected, BF16 * expected.abs() + 8 * F32 * terms)
    mixing, weight_D = mixing_of(weights), weights.norm_weight.double()
    logits = mixing.logits(new_TSD)
    collapsed = formulas.collapse(new_TSD, mixing.pre(logits, num_streams))
    h_TD = formulas.rms(collapsed, weights.norm_eps) * weight_D
    # Collapsed input and normalised input are rounded once each; the norm's divisor sees the first rounding.
    loose = 64 * F32 * new_TSD.abs().sum(1) * weight_D.abs()
    divisor = collapsed.square().mean(-1, keepdim=True).sqrt()
    _within("h", result.h_TD, h_TD, 3 * BF16 * h_TD.abs() + loose / divisor)
    _close("h", result.h_TD, h_TD, 3e-3)
    assert (result.mix is None) == (len(weights.fn) == num_streams)
    if result.mix is not None:
        # Sums of 16384 products in blocks, then 39 divisions: 128 float32 roundings cover them.
        _close("post", result.mix.post_TS, mixing.post(logits, num_streams), 128 * F32)
        _close("comb", result.mix.comb_TSS, mixing.comb(logits, num_streams), 128 * F32)


def mixing_of(weights: HyperWeights) -> formulas.Mixing:
    """Converts a boundary's weights for the oracle, in float64."""
    fn, scale, base = (part.double() for part in (weights.fn, weights.scale, weights.base))
    return formulas.Mixing(fn, scale, base, weights.num_iters, weights.eps, weights.mix_norm_eps)


def judge_router(result: tuple[torch.Tensor, torch.Tensor], inputs: Inputs) -> None:
    """Judges that chosen experts are the best up to float32 rounding of their scores, and weights follow from them."""
    logits_TE, k, factor, bias_E, token_ids_T, table = inputs
    ids_TK, weights_TK = result[0].long(), result[1]
    scores_TE = formulas.expert_scores(logits_TE.double())
    if table is not None:
        assert torch.equal(ids_TK, table[token_ids_T])
    else:
        assert ids_TK.min() >= 0
        assert ids_TK.max() < logits_TE.shape[1]
        assert (ids_TK.sort(dim=1).values.diff(dim=1) > 0).all(), "an expert was chosen twice"
        ranks_TE = scores_TE + bias_E
        best_TK = ranks_TE.sort(dim=1, descending=True).values[:, :k]
        rounding = 16 * F32 * ranks_TE.abs().amax(1, keepdim=True)
        _within("rank", ranks_TE.gather(1, ids_TK), best_TK, rounding.expand_as(best_TK))
    expected = formulas.routing_weights(scores_TE, ids_TK, factor)
    _within("weights", weights_TK, expected, 64 * F32 * expected)


def judge_norm(result: torch.Tensor, inputs: Inputs) -> None:
    """Allows one rounding of the result, and the mean's."""
    x, weight, eps = inputs
    expected = formulas.rms(x.double(), eps) * (1.0 if weight is None else weight.double())
    _within("y", result, expected, (BF16 + 16 * F32) * expected.abs())


def judge_swiglu(result: torch.Tensor, inputs: Inputs) -> None:
    """Allows the rounding of exp's argument, |gate| roundings, and zero below float32's normal range."""
    gate_up, limit = inputs
    gate, up = gate_up.double().chunk(2, dim=-1)
    expected = formulas.swiglu(gate, up, limit)
    _within("y", result, expected, (BF16 + (2 * gate.abs() + 16) * F32) * expected.abs() + 2.0**-126)


def judge_grouped(result: torch.Tensor, inputs: Inputs) -> None:
    """Allows un-rotated channels one rounding to bfloat16 before the product, and the product one after it."""
    o_TNH, cos_TA, sin_TA, weight_GRI = inputs
    u_TNH = formulas.rotate(o_TNH.double(), cos_TA.double(), -sin_TA.double())
    weight = weight_GRI.double()
    expected, terms = _group_products(u_TNH, weight), _group_products(u_TNH.abs(), weight.abs())
    rotated = u_TNH.abs()
    rotated[..., : -2 * cos_TA.shape[1]] = 0
    ends = _group_products(rotated, weight.abs())
    bound = BF16 * expected.abs() + BF16 * ends + weight.shape[-1] / 16 * 2 * F32 * terms
    _within("y", result, expected, bound)
    _close("y", result, expected, 3e-3)


def _group_products(u_TNH: torch.Tensor, weight_GRI: torch.Tensor) -> torch.Tensor:
    return torch.einsum("tgi,gri->tgr", u_TNH.flatten(1).unflatten(-1, (len(weight_GRI), -1)), weight_GRI)


JUDGES: dict[str, Callable[[Any, Inputs], None]] = {
    "hyper_boundary": judge_hyper,
    "router": judge_router,
    "rms_norm": judge_norm,
    "swiglu": judge_swiglu,
    "grouped_linear": judge_grouped,
}


def judge(case: KernelCase, result: Any, inputs: Inputs) -> None:
    """Judges a result. Errors: AssertionError when it is not what the operation defines."""
    JUDGES[case.op](result, inputs)


def tensors(value: Any) -> list[torch.Tensor]:
    """Lists all tensors of a result, in a fixed order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, tuple):
        return [tensor for item in value for tensor in tensors(item)]
    return []


def num_bytes(case: KernelCase, num_tokens: int) -> int:
    """Counts the bytes that any implementation must move: each operand once, each result once."""
    if case.op == "hyper_boundary":
        dim, num_mix, _ = case.sizes
        return 16 * num_mix * dim + num_tokens * (2 * 4 * dim * 2 + 2 * dim * 2)
    if case.op == "router":
        return num_tokens * (4 * case.sizes[0] + 12 * case.sizes[1])
    if case.op == "rms_norm":
        return 4 * num_tokens * case.sizes[0] * max(1, case.sizes[1])
    if case.op == "swiglu":
        return 6 * num_tokens * case.sizes[0]
    num_groups, num_heads, head_dim, _, num_rows = case.sizes
    width = num_heads * head_dim
    return 2 * num_groups * (num_rows * width + num_tokens * (width + num_rows))
