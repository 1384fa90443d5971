"""``wo_a`` with FP8 weights on Hopper: values, exact weights, repetition, graphs, invariance, refusals.

Legend: T tokens, N heads, H head dim, A angles, G groups, R rows and I columns of a group.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ownpath.conformance.bounds import assert_rounded_once
from ownpath.conformance.call import KernelCall
from ownpath.conformance.exact import grouped_product, rotate_back
from ownpath.conformance.memory import memory_problem
from ownpath.conformance.quant_weights import draw_rows, draw_weights
from ownpath.kernels.contract import Config
from ownpath.kernels.fp8.cases import Fp8Case
from ownpath.kernels.grouped.cases import FP8_CASES, GroupedFp8Case
from ownpath.kernels.grouped.choose import choices
from ownpath.kernels.registry import KERNELS
from ownpath.numerics import decode_fp8_block
from ownpath.ops import OpKind
from ownpath.runners import Fp8GroupedLinear

pytestmark = [pytest.mark.gpu, pytest.mark.sm90]

NAMES = ("cute.grouped_linear_fp8_sm90", "cute.grouped_linear_fp8_sm90_invariant")
FLASH = next(case for case in FP8_CASES if case.label == "flash")


def kernel_configs() -> Iterator[Config]:
    """Those of the cases."""
    for case in FP8_CASES:
        num_groups, num_heads, head_dim, _, num_rows = case.sizes
        for is_invariant in (False, True):
            for folded in (False, True):
                yield from choices((num_groups * num_rows // 64, num_heads * head_dim // 128, folded), is_invariant)


def label(value: Any) -> str:
    return value.label if isinstance(value, GroupedFp8Case) else str(value)


def drawn(case: GroupedFp8Case, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws the stacked matrices E4M3 [G * R, I] and their scales."""
    num_groups, num_heads, head_dim, _, num_rows = case.sizes
    shards = Fp8Case(case.label, (num_groups * num_rows,), num_heads * head_dim, case.scales)
    (weight,), (scale,) = draw_weights(shards, 1, device)
    return weight, scale


def runner_of(case: GroupedFp8Case, name: str, device: torch.device) -> Fp8GroupedLinear:
    return Fp8GroupedLinear(*drawn(case, device), case.sizes[0], kernel=name)


