"""The products with unquantised weights on the device, at V4-Flash's shapes, against float64."""

import pytest
import torch

from ownpath.conformance.bounds import deviation
from ownpath.conformance.exact import product
from ownpath.kernels.plain.cases import CASES, PlainCase
from ownpath.kernels.registry import KERNELS

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", ["torch.plain_linear", "triton.plain_linear_few", "triton.plain_linear_invariant"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_against_float64(name: str, case: PlainCase, cuda: torch.device) -> None:
    generator = torch.Generator(cuda).manual_seed(0)
    x = torch.randn(max(case.tokens), case.width, generator=generator, device=cuda).bfloat16()
    weight = torch.randn(case.num_rows, case.width, generator=generator, device=cuda).bfloat16()
    exact = product(x.double(), weight.double())
    for num_tokens in case.tokens:
        y = KERNELS[name](x[:num_tokens], weight, torch.float32 if case.is_wide else torch.bfloat16)
        found = deviation(y, exact.rows(slice(num_tokens)))
        assert found.is_allowed, (num_tokens, str(found))
