"""The small operations' table: shapes, inputs, bytes, and how a result is judged. Tests and bench share it.

A judge compares with float64 of the same operands. Bounds come from the formats: BF16 is the unit roundoff of the
stored results, F32 that of the arithmetic, and each bound names how many roundings it covers.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ownpath.kernels.grouped import ref as grouped
from ownpath.kernels.hyper import ref as hyper
from ownpath.kernels.norms import ref as norms
from ownpath.kernels.swiglu import ref as swiglu

BF16, F32 = 2.0**-8, 2.0**-24
Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Case:
    """One op at one shape. kernel: registry names are ``ref.<op>`` and ``triton.<kernel>``.

    tiny: small enough to be interpreted on a CPU; bench: worth a row of the bench's table.
    """

    op: str
    label: str
    sizes: tuple[int, ...]
    tokens: tuple[int, ...]
    tiny: bool = False
    bench: bool = False
    variant: str = ""

    @property
    def kernel(self) -> str:
        return self.op + self.variant


FEW, MANY = (1, 2, 3, 4, 5, 7, 16), (17, 33, 64, 129, 255, 1024)
HYPER = (
    Case("hyper_boundary", "tiny", (256, 24, 1), (1, 3, 5, 17), tiny=True),
    Case("hyper_boundary", "odd", (392, 24, 1), (2, 6), tiny=True),
    Case("hyper_boundary", "first", (256, 24, 0), (1, 6), tiny=True),
    Case("hyper_boundary", "last", (256, 4, 1), (1, 6), tiny=True),
    Case("hyper_boundary", "tiny", (256, 24, 1), (1, 17), tiny=True, variant="_invariant"),
    Case("hyper_boundary", "flash", (4096, 24, 1), (*FEW, *MANY, 4096), bench=True),
    Case("hyper_boundary", "flash", (4096, 24, 1), (1, 64, 255), bench=True, variant="_invariant"),
    Case("hyper_boundary", "flash last", (4096, 4, 1), (1, 64)),
    Case("hyper_boundary", "flash first", (4096, 24, 0), (1, 64)),
    Case("hyper_boundary", "pro", (7168, 24, 1), (*FEW, *MANY), bench=True),
)
ROUTER = (
    Case("router", "tiny", (8, 2, 0), (1, 5), tiny=True),
    Case("router", "flash", (256, 6, 0), (1, 7, 64, 1024, 4096), tiny=False, bench=True),
    Case("router", "flash", (256, 6, 0), (1, 3), tiny=True),
    Case("router", "pro", (384, 6, 0), (1, 3), tiny=True),
    Case("router", "pro", (384, 6, 0), (64, 1024), bench=True),
    Case("router", "by token", (256, 6, 1), (1, 5), tiny=True),
    Case("router", "by token", (256, 6, 1), (64, 1024), bench=True),
)
NORM = (  # width, heads (0: rows only), width of the tensor that rows are a slice of
    Case("rms_norm", "hidden", (4096, 0, 4096), (1, 64, 4096), bench=True),
    Case("rms_norm", "slice of wqa_wkv", (1024, 0, 1536), (1, 3), tiny=True),
    Case("rms_norm", "slice of wqa_wkv", (1024, 0, 1536), (64, 255, 4096), bench=True),
    Case("rms_norm", "heads, no weight", (512, 4, 512), (1, 33), tiny=True),
    Case("rms_norm", "heads, no weight", (512, 64, 512), (1, 64, 1024), bench=True),
    Case("rms_norm", "pro hidden", (7168, 0, 7168), (1, 64)),
    Case("rms_norm", "odd", (264, 0, 264), (1, 9), tiny=True),
)
SWIGLU = (
    Case("swiglu", "tiny", (136,), (1, 5), tiny=True),
    Case("swiglu", "flash shared", (2048,), (1, 64, 4096), bench=True),
    Case("swiglu", "pro shared", (3072,), (1, 255)),
)
GROUPED = (  # groups, heads per group, head dim, rotary channels, rows
    Case("grouped_linear", "tiny", (2, 2, 512, 64, 128), (1, 5, 17), tiny=True),
    Case("grouped_linear", "short heads", (3, 4, 64, 32, 64), (1, 33), tiny=True),
    Case("grouped_linear", "tiny", (2, 2, 512, 64, 128), (1, 17), tiny=True, variant="_invariant"),
    Case("grouped_linear", "flash", (8, 8, 512, 64, 1024), (1, 33, 255), variant="_invariant"),
    Case(
        "grouped_linear",
        "flash",
        (8, 8, 512, 64, 1024),
        (1, 8, 16, 17, 32, 33, 64, 127, 128, 255, 1024, 4096),
        bench=True,
    ),
)
GROUPED_INVARIANT = tuple(replace(case, tokens=case.tokens[:3], bench=False, variant="_invariant") for case in GROUPED)
CASES = (*HYPER, *ROUTER, *NORM, *SWIGLU, *GROUPED, *GROUPED_INVARIANT)


def _uniform(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=generator, device=generator.device)


def _normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device)


def hyper_inputs(case: Case, num_tokens: int, g: torch.Generator) -> Inputs:
    """Streams, output and mix of the sublayer before, weights of the coming one."""
    dim, num_mix, has_post = case.sizes
    x_TSD = _normal(g, num_tokens, 4, dim).bfloat16()
    fn = _normal(g, num_mix, 4 * dim) * (4 * dim) ** -0.5
    scale = _uniform(g, 3 if num_mix == 24 else 1) + 0.5
    norm_weight = (1 + 0.1 * _normal(g, dim)).bfloat16()
    weights = hyper.HyperWeights(fn, _normal(g, num_mix), scale, norm_weight, 20, 1e-6, 1e-6, 1e-6)
    if not has_post:
        return x_TSD, None, None, weights
    comb_TSS = hyper.sinkhorn(_normal(g, num_tokens, 4, 4), 20, 1e-6)
    return x_TSD, _normal(g, num_tokens, dim).bfloat16(), hyper.Mix(2 * _uniform(g, num_tokens, 4), comb_TSS), weights


def router_inputs(case: Case, num_tokens: int, g: torch.Generator) -> Inputs:
    """Logits over several magnitudes; half of the cases choose by token id."""
    num_experts, k, by_token = case.sizes
    logits_TE = _normal(g, num_tokens, num_experts) * 10 ** (2 * _uniform(g, num_tokens, 1) - 1)
    if not by_token:
        return logits_TE, k, 2.5, _normal(g, num_experts), None, None
    table = _uniform(g, 1000, num_experts).argsort(dim=1)[:, :k].contiguous()
    token_ids_T = (_uniform(g, num_tokens) * 1000).long()
    return logits_TE, k, 2.5, None, token_ids_T, table


def norm_inputs(case: Case, num_tokens: int, g: torch.Generator) -> Inputs:
    """Rows of several magnitudes, as a slice of a wider tensor or as heads without a weight."""
    dim, num_heads, pitch = case.sizes
    if num_heads:
        return (_normal(g, num_tokens, num_heads, dim) * 3).bfloat16(), None, 1e-6
    x = (_normal(g, num_tokens, pitch) * 10 ** (4 * _uniform(g, num_tokens, 1) - 2)).bfloat16()
    return x[:, :dim], (1 + 0.1 * _normal(g, dim)).bfloat16(), 1e-6


def swiglu_inputs(case: Case, num_tokens: int, g: torch.Generator) -> Inputs:
    """Values on both sides of the clamp, and exactly on it."""
    gate_up = _normal(g, num_tokens, 2 * case.sizes[0]) * 8
    gate_up[:, ::7] = 10.0
    gate_up[:, 3::11] = -10.0
    return gate_up.bfloat16(), 10.0


def grouped_inputs(case: Case, num_tokens: int, g: torch.Generator) -> Inputs:
    """Attention outputs, angles of positions up to a million, one matrix per group."""
    num_groups, num_heads, head_dim, rotary_dim, num_rows = case.sizes
    o_TNH = _normal(g, num_tokens, num_groups * num_heads, head_dim).bfloat16()
    angles_TA = _uniform(g, num_tokens, rotary_dim // 2) * 1e6
    width = num_heads * head_dim
    weight_GRI = (_normal(g, num_groups, num_rows, width) * width**-0.5).bfloat16()
    return o_TNH, angles_TA.cos(), angles_TA.sin(), weight_GRI


INPUTS: dict[str, Callable[[Case, int, torch.Generator], Inputs]] = {
    "hyper_boundary": hyper_inputs,
    "router": router_inputs,
    "rms_norm": norm_inputs,
    "swiglu": swiglu_inputs,
    "grouped_linear": grouped_inputs,
}


def make_inputs(case: Case, num_tokens: int, device: torch.device, seed: int = 0) -> Inputs:
    """Fresh random operands of a case."""
    return INPUTS[case.op](case, num_tokens, torch.Generator(device).manual_seed(seed))


def _within(name: str, got: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor) -> None:
    """Every element finite and within its bound; the message gives the first that is not."""
    assert got.isfinite().all(), f"{name}: not finite"
    excess = (got.double() - expected).abs() - bound
    if (excess > 0).any():
        at = tuple(int(i) for i in (excess > 0).nonzero()[0])
        raise AssertionError(f"{name}{list(at)}: {got[at].item()} instead of {expected[at].item()}")


def _close(name: str, got: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
    """Relative L2 distance at most ``limit``."""
    distance = ((got.double() - expected).norm() / expected.norm()).item()
    assert distance <= limit, f"{name}: relative L2 {distance:.2e} above {limit:.2e}"


def _wide(weights: hyper.HyperWeights) -> hyper.HyperWeights:
    wide = [getattr(weights, name).double() for name in ("fn", "base", "scale", "norm_weight")]
    return replace(weights, fn=wide[0], base=wide[1], scale=wide[2], norm_weight=wide[3])


def judge_hyper(result: hyper.HyperOut, inputs: Inputs) -> None:
    """Streams against float64; then everything else against float64 of the streams that were stored."""
    x_TSD, y_TD, mix, weights = inputs
    new_TSD = result.x_TSD.double()
    if mix is None:
        assert torch.equal(result.x_TSD, x_TSD)
    else:
        wide_mix = hyper.Mix(mix.post_TS.double(), mix.comb_TSS.double())  # not negative
        expected = hyper.hyper_post(x_TSD.double(), y_TD.double(), wide_mix)
        terms = hyper.hyper_post(x_TSD.double().abs(), y_TD.double().abs(), wide_mix)
        _within("x", result.x_TSD, expected, BF16 * expected.abs() + 8 * F32 * terms)
    wide = _wide(weights)
    found = hyper.hyper_boundary(new_TSD, None, None, wide)
    # Collapsed input and normalised input are rounded once each; the norm's divisor sees the first rounding.
    loose = 64 * F32 * new_TSD.abs().sum(1) * wide.norm_weight.abs()
    divisor = hyper.hyper_pre(new_TSD, wide)[0].square().mean(-1, keepdim=True).sqrt()
    _within("h", result.h_TD, found.h_TD, 3 * BF16 * found.h_TD.abs() + loose / divisor)
    _close("h", result.h_TD, found.h_TD, 3e-3)
    assert (result.mix is None) == (found.mix is None)
    if result.mix is not None and found.mix is not None:
        # Sums of 16384 products in blocks, then 39 divisions: 128 float32 roundings cover them.
        _close("post", result.mix.post_TS, found.mix.post_TS, 128 * F32)
        _close("comb", result.mix.comb_TSS, found.mix.comb_TSS, 128 * F32)


def judge_router(result: tuple[torch.Tensor, torch.Tensor], inputs: Inputs) -> None:
    """Chosen experts are the best up to float32 rounding of their scores; weights follow from the chosen ones."""
    logits_TE, k, factor, bias_E, token_ids_T, table = inputs
    ids_TK, weights_TK = result[0].long(), result[1]
    scores_TE = torch.nn.functional.softplus(logits_TE.double()).sqrt()
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
    chosen_TK = scores_TE.gather(1, ids_TK)
    expected = chosen_TK / chosen_TK.sum(1, keepdim=True) * factor
    _within("weights", weights_TK, expected, 64 * F32 * expected)


def judge_norm(result: torch.Tensor, inputs: Inputs) -> None:
    x, weight, eps = inputs
    expected = norms.rms_norm(x.double(), None if weight is None else weight.double(), eps)
    _within("y", result, expected, (BF16 + 16 * F32) * expected.abs())


def judge_swiglu(result: torch.Tensor, inputs: Inputs) -> None:
    gate_up, limit = inputs
    expected = swiglu.swiglu(gate_up.double(), limit)
    # exp's argument is rounded once: an error of |gate| roundings. Below float32's normal range, zero is right.
    wide = (2 * gate_up.double().abs().chunk(2, dim=-1)[0] + 16) * F32
    _within("y", result, expected, (BF16 + wide) * expected.abs() + 2.0**-126)


def judge_grouped(result: torch.Tensor, inputs: Inputs) -> None:
    """Un-rotated channels are rounded to bfloat16 once before the product, the product once after it."""
    o_TNH, cos_TA, sin_TA, weight_GRI = inputs
    wide = (o_TNH.double(), cos_TA.double(), sin_TA.double())
    expected = grouped.rope_grouped_linear(*wide, weight_GRI.double())
    turned = grouped.rope_inverse(*wide).abs()
    terms = grouped.rope_grouped_linear(turned, cos_TA.double() * 0 + 1, sin_TA.double() * 0, weight_GRI.double().abs())
    turned[..., : -2 * cos_TA.shape[1]] = 0
    ends = grouped.rope_grouped_linear(turned, cos_TA.double() * 0 + 1, sin_TA.double() * 0, weight_GRI.double().abs())
    bound = BF16 * expected.abs() + BF16 * ends + weight_GRI.shape[-1] / 16 * 2 * F32 * terms
    _within("y", result, expected, bound)
    _close("y", result, expected, 3e-3)


JUDGES: dict[str, Callable[[Any, Inputs], None]] = {
    "hyper_boundary": judge_hyper,
    "router": judge_router,
    "rms_norm": judge_norm,
    "swiglu": judge_swiglu,
    "grouped_linear": judge_grouped,
}


def judge(case: Case, result: Any, inputs: Inputs) -> None:
    """Errors: AssertionError when the result is not what the operation defines."""
    JUDGES[case.op](result, inputs)


def tensors(value: Any) -> list[torch.Tensor]:
    """All tensors of a result, in a fixed order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, tuple):
        return [tensor for item in value for tensor in tensors(item)]
    if isinstance(value, hyper.HyperOut):
        mix = [] if value.mix is None else [value.mix.post_TS, value.mix.comb_TSS]
        return [value.x_TSD, value.h_TD, *mix]
    return []


def num_bytes(case: Case, num_tokens: int) -> int:
    """Bytes that any implementation must move: each operand once, each result once."""
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
