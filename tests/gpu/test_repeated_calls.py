"""A runner keeps what does not change between calls: the second call of a size must be as right as the first.

Each runner is called with several inputs of one shape at addresses of their own, into fresh and into given outputs, and
held to a runner that was made for that call alone.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.kernel_configs import fp8_configs, linear_configs, moe_configs

from ownpath import Nvfp4Linear, Nvfp4MoE
from ownpath.conformance.call import tensors_of
from ownpath.conformance.operations import CASES, make_inputs
from ownpath.conformance.quant_weights import DenseWeight, ExpertStacks, RoutedTokens, draw_weights
from ownpath.formats import BF16
from ownpath.kernels.contract import Config, NormWeights, RouterWeights, RouteWeights, StoredGroups
from ownpath.kernels.fp8.cases import Fp8Case
from ownpath.kernels.hyper.ref import Mix
from ownpath.kernels.registry import KERNELS
from ownpath.qtensor import QuantTensor
from ownpath.runners import Fp8Linear

pytestmark = [pytest.mark.gpu, pytest.mark.sm90]

FIRST = {case.kernel: case for case in reversed(CASES)}
"""A case of each kernel."""
FP8 = Fp8Case("two", (256, 192), 1024, "e8m0")
PRODUCT_COUNTS = (1, 5, 70, 200)
EXPERT_COUNTS = (1, 5, 300)


def kernel_configs() -> Iterator[Config]:
    """Those of the products and of the experts."""
    yield from linear_configs((1536, 1024), PRODUCT_COUNTS)
    yield from fp8_configs(FP8, PRODUCT_COUNTS)
    yield from moe_configs((8, 256, 256), [2 * count for count in EXPERT_COUNTS])


def again(kernel: Any, op: str, inputs: tuple[Any, ...]) -> Callable[..., Any]:
    """A call on one operand that keeps its launches; inputs: with the operand's weights among them."""
    if op == "rms_norm":
        operand = kernel.prepare(NormWeights(*inputs[1:]))
        return lambda given, **places: kernel.run(given[0], operand, **places)
    if op == "swiglu":
        operand = kernel.prepare(inputs[1])
        return lambda given, **places: kernel.run(given[0], operand, **places)
    if op == "grouped_linear":
        weight_GRI = inputs[3]
        stored = StoredGroups(QuantTensor(weight_GRI.flatten(0, 1), None, None, BF16), len(weight_GRI))
        operand = kernel.prepare(stored)
        return lambda given, **places: kernel.run(*given[:3], operand, **places)
    if op == "hyper_boundary":
        operand = kernel.prepare(inputs[3])
        return lambda given, **places: kernel.run(*given[:3], operand, *given[4:], **places)
    if op == "route":
        operand = kernel.prepare(RouteWeights(*inputs[1:3]))
        return lambda given, **places: kernel.run(given[0], given[3], operand, **places)
    _, num_chosen, factor, bias, _, table = inputs
    operand = kernel.prepare(RouterWeights(num_chosen, factor, bias, table))
    return lambda given, **places: kernel.run(given[0], given[4], operand, **places)


def moved(value: Any, flips: bool) -> Any:
    """Activations at another address, in another order of rows; weights as they are."""
    if isinstance(value, torch.Tensor):
        return (value.flip(0) if flips else value).clone()
    if isinstance(value, Mix):
        return Mix(moved(value.post_TS, flips), moved(value.comb_TSS, flips))
    return value


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize("num_tokens", [1, 20])
def test_small_operations(name: str, num_tokens: int, cuda: torch.device) -> None:
    case = FIRST[name]
    kernel, inputs = KERNELS[name], make_inputs(case, num_tokens, cuda)
    weights = {"rms_norm": (1, 2), "swiglu": (1,), "grouped_linear": (3,), "hyper_boundary": (3,), "route": (1, 2)}.get(
        case.op, (3, 5)
    )
    call = again(kernel, case.op, inputs)
    for flips in (False, True, True):
        given = tuple(one if idx in weights else moved(one, flips) for idx, one in enumerate(inputs))
        expected = list(tensors_of(kernel(*given)))
        out = call(given)
        for found, wanted in zip(tensors_of(out), expected, strict=True):
            assert torch.equal(found, wanted), flips
            found.fill_(torch.nan if found.is_floating_point() else -1)
        call(given, out=out)
        for found, wanted in zip(tensors_of(out), expected, strict=True):
            assert torch.equal(found, wanted), flips


