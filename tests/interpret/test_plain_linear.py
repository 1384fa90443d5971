"""The batch-invariant product with unquantised weights, interpreted: right against float64, and the same bits alone."""

import pytest
import torch

from ownpath.kernels.plain.invariant import plain_linear_invariant

SHAPES = [(1, 64, 64), (3, 4, 136), (17, 70, 96), (2, 5, 51)]
DTYPES = [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16), (torch.float32, torch.float32)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("x_dtype", "w_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_against_float64(
    shape: tuple[int, int, int], x_dtype: torch.dtype, w_dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    num_tokens, num_rows, width = shape
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, 2 * width, generator=generator).to(x_dtype)[:, width:]
    weight = torch.randn(num_rows, width, generator=generator).to(w_dtype)
    y = plain_linear_invariant(x, weight, out_dtype)
    exact, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    # One rounding of the result, and float32 sums of `width` terms.
    bound = torch.finfo(out_dtype).eps / 2 * exact.abs() + width * torch.finfo(torch.float32).eps * size
    assert y.dtype == out_dtype
    assert ((y.double() - exact).abs() <= bound).all()


def test_a_token_alone_has_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(19, 128, generator=generator).bfloat16()
    weight = torch.randn(32, 128, generator=generator).bfloat16()
    together = plain_linear_invariant(x, weight, torch.float32)
    for idx in (0, 7, 18):
        assert torch.equal(plain_linear_invariant(x[idx : idx + 1], weight, torch.float32)[0], together[idx])


def test_what_does_not_fit_is_named() -> None:
    weight = torch.zeros(8, 16)
    with pytest.raises(ValueError, match=r"x must be \[T, 16\]"):
        plain_linear_invariant(torch.zeros(2, 24), weight, torch.float32)
    with pytest.raises(ValueError, match="weight must be"):
        plain_linear_invariant(torch.zeros(2, 16), weight.double(), torch.float32)
    with pytest.raises(ValueError, match="contiguous rows"):
        plain_linear_invariant(torch.zeros(16, 2).T, weight, torch.float32)
    assert plain_linear_invariant(torch.zeros(0, 16), weight, torch.float32).shape == (0, 8)