def inputs(case: GroupedFp8Case, num_tokens: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Draws o [T, N, H], and cos and sin of positions up to a million [T, A]."""
    num_groups, num_heads, head_dim, rotary_dim, _ = case.sizes
    o = draw_rows(num_tokens, num_groups * num_heads * head_dim, 1.0, device)
    generator = torch.Generator(device).manual_seed(num_tokens)
    angles = torch.rand(num_tokens, rotary_dim // 2, generator=generator, device=device) * 1e6
    return o.view(num_tokens, -1, head_dim), angles.cos(), angles.sin()


def exact_weight(case: GroupedFp8Case, device: torch.device) -> torch.Tensor:
    return decode_fp8_block(*drawn(case, device), torch.float64)


@pytest.mark.parametrize("case", FP8_CASES, ids=label)
@pytest.mark.parametrize("name", NAMES)
def test_values_and_repetition(case: GroupedFp8Case, name: str, cuda: torch.device) -> None:
    """Right, every element written, the same bits again, and no allocation in the call."""
    runner, weight = runner_of(case, name, cuda), exact_weight(case, cuda)
    for num_tokens in case.tokens:
        o_TNH, cos_TA, sin_TA = arguments = inputs(case, num_tokens, cuda)
        out = runner.run(*arguments).fill_(torch.nan)
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        runner.run(*arguments, out=out)
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
        exact = grouped_product(*rotate_back(o_TNH, (cos_TA, sin_TA)), case.sizes[0], weight)
        assert_rounded_once(out.flatten(1), exact, num_tokens)
        for _ in range(3):
            assert torch.equal(runner.run(*arguments), out), num_tokens


@pytest.mark.parametrize("case", FP8_CASES, ids=label)
@pytest.mark.parametrize("name", NAMES)
def test_weights_are_exact_and_angle_zero_turns_nothing(case: GroupedFp8Case, name: str, cuda: torch.device) -> None:
    """A single one among the inputs gives a column of the matrix, rounded to BF16: rotary channels' too."""
    num_groups, num_heads, head_dim, rotary_dim, num_rows = case.sizes
    runner = runner_of(case, name, cuda)
    wide = exact_weight(case, cuda).view(num_groups, num_rows, num_heads, head_dim)
    for num_tokens in case.tokens:
        t = torch.arange(num_tokens, device=cuda)
        head, channel = t * 5 % (num_groups * num_heads), (head_dim - 1 - t * 37) % head_dim
        o_TNH = torch.zeros(num_tokens, num_groups * num_heads, head_dim, device=cuda, dtype=torch.bfloat16)
        o_TNH[t, head, channel] = 1
        cos_TA = torch.ones(num_tokens, rotary_dim // 2, device=cuda)
        y_TGR = runner.run(o_TNH, cos_TA, torch.zeros_like(cos_TA))
        expected = torch.zeros(num_tokens, num_groups, num_rows, device=cuda, dtype=torch.float64)
        expected[t, head // num_heads] = wide[head // num_heads, :, head % num_heads, channel]
        assert torch.equal(y_TGR, expected.to(torch.bfloat16)), num_tokens


def test_restore(cuda: torch.device) -> None:
    for case in FP8_CASES:
        weight, scale = drawn(case, cuda)
        (stored,) = runner_of(case, NAMES[0], cuda).stored()
        assert stored.scale is not None
        assert torch.equal(stored.qdata.view(torch.uint8), weight.view(torch.uint8))
        assert torch.equal(stored.scale, scale.float())


@pytest.mark.parametrize("case", FP8_CASES, ids=label)
@pytest.mark.parametrize("name", NAMES)
def test_memory_does_not_matter(case: GroupedFp8Case, name: str, cuda: torch.device) -> None:
    """As ``ownpath verify`` asks of every slot (K02)."""
    runner = runner_of(case, name, cuda)
    assert not memory_problem(KernelCall(case.label, OpKind.GROUPED, runner.run, inputs(case, 33, cuda)))


@pytest.mark.parametrize("case", FP8_CASES, ids=label)
def test_a_token_does_not_depend_on_its_neighbours(case: GroupedFp8Case, cuda: torch.device) -> None:
    """The first rows of a long call have the bits of a short call."""
    runner, arguments = runner_of(case, NAMES[1], cuda), inputs(case, 33, cuda)
    whole = runner.run(*arguments)
    for num_rows in (1, 7, 9, 20):
        part = runner.run(*(value[:num_rows] for value in arguments))
        assert torch.equal(part, whole[:num_rows]), num_rows


@pytest.mark.parametrize("num_tokens", [1, 32, 128])
def test_graph_replay(num_tokens: int, cuda: torch.device) -> None:
    """A captured call follows its inputs: new values in the same tensors give new, right outputs."""
    runner, arguments = runner_of(FLASH, NAMES[0], cuda), inputs(FLASH, num_tokens, cuda)
    out = runner.run(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        runner.run(*arguments, out=out)
    arguments[0].copy_(arguments[0].flip(0).neg())
    out.fill_(torch.nan)
    graph.replay()
    assert torch.equal(out, runner.run(*arguments))


def test_a_wrong_operand_is_refused_by_name(cuda: torch.device) -> None:
    case = FP8_CASES[0]
    runner = runner_of(case, NAMES[0], cuda)
    o_TNH, cos_TA, sin_TA = inputs(case, 3, cuda)
    for _ in range(2):  # the second time with a launch prepared
        for broken in (o_TNH.float(), o_TNH.repeat(1, 1, 2)[..., ::2]):
            with pytest.raises(ValueError, match="o_TNH"):
                runner.run(broken, cos_TA, sin_TA)
        for broken in (cos_TA[:2], cos_TA[:, :6].contiguous(), cos_TA.double()):
            with pytest.raises(ValueError, match="cos_TA"):
                runner.run(o_TNH, broken, sin_TA)
        with pytest.raises(ValueError, match="sin_TA"):
            runner.run(o_TNH, cos_TA, sin_TA.cpu())
        with pytest.raises(ValueError, match="out"):
            runner.run(o_TNH, cos_TA, sin_TA, out=torch.empty(3, device=cuda))
        runner.run(o_TNH, cos_TA, sin_TA)
    assert runner.run(o_TNH[:0], cos_TA[:0], sin_TA[:0]).shape == (0, 2, 128)
    with pytest.raises(ValueError, match="multiples of 128"):
        Fp8GroupedLinear(*drawn(case, cuda), 4)


def test_the_names_are_the_registered_ones() -> None:
    assert set(NAMES) <= set(KERNELS)
