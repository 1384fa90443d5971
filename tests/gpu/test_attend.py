"""Decode attention on the device: values, repetition, graphs, what a row's bits depend on."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from ownpath.conformance.attend import AttendInputs, assert_attention, exact_attention, make_attend_inputs, map_rows
from ownpath.conformance.call import KernelCall
from ownpath.conformance.memory import memory_problem
from ownpath.kernels.attend.cases import CASES, AttendCase
from ownpath.kernels.registry import KERNELS, spec_of
from ownpath.ops import OpKind

pytestmark = pytest.mark.gpu

NAMES = ("triton.attend", "triton.attend_invariant")
INVARIANT = [name for name in NAMES if spec_of(name).is_batch_invariant]
RUNS = [(case, num_rows) for case in CASES for num_rows in case.tokens if num_rows <= 33]
SWEEP = AttendCase("lengths", 4, 4, 700, 128)


def label(value: Any) -> str:
    return value.label if isinstance(value, AttendCase) else str(value)


def buffers(name: str, inputs: AttendInputs) -> dict[str, torch.Tensor | None]:
    """Output and workspace, full of NaN, for a call that must allocate nothing."""
    q, _, _, keys, rows, weights = inputs.arguments
    workspace = KERNELS[name].workspace(q, keys, rows, KERNELS[name].prepare(weights))
    if workspace is not None:
        workspace.fill_(torch.nan)
    return {"out": torch.full(q.shape, torch.nan, dtype=q.dtype, device=q.device), "workspace": workspace}


def run(name: str, inputs: AttendInputs) -> torch.Tensor:
    kernel = KERNELS[name]
    out: torch.Tensor = kernel.run(*inputs.arguments[:5], kernel.prepare(inputs.weights), **buffers(name, inputs))
    return out


@pytest.mark.parametrize(("case", "num_rows"), RUNS, ids=label)
def test_values_and_repetition(case: AttendCase, num_rows: int, cuda: torch.device) -> None:
    """Right, every element written, the same bits again, and no allocation in the call."""
    inputs = make_attend_inputs(case, num_rows, cuda)
    exact = exact_attention(inputs)
    for name in NAMES:
        kernel = KERNELS[name]
        operand, given = kernel.prepare(inputs.weights), buffers(name, inputs)
        kernel.run(*inputs.arguments[:5], operand, **given)
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        result = kernel.run(*inputs.arguments[:5], operand, **given)
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before, name
        assert_attention(result, exact, name)
        first = result.clone()
        for _ in range(3):
            assert torch.equal(kernel.run(*inputs.arguments[:5], operand, **given), first), name


@pytest.mark.parametrize("ratio", [0, 4, 128])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_every_length(ratio: int, fp8: bool, cuda: torch.device) -> None:
    """Lengths 1 to 700, so every residue modulo 4, 64, 128 and 256."""
    case = replace(SWEEP, ratio=ratio, topk=128 if ratio == 4 else 0, fp8=fp8, context=700)
    for start in range(0, 700, 100):
        inputs = make_attend_inputs(case, 100, cuda, positions=torch.arange(start, start + 100))
        exact = exact_attention(inputs)
        for name in NAMES:
            assert_attention(run(name, inputs), exact, name)


@pytest.mark.parametrize("name", NAMES)
def test_memory_does_not_matter(name: str, cuda: torch.device) -> None:
    """As ``ownpath verify`` asks of every slot (K02)."""
    for case in (case for case in CASES if case.tiny):
        inputs = make_attend_inputs(case, 9, cuda)
        assert not memory_problem(KernelCall(case.label, OpKind.ATTEND, KERNELS[name], inputs.arguments))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", [case for case in CASES if "mixed" in case.label], ids=label)
def test_graph_is_eager(name: str, case: AttendCase, cuda: torch.device) -> None:
    """A captured call follows its inputs, positions and tables too, and gives the bits of an eager call."""
    kernel, inputs = KERNELS[name], make_attend_inputs(case, 7, cuda)
    operand, given = kernel.prepare(inputs.weights), buffers(name, inputs)
    kernel.run(*inputs.arguments[:5], operand, **given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel.run(*inputs.arguments[:5], operand, **given)
    rolled = map_rows(lambda part: part.roll(1, 0), inputs.rows)
    turned = replace(inputs, q_TNH=inputs.q_TNH.flip(0), rows=rolled)
    wanted = run(name, turned)
    for held, new in zip(inputs.rows, turned.rows, strict=True):
        if held is not None and new is not None:
            held.copy_(new)
    inputs.q_TNH.copy_(turned.q_TNH.clone())
    assert given["out"] is not None
    given["out"].fill_(torch.nan)
    graph.replay()
    assert torch.equal(given["out"], wanted)


@pytest.mark.parametrize("name", INVARIANT)
@pytest.mark.parametrize("case", [case for case in CASES if "mixed" in case.label], ids=label)
def test_a_row_does_not_depend_on_its_neighbours(name: str, case: AttendCase, cuda: torch.device) -> None:
    """Nor on their number, nor on the width of the tables."""
    inputs = make_attend_inputs(case, 33, cuda)
    whole = run(name, inputs)
    for num_rows in (1, 3, 20):
        assert torch.equal(run(name, inputs.first(num_rows)), whole[:num_rows])
    blocks_TB = inputs.rows.blocks_TB
    wider = torch.cat((blocks_TB, torch.full_like(blocks_TB, 2**30)), dim=1)
    assert torch.equal(run(name, replace(inputs, rows=inputs.rows._replace(blocks_TB=wider))), whole)


@pytest.mark.parametrize("name", NAMES)
def test_padded_rows_are_nobodys(name: str, cuda: torch.device) -> None:
    """Rows of slot 0, whose memory is NaN, change nothing for the others."""
    inputs = make_attend_inputs(next(case for case in CASES if case.label == "flash CSA, mixed rows"), 8, cuda)
    alone = run(name, inputs)
    rows = map_rows(torch.clone, inputs.rows)
    for part in rows:
        assert part is not None
        part[5:] = 0
    padded = run(name, replace(inputs, rows=rows))
    assert torch.equal(padded[:5], alone[:5])
