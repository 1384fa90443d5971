"""Inputs of FP8 products that are rounded twice, by official numerics and by the Hopper kernel, are rounded once."""

import torch

from ownpath.conformance.quant_weights import draw_weights
from ownpath.kernels.fp8.cases import Fp8Case
from ownpath.kernels.fp8.layout import pack_fp8
from ownpath.kernels.fp8.linear import fp8_linear
from ownpath.kernels.fp8.ref import fp8_w8a8, quantize_rows
from ownpath.kernels.fp8.spec import PREFILL_FROM
from ownpath.numerics import fake_quantize_fp8

CPU = torch.device("cpu")


def rows_of_every_size(width: int) -> torch.Tensor:
    """Rows of normal values whose largest is in turn at, below and between powers of two, from 2^-30 to 2^30."""
    generator = torch.Generator().manual_seed(1)
    tops = torch.tensor([1.0, 1.02, 1.03125, 1.5, 1.75, 1.76, 1.99])
    sizes = (tops[None, :] * 2.0 ** torch.arange(-30, 31)[:, None]).flatten()
    x = torch.randn(len(sizes), width, generator=generator)
    return (x / x.abs().amax(1, keepdim=True) * sizes[:, None]).bfloat16()


def test_a_second_rounding_changes_no_value() -> None:
    x = rows_of_every_size(128)
    values = []
    for given in (x, fake_quantize_fp8(x, 128)):
        codes, scales = quantize_rows(given, power_of_two=True)
        values.append(codes.view(torch.float8_e4m3fn).double() * scales.double()[..., None])
    assert torch.equal(*values)


def test_a_product_has_the_same_bits() -> None:
    weight = pack_fp8(*draw_weights(Fp8Case("small", (192,), 256, "e8m0"), 0, CPU))
    x = rows_of_every_size(256)
    found = [torch.empty(len(x), 192) for _ in range(2)]
    fp8_w8a8(x, weight, found[0], torch.empty(0))
    fp8_w8a8(fake_quantize_fp8(x, 128), weight, found[1], torch.empty(0))
    assert torch.equal(*found)


def test_only_products_of_many_rows_with_scales_of_e8m0_round_themselves() -> None:
    for scales, rounds in (("e8m0", True), ("float32", False)):
        weight = pack_fp8(*draw_weights(Fp8Case("small", (192,), 256, scales), 0, CPU))
        operand = type("Operand", (), {"weight": weight})()
        assert fp8_linear.rounds_to_powers(operand, PREFILL_FROM) is rounds
        assert not fp8_linear.rounds_to_powers(operand, PREFILL_FROM - 1)
