"""Compares the W4A4 kernels with their torch twins on the device that they will serve, once per process.

The problem is random but exact: codes of activations and weights are E2M1 values and every scale is a power of two in
a narrow range, so that quantisation loses nothing and every sum of products fits float32's 24 bits, in any order. A
linear must therefore give the twin's bits, so that no tolerance can hide a wrong nibble order, scale layout or global
scale. The experts' SwiGLU has an exp, so their result must agree within BF16's rounding instead.
"""

import functools

import torch

from ownpath.kernels.contract import ExpertsKernel, LinearKernel, Routing
from ownpath.kernels.nvfp4_sm100.layout import W4A4LinearOperand, W4A4MoeOperand, linear_operand, moe_operand
from ownpath.kernels.nvfp4_sm100.ref import nvfp4_linear_w4a4, nvfp4_moe_w4a4
from ownpath.numerics import decode_e2m1, encode_e4m3

BF16_EPS = 2.0**-8


class ProofError(RuntimeError):
    """Raised when a kernel's result on this device differs from its twin's; the message says by how much."""


@functools.cache
def prove_linear(kernel: LinearKernel[W4A4LinearOperand], device: torch.device) -> None:
    """Compares the dense kernel with its twin: 129 rows (two tiles), two shards, K that no tile divides.

    Errors: ProofError when a bit differs.
    """
    generator = torch.Generator().manual_seed(0)
    n, k = 264, 320
    x = _exact_activations(129, k, generator)
    qdata, scale = _exact_weight((n, k), generator)
    global_scale = torch.where(torch.arange(n) < 128, 0.25, 2.0)
    input_scale = torch.tensor(0.5)
    x, qdata, scale, global_scale, input_scale = (
        tensor.to(device) for tensor in (x, qdata, scale, global_scale, input_scale)
    )
    y = kernel.run(x, linear_operand(qdata, scale, global_scale, input_scale))
    expected = nvfp4_linear_w4a4(x, input_scale, qdata, scale, global_scale)
    differing = int((y != expected).sum())
    if differing:
        raise ProofError(
            f"{type(kernel).__name__} on {device}: {differing} of {y.numel()} values differ from the twin's"
        )


@functools.cache
def prove_moe(kernel: ExpertsKernel[W4A4MoeOperand], device: torch.device) -> None:
    """Compares the experts' kernels with their twin: empty experts, one with two tiles, one choice elsewhere.

    Errors: ProofError when the relative L2 difference exceeds BF16's epsilon or a value is not finite.
    """
    generator = torch.Generator().manual_seed(1)
    num_experts, dim, inter, num_tokens = 5, 256, 128, 140
    x = _exact_activations(num_tokens, dim, generator)
    q13, q2 = (_exact_weight((num_experts, *shape), generator) for shape in ((2 * inter, dim), (dim, inter)))
    ids = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(num_tokens)])
    ids[:, 0] = torch.where(torch.arange(num_tokens) < 130, 4, -1)
    weights = torch.rand(num_tokens, 2, generator=generator) + 0.1
    gains = 2.0 ** torch.randint(-7, -3, (num_experts, 4), generator=generator)
    x, ids, weights, gains = (tensor.to(device) for tensor in (x, ids, weights, gains))
    codes13, scale13, codes2, scale2 = (part.to(device) for part in (*q13, *q2))
    w13 = (codes13, scale13, gains[:, :2].contiguous(), torch.full_like(gains[:, 0], 0.5))
    w2 = (codes2, scale2, gains[:, 2].contiguous(), gains[:, 3].contiguous())
    y = kernel.run(x, Routing(ids, weights), moe_operand(w13, w2, 8.0))
    expected = nvfp4_moe_w4a4(x, ids, weights, w13, w2, 8.0)
    difference = float((y - expected).float().norm() / expected.float().norm())
    if not difference <= BF16_EPS:
        raise ProofError(f"{type(kernel).__name__} on {device}: relative difference {difference:.2e} from the twin")


def _exact_activations(num_rows: int, k: int, generator: torch.Generator) -> torch.Tensor:
    """Makes BF16 values that NVFP4 holds exactly: E2M1 values with a 6 in each block, times a power of two for each."""
    values = decode_e2m1(torch.randint(0, 16, (num_rows, k // 16, 16), dtype=torch.uint8, generator=generator))
    values[..., 5] = 6.0
    exponent = torch.randint(-1, 2, (num_rows, k // 16, 1), generator=generator)
    return (values * 2.0**exponent).view(num_rows, k).to(torch.bfloat16)


def _exact_weight(shape: tuple[int, ...], generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Makes random packed codes [..., N, K/2] and power-of-two E4M3 scales [..., N, K/16]."""
    *lead, k = shape
    qdata = torch.randint(0, 256, (*lead, k // 2), dtype=torch.uint8, generator=generator)
    exponent = torch.randint(-1, 2, (*lead, k // 16), generator=generator)
    return qdata, encode_e4m3(2.0**exponent)
