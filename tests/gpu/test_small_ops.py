"""The Triton kernels of the small operations on the device: values, repetition, graphs, invariance, refusals."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ownpath.conformance.call import tensors_of
from ownpath.conformance.memory import memory_problem
from ownpath.conformance.operations import CASES, call_of, judge, make_inputs
from ownpath.kernels.cases import KernelCase
from ownpath.kernels.contract import RouteWeights
from ownpath.kernels.hyper.ref import HyperOut
from ownpath.kernels.registry import KERNELS, spec_of

pytestmark = pytest.mark.gpu

INVARIANT = [case for case in CASES if spec_of(case.kernel).is_batch_invariant]
RUNS = [(case, num_tokens) for case in CASES for num_tokens in case.tokens]


def label(value: Any) -> str:
    return f"{value.kernel} {value.label}" if isinstance(value, KernelCase) else str(value)


def out_arguments(case: KernelCase, inputs: tuple[Any, ...]) -> dict[str, Any]:
    """Outputs and workspace, all NaN or -1, for a call that must allocate nothing."""
    result = KERNELS[case.kernel](*inputs)
    for tensor in tensors_of(result):
        tensor.fill_(torch.nan if tensor.is_floating_point() else -1)
    arguments = {"out": result}
    if isinstance(result, HyperOut):
        num_floats = 32 * -(-case.sizes[0] // 32) * len(result.x_TSD)
        arguments["workspace"] = torch.full((num_floats,), torch.nan, device=result.x_TSD.device)
    return arguments


def kept(case: KernelCase, inputs: tuple[Any, ...]) -> Callable[..., Any]:
    """The kernel; on one operand, if that has memory of its own."""
    kernel = KERNELS[case.kernel]
    if case.op != "route":
        return kernel  # type: ignore[no-any-return]
    operand = kernel.prepare(RouteWeights(*inputs[1:3]))
    return lambda x_TD, _gate, _weights, token_ids_T, **places: kernel.run(x_TD, token_ids_T, operand, **places)


def bits(result: Any) -> list[torch.Tensor]:
    views = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [tensor.view(views[tensor.element_size()]).clone() for tensor in tensors_of(result)]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("case", "num_tokens"), RUNS, ids=label)
def test_values_and_repetition(case: KernelCase, num_tokens: int, cuda: torch.device) -> None:
    """Right, every element written, the same bits again, and no allocation in the call."""
    inputs = make_inputs(case, num_tokens, cuda)
    kernel, arguments = kept(case, inputs), out_arguments(case, inputs)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    result = kernel(*inputs, **arguments)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    judge(case, result, inputs)
    first = bits(result)
    for _ in range(3):
        assert equal(bits(kernel(*inputs, **arguments)), first)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_memory_does_not_matter(case: KernelCase, cuda: torch.device) -> None:
    """As ``ownpath verify`` asks of every slot (K02)."""
    inputs = make_inputs(case, 33, cuda)
    assert not memory_problem(call_of(case, KERNELS[case.kernel], inputs))


@pytest.mark.parametrize("case", [case for case in CASES if case.bench], ids=label)
def test_graph_replay(case: KernelCase, cuda: torch.device) -> None:
    """A captured call follows its inputs: new values in the same tensors give new, right outputs."""
    kernel, num_tokens = KERNELS[case.kernel], case.tokens[0]
    inputs, fresh = (make_inputs(case, num_tokens, cuda, seed=seed) for seed in (0, 5))
    arguments = out_arguments(case, inputs)
    kernel(*inputs, **arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel(*inputs, **arguments)
    inputs[0].copy_(fresh[0])
    for tensor in tensors_of(arguments["out"]):
        tensor.zero_()
    graph.replay()
    judge(case, arguments["out"], inputs)


@pytest.mark.parametrize("case", INVARIANT, ids=label)
def test_a_token_does_not_depend_on_its_neighbours(case: KernelCase, cuda: torch.device) -> None:
    """The first rows of a long call have the bits of a short call."""
    kernel, inputs = KERNELS[case.kernel], make_inputs(case, 33, cuda)
    whole = list(tensors_of(kernel(*inputs)))
    for num_rows in (1, 3, 20):
        part = kernel(*(rows_of(value, num_rows) for value in inputs))
        assert equal(bits(part), bits(tuple(tensor[:num_rows].contiguous() for tensor in whole)))


def rows_of(value: Any, num_rows: int) -> Any:
    """The first rows of a per-token operand; anything else as it is."""
    from ownpath.kernels.hyper.ref import Mix

    if isinstance(value, Mix):
        return Mix(value.post_TS[:num_rows].contiguous(), value.comb_TSS[:num_rows].contiguous())
    if isinstance(value, torch.Tensor) and len(value) == 33:
        return value[:num_rows]
    return value
