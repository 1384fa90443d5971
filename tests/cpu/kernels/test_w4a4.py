"""The W4A4 twin: its definition spelt out another way, and how close W4A4 comes to unquantised products."""

import pytest
import torch
import torch.nn.functional as F

from ownpath.formats import NVFP4
from ownpath.kernels.nvfp4.ref import nvfp4_moe
from ownpath.kernels.nvfp4_sm100.ref import W4A4Weight, nvfp4_linear_w4a4, nvfp4_moe_w4a4
from ownpath.numerics import dequantize, nvfp4_global_scale, quantize_nvfp4, quantize_nvfp4_activation
from ownpath.qtensor import QuantTensor

LINEAR_BOUND, ORIGIN_LINEAR = 0.995, 0.996
MOE_BOUND, ORIGIN_MOE = 0.985, 0.988
"""Lowest cosine accepted, and what the team this project comes from measured on its own weights and kernels."""


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(F.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0))


def gaussian(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nvfp4(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q = quantize_nvfp4(w)
    assert q.scale is not None
    assert q.global_scale is not None
    return q.qdata, q.scale, q.global_scale


def through_nvfp4(x: torch.Tensor, input_scale: torch.Tensor) -> torch.Tensor:
    return dequantize(quantize_nvfp4_activation(x, input_scale), torch.float64)


def value(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return dequantize(QuantTensor(*parts[:3], NVFP4), torch.float64)


def test_linear_is_the_product_of_both_dequantised_operands() -> None:
    x, (qdata, scale, global_scale) = gaussian(0, 5, 96).double(), nvfp4(gaussian(1, 40, 96))
    input_scale = nvfp4_global_scale(x.float())
    y = nvfp4_linear_w4a4(x, input_scale, qdata, scale, global_scale.expand(40))
    expected = through_nvfp4(x, input_scale) @ value((qdata, scale, global_scale)).T
    # alpha is one float32 product; everything else here is float64.
    torch.testing.assert_close(y, expected, rtol=2.0**-23, atol=0.0)


def random_experts(num_experts: int, dim: int, inter: int) -> tuple[W4A4Weight, W4A4Weight, list[torch.Tensor]]:
    gate_up = gaussian(2, num_experts, 2, inter, dim) * dim**-0.5
    gate_up[:, 1] *= 3  # the up half gets a global scale of its own
    down = gaussian(3, num_experts, dim, inter) * inter**-0.5
    q13, q2 = nvfp4(gate_up), nvfp4(down)
    scales = torch.full((num_experts,), 4.5 / 2688), torch.full((num_experts,), 20 / 2688)
    w13 = (q13[0].flatten(1, 2), q13[1].flatten(1, 2), q13[2], scales[0])
    return w13, (*q2, scales[1]), [gate_up, down]


def test_moe_is_a_loop_over_tokens_with_both_operands_dequantised() -> None:
    num_tokens, limit = 7, 1.5
    w13, w2, _ = random_experts(3, 64, 32)
    x = gaussian(4, num_tokens, 64).double()
    ids = torch.tensor([[0, 2], [1, 0], [2, 2], [-1, 1], [1, 3], [0, 1], [2, 0]])
    weights = torch.rand(num_tokens, 2, generator=torch.Generator().manual_seed(5))
    y = nvfp4_moe_w4a4(x, ids, weights, w13, w2, limit)
    expected = torch.zeros_like(x)
    for token in range(num_tokens):
        for expert, weight in zip(ids[token].tolist(), weights[token].tolist(), strict=True):
            if expert not in range(3):
                continue
            qx = through_nvfp4(x[token, None], w13[3][expert])
            halves = [(w13[0][expert][rows], w13[1][expert][rows], w13[2][expert, half]) for half, rows in HALVES]
            gate, up = (qx @ value(half).T for half in halves)
            h = F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
            qh = through_nvfp4(h, w2[3][expert])
            expected[token] += weight * (qh @ value((w2[0][expert], w2[1][expert], w2[2][expert])).T)[0]
    # Three float32 products (alpha of gate, up and down) lie between the two; everything else is float64.
    assert (y - expected).norm() <= 4 * 2.0**-24 * expected.norm()


HALVES = ((0, slice(0, 32)), (1, slice(32, 64)))


def test_cosine_of_a_linear_beside_the_origins() -> None:
    """wo_b's K, Gaussian operands. The reference is the product with unquantised activations.

    With independent roundings the cosine is 1 / sqrt(1 + e^2), where e is the relative error of the quantised
    activations, which NVFP4's definition fixes; the bound leaves half a percent for the sample.
    """
    w, x = gaussian(6, 512, 8192) * 8192**-0.5, gaussian(7, 32, 8192).bfloat16().float()
    qdata, scale, global_scale = nvfp4(w)
    input_scale = nvfp4_global_scale(x)
    y = nvfp4_linear_w4a4(x, input_scale, qdata, scale, global_scale.expand(512))
    dequantised = x @ value((qdata, scale, global_scale)).float().T
    error = float((through_nvfp4(x, input_scale) - x).norm() / x.norm())
    found = cosine(y, dequantised)
    against_unquantised = cosine(y, x @ w.T)
    print(
        f"linear: {found:.4f} (origin {ORIGIN_LINEAR}), against BF16 weights {against_unquantised:.4f}, e {error:.4f}"
    )
    assert found >= LINEAR_BOUND
    assert found == pytest.approx((1 + error**2) ** -0.5, abs=5e-4)
    assert against_unquantised >= LINEAR_BOUND**2


def test_cosine_of_the_experts_beside_the_origins() -> None:
    """Two of two experts, width D = 2048, F = 1024, Gaussian operands, gate and up of unit size as in V4.

    Three roundings of size e (x in gate, x in up, h) add up to at most 3 e^2 of relative square error.
    """
    num_tokens = 16
    w13, w2, (gate_up, down) = random_experts(2, 2048, 1024)
    x = gaussian(8, num_tokens, 2048).bfloat16().float()
    ids, weights = torch.tensor([[0, 1]] * num_tokens), torch.full((num_tokens, 2), 0.75)
    y = nvfp4_moe_w4a4(x, ids, weights, w13, w2, 10.0)
    dequantised = nvfp4_moe(x, ids, weights, w13[:3], w2[:3], 10.0)
    hidden = [F.silu((x @ w[0].T).clamp(max=10)) * (x @ w[1].T).clamp(-10, 10) for w in gate_up]
    unquantised = sum(0.75 * h @ w.T for h, w in zip(hidden, down, strict=True))
    assert isinstance(unquantised, torch.Tensor)
    error = float((through_nvfp4(x, w13[3][0]) - x).norm() / x.norm())
    found, against_unquantised = cosine(y, dequantised), cosine(y, unquantised)
    print(f"experts: {found:.4f} (origin {ORIGIN_MOE}), against BF16 weights {against_unquantised:.4f}, e {error:.4f}")
    assert found >= MOE_BOUND
    assert found >= (1 + 3 * error**2) ** -0.5 - 2e-3
    assert against_unquantised >= MOE_BOUND**2
