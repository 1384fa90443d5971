"""The Triton kernels of the small operations, interpreted, against float64 of the same operands."""

import pytest
import torch

from ownpath.conformance.call import tensors_of
from ownpath.conformance.memory import memory_problem
from ownpath.conformance.operations import CASES, call_of, judge, make_inputs
from ownpath.kernels.cases import KernelCase
from ownpath.kernels.registry import KERNELS

CPU = torch.device("cpu")
TINY = [(case, num_tokens) for case in CASES if case.tiny for num_tokens in case.tokens]


@pytest.mark.parametrize(("case", "num_tokens"), TINY, ids=lambda value: getattr(value, "label", str(value)))
def test_kernel(case: KernelCase, num_tokens: int) -> None:
    inputs = make_inputs(case, num_tokens, CPU)
    judge(case, KERNELS[case.kernel](*inputs), inputs)


@pytest.mark.parametrize("case", [case for case in CASES if case.tiny], ids=lambda case: f"{case.kernel} {case.label}")
def test_reference(case: KernelCase) -> None:
    """The torch twin stands the same judgement."""
    inputs = make_inputs(case, case.tokens[0], CPU, seed=1)
    judge(case, KERNELS[f"ref.{case.op}"](*inputs), inputs)


@pytest.mark.parametrize("case", [case for case in CASES if case.tiny], ids=lambda case: f"{case.kernel} {case.label}")
def test_memory_does_not_matter(case: KernelCase) -> None:
    """As ``ownpath verify`` asks of every slot (K02)."""
    inputs = make_inputs(case, 3, CPU)
    assert not memory_problem(call_of(case, KERNELS[case.kernel], inputs))


@pytest.mark.parametrize("case", [case for case in CASES if case.tiny], ids=lambda case: f"{case.kernel} {case.label}")
def test_no_tokens(case: KernelCase) -> None:
    for tensor in tensors_of(KERNELS[case.kernel](*make_inputs(case, 0, CPU))):
        assert tensor.numel() == 0
