"""Hopper's decode attention on the device: values of every way to share keys, graphs, what a row's bits depend on."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from ownpath.conformance.attend import AttendInputs, assert_attention, exact_attention, make_attend_inputs, map_rows
from ownpath.conformance.call import KernelCall
from ownpath.conformance.memory import memory_problem
from ownpath.kernels.attend.cases import CASES, AttendCase
from ownpath.kernels.attend.choose_sm90 import WHOLE, AttendPlan, reachable_configs
from ownpath.kernels.attend.launch_sm90 import CUTE_ATTEND, CUTE_ATTEND_INVARIANT, CuteAttend
from ownpath.kernels.attend.types import AttendWeights, DecodeKeys, DecodeRows
from ownpath.kernels.dsl.cache import Config
from ownpath.numerics import encode_e4m3
from ownpath.ops import OpKind


def kernel_configs() -> Iterator[Config]:
    """Those of every way to share keys."""
    for is_invariant in (False, True):
        yield from reachable_configs(is_invariant)


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9, reason="compiled for sm_90a"
)]  # fmt: skip


class Planned(CuteAttend):
    """The kernel with a plan of the test's choosing."""

    def __init__(self, plan: AttendPlan) -> None:
        super().__init__(is_invariant=False)
        self._plan = plan

    def plan(self, q_TNH: torch.Tensor, keys: DecodeKeys, rows: DecodeRows) -> AttendPlan:
        return self._plan


PLANS = (WHOLE, *(AttendPlan(n, True) for n in (2, 3, 5, 8)), *(AttendPlan(n, False) for n in (3, 18)))
KERNELS = {"default": CUTE_ATTEND, "invariant": CUTE_ATTEND_INVARIANT}
ALL = {**KERNELS, **{f"{'cluster' if plan.merges else 'split'}{plan.splits}": Planned(plan) for plan in PLANS}}
RUNS = [(case, num_rows) for case in CASES if not case.bench for num_rows in case.tokens if num_rows <= 33]
MIXED = [case for case in CASES if "mixed" in case.label]
SWEEP = AttendCase("lengths", 4, 4, 700, 128)


def label(value: Any) -> str:
    return value.label if isinstance(value, AttendCase) else str(value)


def fits(name: str, case: AttendCase) -> bool:
    """Returns False where the window's two tiles are written as partial sums, for which nothing is compiled."""
    return case.ratio > 0 or "split" not in name


def run(kernel: CuteAttend, inputs: AttendInputs) -> torch.Tensor:
    """Runs with output and workspace full of NaN, where nothing may be allocated."""
    q, _, _, keys, rows, weights = inputs.arguments
    operand = kernel.prepare(weights)
    workspace = kernel.workspace(q, keys, rows, operand)
    if workspace is not None:
        workspace.fill_(torch.nan)
    out = torch.full(q.shape, torch.nan, dtype=q.dtype, device=q.device)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    kernel.run(*inputs.arguments[:5], operand, out=out, workspace=workspace)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    return out


@pytest.mark.parametrize(("case", "num_rows"), RUNS, ids=label)
def test_values_and_repetition(case: AttendCase, num_rows: int, cuda: torch.device) -> None:
    inputs = make_attend_inputs(case, num_rows, cuda)
    exact = exact_attention(inputs)
    for name in (name for name in ALL if fits(name, case)):
        result = run(ALL[name], inputs)
        assert_attention(result, exact, name)
        assert all(torch.equal(run(ALL[name], inputs), result) for _ in range(3)), name


@pytest.mark.parametrize("ratio", [0, 4, 128])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_every_length(ratio: int, fp8: bool, cuda: torch.device) -> None:
    """Lengths 1 to 700, so every residue modulo 4, 64, 128 and 256, and CTAs without keys."""
    case = replace(SWEEP, ratio=ratio, topk=128 if ratio == 4 else 0, fp8=fp8, context=700)
    for start in range(0, 700, 100):
        inputs = make_attend_inputs(case, 100, cuda, positions=torch.arange(start, start + 100))
        exact = exact_attention(inputs)
        for name in (name for name in ALL if fits(name, case)):
            assert_attention(run(ALL[name], inputs), exact, name)


def test_every_code_and_scale(cuda: torch.device) -> None:
    """A row that sees one key returns it: all codes but NaN, each with the scales 2^-117 to 2^113, bit for bit."""
    codes = torch.tensor([code for code in range(256) if code % 128 != 127] + [0, 0], dtype=torch.uint8)
    scales = torch.arange(10, 241, dtype=torch.uint8)
    blocks = codes.view(1, 4, 64).expand(len(scales), -1, -1).reshape(-1, 7, 64)
    scales = scales[:, None].expand(-1, 4).reshape(-1, 7)
    num_rows = len(blocks)
    pages = torch.zeros(num_rows, 128 * 584, dtype=torch.uint8)
    pages[:, :448] = blocks.flatten(1)
    pages[:, 128 * 576 : 128 * 576 + 7] = scales
    pages[:, 128 * 576 + 7] = 255  # no scale
    slots = torch.arange(num_rows, dtype=torch.int32, device=cuda)
    zeros = torch.zeros_like(slots)
    q = torch.zeros(num_rows, 1, 512, dtype=torch.bfloat16, device=cuda)
    cos, sin = (torch.full((num_rows, 32), value, device=cuda) for value in (1.0, 0.0))
    weights = AttendWeights(torch.full((1,), -1e4, device=cuda), 1.0, 1e-6)
    arguments = (q, cos, sin, DecodeKeys(pages.to(cuda)), DecodeRows(zeros, slots, zeros[:, None]))
    wanted = blocks.view(torch.float8_e4m3fn).double() * torch.exp2(scales.double() - 127)[..., None]
    for name in ("default", "invariant", "cluster2"):
        result = ALL[name].run(*arguments, ALL[name].prepare(weights))
        assert torch.equal(result[:, 0, :448].double().cpu(), wanted.flatten(1)), name


