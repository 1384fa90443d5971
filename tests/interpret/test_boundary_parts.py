"""The boundary behind experts adds their two outputs: no bit is other than behind their stored sum."""

import pytest
import torch

from ownpath.conformance.call import tensors_of
from ownpath.conformance.operations import make_inputs
from ownpath.kernels.cases import KernelCase
from ownpath.kernels.registry import KERNELS


@pytest.mark.parametrize(
    ("kernel", "num_tokens"),
    [
        *(("triton.hyper_boundary", num_tokens) for num_tokens in (1, 17)),  # few tokens have other code than many
        *(("triton.hyper_boundary_invariant", num_tokens) for num_tokens in (1, 3)),
        ("ref.hyper_boundary", 17),
    ],
)
def test_two_parts_are_their_sum(kernel: str, num_tokens: int) -> None:
    case = KernelCase("hyper_boundary", "two parts", (40, 24, 2), (num_tokens,))
    x_TSD, y_TD, mix, weights, other_TD = make_inputs(case, num_tokens, torch.device("cpu"))
    y_TD[0] *= 2.0**-7  # sums that round
    found = KERNELS[kernel](x_TSD, y_TD, mix, weights, other_TD)
    expected = KERNELS[kernel](x_TSD, y_TD + other_TD, mix, weights)
    assert all(torch.equal(one, two) for one, two in zip(tensors_of(found), tensors_of(expected), strict=True))
    if num_tokens == 1:  # of 17 the interpreter would take two seconds more
        assert not torch.equal(found.x_TSD, KERNELS[kernel](x_TSD, y_TD, mix, weights).x_TSD)


def test_parts_that_do_not_fit_are_refused() -> None:
    case = KernelCase("hyper_boundary", "two parts", (40, 24, 2), (2,))
    x_TSD, y_TD, mix, weights, other_TD = make_inputs(case, 2, torch.device("cpu"))
    kernel = KERNELS["triton.hyper_boundary"]
    for other in (other_TD.float(), other_TD[:1], other_TD[:, ::2]):
        with pytest.raises(ValueError, match="other_TD"):
            kernel(x_TSD, y_TD, mix, weights, other)
    with pytest.raises(ValueError, match="other_TD"):
        kernel(x_TSD, None, None, weights, other_TD)
