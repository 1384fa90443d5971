"""vLLM's hyper-connections for CPUs and ours on the same random inputs: both within the bound of float32 arithmetic.

The exact values come from float64. u is float32's rounding unit, v that of the stored bfloat16. The bounds:
  logits    a sum of n = S * D products, in any order, errs by n u of the sum of magnitudes; the root mean square, a sum
            of squares, by n / 2 u of its value. With scale and base a few more roundings.
  post      twice a sigmoid, which has slope 1/4.
  comb      a softmax errs by e^(2 dl) - 1 of its value. Each of the 2 * iters - 1 normalisations is a change of a row's
            or a column's factor, whose error is at most the largest error of the other factors plus that of the matrix:
            the errors add up, they do not multiply.
  h, x      a sum of four or five products, rounded once to bfloat16.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import ask, greedy, prompts, reference
from torch import Tensor

from ownpath.integrations.vllm.hyper import REFERENCE, Hyper
from ownpath.kernels.hyper.ref import HyperWeights, Mix, hyper_post, hyper_pre
from ownpath.loading import default_model_dir

kernels = pytest.importorskip("vllm.model_executor.kernels.mhc.cpu")

U, V = 2.0**-24, 2.0**-8
EPS, ITERS, DIM, STREAMS = 1e-6, 20, 256, 4
SIZES = (1, 2, 5, 64, 130)


@dataclass(frozen=True)
class Inputs:
    """x [T, S, D] and y [T, D] bfloat16; weights of a boundary float32; mix float32."""

    x: Tensor
    y: Tensor
    weights: HyperWeights
    mix: Mix


def make_inputs(num_tokens: int, num_mix: int = 24) -> Inputs:
    generator = torch.Generator().manual_seed(num_tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, y = (4 * normal(num_tokens, STREAMS, DIM)).bfloat16(), normal(num_tokens, DIM).bfloat16()
    fn, base = normal(num_mix, STREAMS * DIM) / 32, normal(num_mix) / 2
    scale = 0.5 + torch.rand(3 if num_mix == 24 else 1, generator=generator)
    weights = HyperWeights(fn, base, scale, torch.ones(DIM).bfloat16(), ITERS, EPS, EPS, EPS)
    comb = torch.softmax(normal(num_tokens, STREAMS, STREAMS), -1)
    return Inputs(x, y, weights, Mix(2 * torch.sigmoid(normal(num_tokens, STREAMS)), comb))


def in_float64(weights: HyperWeights) -> HyperWeights:
    tensors = (part.double() for part in (weights.fn, weights.base, weights.scale, weights.norm_weight))
    return HyperWeights(*tensors, weights.num_iters, weights.eps, weights.mix_norm_eps, weights.norm_eps)


def logit_errors(inputs: Inputs) -> Tensor:
    """The largest error of a float32 logit, [T, M]."""
    flat, weights = inputs.x.double().flatten(1), in_float64(inputs.weights)
    n = flat.shape[1]
    rms = torch.rsqrt(flat.square().mean(1, keepdim=True) + EPS)
    magnitudes, products = rms * (flat.abs() @ weights.fn.abs().T), rms * (flat @ weights.fn.T)
    sizes = [STREAMS, STREAMS, STREAMS**2] if len(weights.fn) == 24 else [STREAMS]
    scale = torch.repeat_interleave(weights.scale, torch.tensor(sizes))
    wide = scale.abs() * (n * magnitudes + (n / 2 + 8) * products.abs()) + 4 * (scale * products + weights.base).abs()
    return U * wide / (1 - n * U)


def assert_within(found: Tensor, exact: Tensor, bound: Tensor, what: str) -> float:
    """Returns the largest share of the bound that is used."""
    assert found.shape == exact.shape, what
    share = float(((found.double() - exact).abs() / bound).max())
    assert share <= 1, f"{what}: {share:.3g} of the bound"
    return share


def collapse_bound(inputs: Inputs, pre: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
    """The exact layer input and the largest error of a bfloat16 one. pre: [T, S]; errors: of pre."""
    x = inputs.x.double()
    exact = (pre.unsqueeze(-1) * x).sum(1)
    magnitudes = (pre.unsqueeze(-1) * x.abs()).sum(1)
    inside = (errors.unsqueeze(-1) * x.abs()).sum(1) + 6 * U * magnitudes
    return exact, inside + V * (exact.abs() + inside)


def pre_errors(logit_error: Tensor) -> Tensor:
    return logit_error / 4 + 8 * U


@pytest.mark.parametrize("num_tokens", SIZES)
def test_pre_is_the_same_within_float32(num_tokens: int) -> None:
    inputs = make_inputs(num_tokens)
    weights, errors = inputs.weights, logit_errors(inputs)
    given = (inputs.x, weights.fn, weights.scale, weights.base, EPS, EPS, EPS, 2.0, ITERS)
    exact_h, exact = hyper_pre(inputs.x.double(), in_float64(weights))
    assert exact is not None
    softmax = 2 * errors[:, 8:].amax(1) + 16 * U
    comb_bound = torch.expm1(2 * (2 * ITERS - 1) * (softmax + 8 * U))[:, None, None] * exact.comb_TSS
    flat = inputs.x.double().flatten(1)
    logits = torch.rsqrt(flat.square().mean(1, keepdim=True) + EPS) * (flat @ weights.fn.double().T)
    pre = torch.sigmoid(logits[:, :4] * weights.scale[0].double() + weights.base[:4].double()) + EPS
    h, h_bound = collapse_bound(inputs, pre, pre_errors(errors[:, :4]))
    assert torch.allclose(h, exact_h, rtol=1e-12)
    for name, compute in (("vLLM", kernels.mhc_pre_cpu), ("ours", Hyper(REFERENCE).pre)):
        post, comb, found = compute(*given)
        assert post.shape == (num_tokens, STREAMS, 1)
        assert post.dtype == comb.dtype == torch.float32
        assert_within(post[..., 0], exact.post_TS, errors[:, 4:8] / 2 + 16 * U, f"{name}: post")
        assert_within(comb, exact.comb_TSS, comb_bound, f"{name}: comb")
        assert_within(found, h, h_bound, f"{name}: layer input")


@pytest.mark.parametrize("num_tokens", SIZES)
def test_post_is_the_same_within_float32(num_tokens: int) -> None:
    inputs = make_inputs(num_tokens)
    post, comb = (part.double() for part in inputs.mix)
    exact = hyper_post(inputs.x.double(), inputs.y.double(), Mix(post, comb))
    spread = post.unsqueeze(-1) * inputs.y.double().abs().unsqueeze(1)
    inside = 8 * U * (spread + comb.transpose(1, 2) @ inputs.x.double().abs())
    for name, compute in (("vLLM", kernels.mhc_post_cpu), ("ours", Hyper(REFERENCE).post)):
        found = compute(inputs.y, inputs.x, inputs.mix.post_TS.unsqueeze(-1), inputs.mix.comb_TSS)
        assert_within(found, exact, inside + V * (exact.abs() + inside), f"{name}: streams")


@pytest.mark.parametrize("num_tokens", SIZES)
def test_head_is_the_same_within_float32(num_tokens: int) -> None:
    inputs = make_inputs(num_tokens, num_mix=4)
    weights, errors = inputs.weights, logit_errors(inputs)
    flat = inputs.x.double().flatten(1)
    logits = torch.rsqrt(flat.square().mean(1, keepdim=True) + EPS) * (flat @ weights.fn.double().T)
    pre = torch.sigmoid(logits * weights.scale.double() + weights.base.double()) + EPS
    h, h_bound = collapse_bound(inputs, pre, pre_errors(errors))
    for name, compute in (("vLLM", kernels.hc_head_fused_cpu), ("ours", Hyper(REFERENCE).head)):
        found = compute(inputs.x, weights.fn, weights.scale, weights.base, EPS, EPS)
        assert_within(found, h, h_bound, f"{name}: head")


def test_the_bound_sees_a_transposed_mix() -> None:
    """A bound that lets everything through proves nothing."""
    inputs = make_inputs(5)
    errors = logit_errors(inputs)
    _, exact = hyper_pre(inputs.x.double(), in_float64(inputs.weights))
    assert exact is not None
    softmax = 2 * errors[:, 8:].amax(1) + 16 * U
    bound = torch.expm1(2 * (2 * ITERS - 1) * (softmax + 8 * U))[:, None, None] * exact.comb_TSS
    with pytest.raises(AssertionError, match="of the bound"):
        assert_within(exact.comb_TSS.transpose(1, 2), exact.comb_TSS, bound, "comb")


@pytest.mark.vllm
@pytest.mark.parametrize(("parts", "taken"), [("all", True), ("linears,experts,wo_a", False)])
def test_the_model_answers_the_same_with_either(parts: str, taken: bool, tmp_path: Path) -> None:
    """The embedded model inside vLLM: our own engine's greedy ids, with our hyper-connections and with vLLM's."""
    found = ask(default_model_dir(), tmp_path / "out.json", {"prompts": prompts()}, OWNPATH_VLLM=parts)
    own = reference(default_model_dir())
    assert found.ids == [greedy(own, ids, 4) for ids in prompts()]
    assert ("hyper-connections: ref.hyper_boundary in place of vLLM's (MHCPreOp" in found.log) == taken