def spread_scales(pages: torch.Tensor, num_keys: int) -> None:
    """Moves each block's scale up by as much as 2^17 and its codes down, which rounds them."""
    g = torch.Generator(pages.device).manual_seed(num_keys)
    data, tail = pages.split((num_keys * 576, num_keys * 8), dim=1)
    codes = data.unflatten(1, (num_keys, 576))[..., :448].unflatten(2, (7, 64))
    scales = tail.unflatten(1, (num_keys, 8))[..., :7]
    up = torch.randint(0, 18, scales.shape, generator=g, device=pages.device) * (scales != 255)
    lower = codes.contiguous().view(torch.float8_e4m3fn).float() * torch.exp2(-up.float())[..., None]
    codes.copy_(torch.where((scales == 255)[..., None], codes, encode_e4m3(lower).view(torch.uint8)))
    scales.copy_((scales.int() + up).to(torch.uint8))


@pytest.mark.parametrize("case", [case for case in MIXED if case.fp8], ids=label)
def test_scales_of_every_size(case: AttendCase, cuda: torch.device) -> None:
    """Scales of a key's blocks that are far apart, some above 2^7, which the kernel multiplies by in two steps."""
    inputs = make_attend_inputs(case, 7, cuda)
    assert inputs.keys.entries is not None
    spread_scales(inputs.keys.window, 128)
    spread_scales(inputs.keys.entries, inputs.keys.per_block)
    exact = exact_attention(inputs)
    for name in ALL:
        assert_attention(run(ALL[name], inputs), exact, name)


@pytest.mark.parametrize("name", ALL)
def test_memory_does_not_matter(name: str, cuda: torch.device) -> None:
    """As ``ownpath verify`` asks of every slot (K02)."""
    for case in (case for case in CASES if case.tiny and fits(name, case)):
        inputs = make_attend_inputs(case, 9, cuda)
        assert not memory_problem(KernelCall(case.label, OpKind.ATTEND, ALL[name], inputs.arguments))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("case", MIXED, ids=label)
def test_graph_is_eager(name: str, case: AttendCase, cuda: torch.device) -> None:
    """A captured call follows its inputs, positions and tables too, and gives the bits of an eager call."""
    kernel, inputs = ALL[name], make_attend_inputs(case, 7, cuda)
    operand, out = kernel.prepare(inputs.weights), torch.empty_like(inputs.q_TNH)
    given = {"out": out, "workspace": kernel.workspace(inputs.q_TNH, inputs.keys, inputs.rows, operand)}
    kernel.run(*inputs.arguments[:5], operand, **given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel.run(*inputs.arguments[:5], operand, **given)
    turned = replace(inputs, q_TNH=inputs.q_TNH.flip(0), rows=map_rows(lambda part: part.roll(1, 0), inputs.rows))
    wanted = run(kernel, turned)
    for held, new in zip(inputs.rows, turned.rows, strict=True):
        if held is not None and new is not None:
            held.copy_(new)
    inputs.q_TNH.copy_(turned.q_TNH.clone())
    out.fill_(torch.nan)
    graph.replay()
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("case", MIXED, ids=label)
def test_queries_may_lie_in_wider_rows(name: str, case: AttendCase, cuda: torch.device) -> None:
    """As in a product that has the index queries behind them: the same bits."""
    inputs = make_attend_inputs(case, 7, cuda)
    assert torch.equal(run(ALL[name], inputs.sliced()), run(ALL[name], inputs))


@pytest.mark.parametrize("case", MIXED, ids=label)
def test_a_row_does_not_depend_on_its_neighbours(case: AttendCase, cuda: torch.device) -> None:
    """Nor on their number, nor on the width of the tables, where the kernel is invariant."""
    inputs = make_attend_inputs(case, 33, cuda)
    whole = run(CUTE_ATTEND_INVARIANT, inputs)
    for num_rows in (1, 3, 20):
        assert torch.equal(run(CUTE_ATTEND_INVARIANT, inputs.first(num_rows)), whole[:num_rows])
    blocks_TB = inputs.rows.blocks_TB
    wider = inputs.rows._replace(blocks_TB=torch.cat((blocks_TB, torch.full_like(blocks_TB, 2**30)), dim=1))
    assert torch.equal(run(CUTE_ATTEND_INVARIANT, replace(inputs, rows=wider)), whole)


@pytest.mark.parametrize("name", ALL)
def test_padded_rows_are_nobodys(name: str, cuda: torch.device) -> None:
    """Rows of slot 0, whose memory is NaN, change nothing for the others."""
    inputs = make_attend_inputs(next(case for case in CASES if case.label == "flash CSA, mixed rows"), 8, cuda)
    alone = run(ALL[name], inputs)
    rows = map_rows(torch.clone, inputs.rows)
    for part in rows:
        assert part is not None
        part[5:] = 0
    assert torch.equal(run(ALL[name], replace(inputs, rows=rows))[:5], alone[:5])