@pytest.mark.parametrize("name", FIRST)
def test_a_later_call_refuses_outputs_as_the_first_does(name: str, cuda: torch.device) -> None:
    """Each wrong output in turn: of another dtype, elsewhere, and at an odd address."""
    case = FIRST[name]
    kernel, inputs = KERNELS[name], make_inputs(case, 20, cuda)
    call = again(kernel, case.op, inputs)
    out = call(inputs)
    for idx, one in enumerate(tensors_of(out)):
        shifted = torch.empty(one.numel() + 1, dtype=one.dtype, device=cuda)[1:].view(one.shape)
        for wrong in (one.double() if one.is_floating_point() else one.bool(), one.cpu(), shifted):
            with pytest.raises(ValueError, match="out"):
                call(inputs, out=with_output(out, idx, wrong))


def with_output(out: Any, idx: int, wrong: torch.Tensor) -> Any:
    """These outputs with another tensor in the place of one."""
    places = iter(wrong if at == idx else one for at, one in enumerate(tensors_of(out)))

    def rebuilt(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return next(places)
        parts = [rebuilt(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)

    return rebuilt(out)


def test_an_output_elsewhere_is_refused(cuda: torch.device) -> None:
    dense = DenseWeight.draw(1536, 1024, cuda)
    x = torch.randn(4, 1024, device=cuda).bfloat16()
    for linear in (Nvfp4Linear(dense.codes, dense.scale, dense.global_scale), Fp8Linear(*draw_weights(FP8, 3, cuda))):
        with pytest.raises(ValueError, match="out is on cpu"):
            linear.run(x, out=linear(x).cpu())


@pytest.mark.parametrize("num_tokens", PRODUCT_COUNTS)
def test_products(num_tokens: int, cuda: torch.device) -> None:
    dense = DenseWeight.draw(1536, 1024, cuda)
    copies = [Nvfp4Linear(dense.codes.clone(), dense.scale.clone(), dense.global_scale) for _ in range(4)]
    fp8 = [Fp8Linear(*draw_weights(FP8, 3, cuda)) for _ in range(4)]
    for first, *fresh in (copies, fp8):
        wide = torch.randn(num_tokens, 2048, device=cuda).bfloat16()
        for x, other in zip((wide[:, :1024].contiguous(), wide[:, 1024:], wide[:, 512:1536]), fresh, strict=True):
            expected = other(x)
            assert torch.equal(first(x), expected)
            out = torch.full_like(expected, torch.nan)
            assert first.run(x, out=out, workspace=first.workspace(num_tokens)).data_ptr() == out.data_ptr()
            assert torch.equal(out, expected)
            assert torch.equal(first(x.unsqueeze(1)), expected.unsqueeze(1))


@pytest.mark.parametrize("num_tokens", EXPERT_COUNTS)
def test_experts(num_tokens: int, cuda: torch.device) -> None:
    """Rows at even steps too: what sorts them copies whole rows."""
    experts = ExpertStacks.draw(8, 256, 256, cuda)
    first, *fresh = (Nvfp4MoE(*experts.clone().tensors(), swiglu_limit=10.0) for _ in range(4))
    for seed, other in enumerate(fresh):
        routed = RoutedTokens.draw(num_tokens, 256, 8, 2, cuda)
        x = torch.randn(num_tokens, 512, device=cuda).bfloat16()[:, : 256 * (1 + seed % 2)][:, -256:]
        call = (x, routed.ids, routed.weights)
        expected = other(*call)
        assert torch.equal(first(*call), expected)
        assert torch.equal(other(x.contiguous(), *call[1:]), expected)
        out = torch.full_like(expected, torch.nan)
        workspace = first.workspace(num_tokens + 3, 2)
        workspace.fill_(0xFF)
        assert first(*call, out=out, workspace=workspace).data_ptr() == out.data_ptr()
        assert torch.equal(out, expected)


@pytest.mark.parametrize("num_tokens", [1, 70])
def test_registered_operations_are_the_calls(num_tokens: int, cuda: torch.device) -> None:
    dense = DenseWeight.draw(1536, 1024, cuda)
    linear = Nvfp4Linear(dense.codes, dense.scale, dense.global_scale)
    x = torch.randn(num_tokens, 1024, device=cuda).bfloat16()
    assert torch.equal(torch.ops.ownpath.linear(x, linear.handle), linear(x))
    compiled = torch.compile(lambda rows: linear(rows) * 2, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), linear(x) * 2)
